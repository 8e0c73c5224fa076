"""The accessor ``.vit`` on Datasets and DataArrays: one line of delegation a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xarray as xr

__all__ = ["VitArray", "VitDataset"]


@xr.register_dataset_accessor("vit")
class VitDataset:
    """Methods on a Dataset of activations or of factors."""

    def __init__(self, ds: xr.Dataset):
        self._ds = ds

    def neuron_tensor(
        self,
        layer: int,
        feature_maps: int | Sequence[int] | None = 20,
        ranking: Literal["first_frame", "mean"] = "first_frame",
        rectify: bool = True,
        normalize: bool = True,
        stack: bool = True,
        drop_edge: int = 0,
    ) -> xr.DataArray:
        """See :func:`vitxr.tensors.neuron_tensor`."""
        from vitxr.tensors import neuron_tensor

        return neuron_tensor(
            self._ds, layer, feature_maps, ranking, rectify, normalize, stack, drop_edge
        )

    def neuron_matrix(
        self,
        layer: int,
        feature_maps: int | Sequence[int] | None = 20,
        ranking: Literal["first_frame", "mean"] = "first_frame",
        rectify: bool = True,
        normalize: bool = True,
        stack: bool = True,
        drop_edge: int = 0,
    ) -> xr.DataArray:
        """See :func:`vitxr.tensors.neuron_matrix`."""
        from vitxr.tensors import neuron_matrix

        return neuron_matrix(
            self._ds, layer, feature_maps, ranking, rectify, normalize, stack, drop_edge
        )

    def activity(self, rectify: bool = True) -> xr.DataArray:
        """See :func:`vitxr.tensors.activity`."""
        from vitxr.tensors import activity

        return activity(self._ds, rectify)

    def embed(self, n_components: int = 10, method: str = "pca", dim: str = "neuron") -> xr.Dataset:
        """See :func:`vitxr.analysis.embed`."""
        from vitxr.analysis import embed

        return embed(self._ds, n_components, method, dim)


@xr.register_dataarray_accessor("vit")
class VitArray:
    """Methods on a neuron tensor or matrix."""

    def __init__(self, array: xr.DataArray):
        self._array = array

    def factorize(
        self,
        rank: int | Sequence[int],
        method: str = "ncp_hals",
        random_state: int = 0,
        tol: float = 1e-5,
        max_iter: int = 500,
        **options: Any,
    ) -> xr.Dataset:
        """See :func:`vitxr.factor.factorize`."""
        from vitxr.factor import factorize

        return factorize(self._array, rank, method, random_state, tol, max_iter, **options)

    def fit_ensemble(
        self,
        ranks: Sequence[int],
        replicates: int = 3,
        method: str = "ncp_hals",
        random_state: int = 0,
        tol: float = 1e-5,
        max_iter: int = 500,
        progress: bool = True,
    ) -> xr.DataTree:
        """See :func:`vitxr.factor.fit_ensemble`."""
        from vitxr.factor import fit_ensemble

        return fit_ensemble(
            self._array, ranks, replicates, method, random_state, tol, max_iter, progress
        )

    def to_mat(self, path: str | Path) -> Path:
        """See :func:`vitxr.tensors.to_mat`."""
        from vitxr.tensors import to_mat

        return to_mat(self._array, path)
