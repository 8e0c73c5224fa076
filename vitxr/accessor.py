"""The accessor ``.vit``: one line of delegation a method, imports inside."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import xarray as xr

__all__ = ["VitArray", "VitDataset", "VitTree"]

#: Where a method lives that somebody looks for elsewhere.
_ELSEWHERE = {
    "neuron_tensor": "activations, ds.vit.neuron_tensor(layer=0)",
    "neuron_matrix": "activations, ds.vit.neuron_matrix(layer=0)",
    "activity": "activations, ds.vit.activity()",
    "top_classes": "activations, ds.vit.top_classes(k=5)",
    "unshift": "activations, ds.vit.unshift()",
    "equivariance": "activations, ds.vit.equivariance()",
    "cka": "activations, ds.vit.cka()",
    "map_table": "activations, ds.vit.map_table()",
    "class_activity": "activations, ds.vit.class_activity()",
    "population_sparseness": "activations, ds.vit.population_sparseness()",
    "rsa": "activations, ds.vit.rsa()",
    "rdm": "activations, ds.vit.rdm()",
    "factorize": "a neuron tensor, ds.vit.neuron_tensor(layer=0).vit.factorize(rank=25)",
    "fit_ensemble": "a neuron tensor, ds.vit.neuron_tensor(layer=0).vit.fit_ensemble([20, 25])",
    "choose_rank": "a neuron tensor, ds.vit.neuron_tensor(layer=0).vit.choose_rank([5, 10, 20])",
    "core_consistency": "a neuron tensor, t.vit.core_consistency(factors)",
    "to_mat": "a neuron tensor or matrix, t.vit.to_mat(path)",
    "factorize_aligned": "a neuron tensor, t.vit.factorize_aligned(rank=10)",
    "smooth": "a neuron tensor, t.vit.smooth(sigma=1)",
    "embed": "a Dataset of factors, t.vit.factorize(rank=25).vit.embed()",
    "reconstruct": "a Dataset of factors, f.vit.reconstruct()",
    "explained": "a Dataset of factors, f.vit.explained(t)",
    "transform": "a Dataset of factors, f.vit.transform(new)",
    "to_tensorly": "a Dataset of factors, f.vit.to_tensorly()",
    "best": "an ensemble, tree.vit.best(rank=25)",
    "project": "an embedding, f.vit.embed().vit.project(new)",
    "local_dimension": "a Dataset of factors, f.vit.local_dimension()",
    "spatial_order": "an embedding, f.vit.embed().vit.spatial_order()",
    "cluster": "an embedding, f.vit.embed().vit.cluster(n_clusters=8)",
    "sample_neurons": "a neuron tensor, t.vit.sample_neurons(1000)",
    "attention_map": "an extraction, ds.vit.attention_map((row, col))",
    "attention_rollout": "an extraction, ds.vit.attention_rollout()",
    "attention_distance": "an extraction, ds.vit.attention_distance()",
    "attention_entropy": "an extraction, ds.vit.attention_entropy()",
    "mass_mask": "a map on the patch grid, ds.vit.attention_map().vit.mass_mask()",
}


class _Hints:
    """Say where a method is when it is asked of the wrong object."""

    def __getattr__(self, name: str) -> Any:
        where = f": it is a method of {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"{type(self).__name__} has no method {name!r}{where}.")


@xr.register_dataset_accessor("vit")
class VitDataset(_Hints):
    """Methods on a Dataset of activations or of factors."""

    def __init__(self, ds: xr.Dataset):
        self._ds = ds

    def neuron_tensor(
        self,
        layer: int | None,
        feature_maps: int | Sequence[int] | None = 20,
        ranking: Literal["first_frame", "mean"] = "first_frame",
        rectify: bool = True,
        normalize: bool = True,
        stack: bool = True,
        drop_edge: int = 0,
        variable: str = "activation",
    ) -> xr.DataArray:
        """Responses of one layer's neurons to every image and shift, (neuron, image, shift).

        ``feature_maps``: how many of the most active maps to keep, a list of channel
        numbers, or None for all. Rectified, then each map divided by its maximum in
        each frame; ``drop_edge`` leaves out border patches; ``variable`` takes the maps of
        another variable than the block's output. Lazy. See
        :func:`vitxr.tensors.neuron_tensor`.
        """
        from vitxr.tensors import neuron_tensor

        return neuron_tensor(
            self._ds, layer, feature_maps, ranking, rectify, normalize, stack, drop_edge, variable
        )

    def neuron_matrix(
        self,
        layer: int | None,
        feature_maps: int | Sequence[int] | None = 20,
        ranking: Literal["first_frame", "mean"] = "first_frame",
        rectify: bool = True,
        normalize: bool = True,
        stack: bool = True,
        drop_edge: int = 0,
        variable: str = "activation",
    ) -> xr.DataArray:
        """Mean over shifts of ``neuron_tensor``, (neuron, image); the same parameters.

        See :func:`vitxr.tensors.neuron_matrix`.
        """
        from vitxr.tensors import neuron_matrix

        return neuron_matrix(
            self._ds, layer, feature_maps, ranking, rectify, normalize, stack, drop_edge, variable
        )

    def activity(self, rectify: bool = True, variable: str = "activation") -> xr.DataArray:
        """Mean over patches of each feature map's rectified activation.

        (image, shift_y, shift_x, layer, feature_map), not normalised; ``rectify=False``
        takes activations as they are. Lazy. See :func:`vitxr.tensors.activity`.
        """
        from vitxr.tensors import activity

        return activity(self._ds, rectify, variable)

    def top_classes(self, k: int = 5) -> xr.Dataset:
        """Find the ``k`` classes of largest logit of every frame, with names and probabilities.

        ``top_class``, ``class_number``, ``top_logit``, ``probability`` over (image, shift_y,
        shift_x, place). Lazy. See :func:`vitxr.analysis.top_classes`.
        """
        from vitxr.analysis import top_classes

        return top_classes(self._ds, k)

    def unshift(self, variable: str = "activation") -> xr.DataArray:
        """Roll every frame back on the patch grid by the shift that made it.

        Exact for whole patches; what is left over are the coordinates ``phase_y`` and
        ``phase_x``, in pixels. Lazy. See :func:`vitxr.analysis.unshift`.
        """
        from vitxr.analysis import unshift

        return unshift(self._ds, variable)

    def equivariance(self, variable: str = "activation") -> xr.Dataset:
        """How well feature maps move with the image.

        ``equivariance_error(layer, feature_map)``, ``still_error``, ``invariance``, and by place
        and phase ``error_map``, ``phase_error``, ``phase_activity``. Lazy. See
        :func:`vitxr.analysis.equivariance`.
        """
        from vitxr.analysis import equivariance

        return equivariance(self._ds, variable)

    def cka(
        self,
        other: xr.Dataset | None = None,
        across: Literal["layer", "shift"] = "layer",
        unbiased: bool = True,
        batch_size: int = 32,
        shuffles: int = 20,
        random_state: int = 0,
        variable: str = "activation",
    ) -> xr.Dataset:
        """Linear CKA between layers or shifts, of this Dataset or with another one.

        ``cka(layer, other_layer)``, with floors of shuffled images. See
        :func:`vitxr.analysis.cka`.
        """
        from vitxr.analysis import cka

        return cka(self._ds, other, across, unbiased, batch_size, shuffles, random_state, variable)

    def rsa(
        self,
        other: xr.Dataset | None = None,
        across: Literal["layer", "shift"] = "layer",
        metric: Literal["correlation", "euclidean"] = "correlation",
        shuffles: int = 20,
        random_state: int = 0,
        variable: str = "activation",
    ) -> xr.Dataset:
        """Rank correlation of dissimilarities between images, between layers or shifts.

        ``rsa(layer, other_layer)``, with floors of shuffled images. See
        :func:`vitxr.analysis.rsa`.
        """
        from vitxr.analysis import rsa

        return rsa(self._ds, other, across, metric, shuffles, random_state, variable)

    def rdm(
        self,
        metric: Literal["correlation", "euclidean"] = "correlation",
        variable: str = "activation",
    ) -> xr.DataArray:
        """Dissimilarities between images, (image, shift_y, shift_x, layer, other_image).

        See :func:`vitxr.analysis.rdm`.
        """
        from vitxr.analysis import rdm

        return rdm(self._ds, metric, variable)

    def map_table(
        self, shuffles: int = 100, random_state: int = 0, variable: str = "activation"
    ) -> xr.Dataset:
        """What each feature map cares about: sparseness, image, shift, class.

        All (layer, feature_map); ``.to_dataframe()`` sorts and filters. See
        :func:`vitxr.analysis.map_table`.
        """
        from vitxr.analysis import map_table

        return map_table(self._ds, shuffles, random_state, variable)

    def class_activity(self, variable: str = "activation") -> xr.DataArray:
        """Mean activity of each map for each class, (layer, feature_map, label). Lazy.

        See :func:`vitxr.analysis.class_activity`.
        """
        from vitxr.analysis import class_activity

        return class_activity(self._ds, variable)

    def population_sparseness(self, variable: str = "activation") -> xr.DataArray:
        """How few of a layer's maps are active for a frame, (image, shift_y, shift_x, layer). Lazy.

        See :func:`vitxr.analysis.population_sparseness`.
        """
        from vitxr.analysis import population_sparseness

        return population_sparseness(self._ds, variable)

    def embed(
        self,
        n_components: int = 10,
        method: str = "pca",
        dim: str = "neuron",
        random_state: int = 0,
        **options: Any,
    ) -> xr.Dataset:
        """Embed the rows of a factor: ``score(neuron, pc)`` on at most ``n_components`` axes.

        ``method``: "pca" (with the explained variance), "diffusion", "isomap", "spectral",
        "tsne" or "umap". Columns have unit norm; weights do not count. See
        :func:`vitxr.analysis.embed`.
        """
        from vitxr.analysis import embed

        return embed(self._ds, n_components, method, dim, random_state, **options)

    def project(self, new: xr.Dataset) -> xr.Dataset:
        """Place the rows of new factors on this embedding (PCA, diffusion maps, Isomap).

        See :func:`vitxr.analysis.project`.
        """
        from vitxr.analysis import project

        return project(self._ds, new)

    def local_dimension(self, n_neighbors: int = 20, dim: str = "neuron") -> xr.Dataset:
        """Estimate the dimension of the manifold, around each neuron and of all.

        See :func:`vitxr.analysis.local_dimension`.
        """
        from vitxr.analysis import local_dimension

        return local_dimension(self._ds, n_neighbors, dim)

    def spatial_order(self, n_permutations: int = 999, random_state: int = 0) -> xr.Dataset:
        """Correlate distances on the patch grid and on the manifold, by feature map.

        See :func:`vitxr.analysis.spatial_order`.
        """
        from vitxr.analysis import spatial_order

        return spatial_order(self._ds, n_permutations, random_state)

    def cluster(self, n_clusters: int, dim: str = "neuron", random_state: int = 0) -> xr.Dataset:
        """Divide neurons into clusters by k-means: the coordinate ``cluster(neuron)``.

        See :func:`vitxr.analysis.cluster`.
        """
        from vitxr.analysis import cluster

        return cluster(self._ds, n_clusters, dim, random_state)

    def reconstruct(self, components: Hashable | Sequence[Hashable] = None) -> xr.DataArray:
        """Multiply out a model of factors, lazily, with the tensor's dims and labels.

        ``components`` are labels of those to add up, all by default. See
        :func:`vitxr.factor.reconstruct`.
        """
        from vitxr.factor import reconstruct

        return reconstruct(self._ds, components)

    def explained(self, t: xr.DataArray, mask: xr.DataArray | None = None) -> xr.Dataset:
        """How much of a tensor a model explains: in all, along each dim, by each component.

        ``r2``, ``neuron_r2(neuron)``, ..., ``component_share(component)``, ... ``mask`` is True
        where a value is observed. See :func:`vitxr.factor.explained`.
        """
        from vitxr.factor import explained

        return explained(self._ds, t, mask)

    def transform(
        self,
        t: xr.DataArray,
        dim: str | None = None,
        nonnegative: bool | None = None,
        mask: xr.DataArray | None = None,
    ) -> xr.Dataset:
        """Find where new images, shifts or neurons lie in a model; its other factors are fixed.

        ``dim`` is told by the labels that are new; ``mask`` is True where a value is observed. See
        :func:`vitxr.factor.transform`.
        """
        from vitxr.factor import transform

        return transform(self._ds, t, dim, nonnegative, mask)

    def to_tensorly(self, labelled: bool = False) -> Any:
        """Convert a model to a tensorly CPTensor or TuckerTensor.

        ``labelled=True`` gives factors as DataFrames, which is what tlviz takes. See
        :func:`vitxr.factor.to_tensorly`.
        """
        from vitxr.factor import to_tensorly

        return to_tensorly(self._ds, labelled)

    def attention_map(self, query: str | tuple[int, int] = "class") -> xr.DataArray:
        """Lay the attention of one token out on the patch grid, per layer and head.

        ``query``: (row, col) of a patch, or a prefix token's name. See
        :func:`vitxr.analysis.attention_map`.
        """
        from vitxr.analysis import attention_map

        return attention_map(self._ds, query)

    def attention_rollout(
        self,
        query: str | tuple[int, int] | None = "class",
        fusion: Literal["mean", "max", "min"] = "mean",
        residual: float = 0.5,
    ) -> xr.DataArray:
        """Trace attention through the layers (Abnar & Zuidema 2020).

        See :func:`vitxr.analysis.attention_rollout`.
        """
        from vitxr.analysis import attention_rollout

        return attention_rollout(self._ds, query, fusion, residual)

    def attention_distance(self, unit: Literal["px", "patch"] = "px") -> xr.DataArray:
        """Compute the mean distance over which each head attends.

        See :func:`vitxr.analysis.attention_distance`.
        """
        from vitxr.analysis import attention_distance

        return attention_distance(self._ds, unit)

    def attention_entropy(self) -> xr.DataArray:
        """Compute the mean entropy of each head's attention, nats.

        See :func:`vitxr.analysis.attention_entropy`.
        """
        from vitxr.analysis import attention_entropy

        return attention_entropy(self._ds)


@xr.register_dataarray_accessor("vit")
class VitArray(_Hints):
    """Methods on a neuron tensor or matrix, and on maps of the patch grid."""

    def __init__(self, array: xr.DataArray):
        self._array = array

    def factorize(
        self,
        rank: int | Sequence[int],
        method: str = "ncp_hals",
        random_state: int = 0,
        tol: float = 1e-5,
        max_iter: int = 500,
        progress: bool = True,
        **options: Any,
    ) -> xr.Dataset:
        """Factorize into labelled factors, by nonnegative CP unless told otherwise.

        ``neuron_factor(neuron, component)``, ``image_factor``, ``shift_factor`` of unit
        norm, ``weight(component)`` in descending order, ``objective`` the relative
        residual. ``method``: "ncp_hals", or a tensorly decomposition by its function's
        name, to which ``options`` go. See :func:`vitxr.factor.factorize`.
        """
        from vitxr.factor import factorize

        return factorize(
            self._array, rank, method, random_state, tol, max_iter, progress, **options
        )

    def fit_ensemble(
        self,
        ranks: Sequence[int],
        replicates: int = 3,
        method: str = "ncp_hals",
        random_state: int = 0,
        tol: float = 1e-5,
        max_iter: int = 500,
        progress: bool = True,
        resume: xr.DataTree | None = None,
        floors: bool = False,
        **options: Any,
    ) -> xr.DataTree:
        """Fit CP models of several ranks from several seeds each.

        The root holds ``objective(rank, replicate)`` and ``similarity(rank, replicate)``;
        ``tree.vit.best(rank)`` are the best replicate's factors. ``resume``: an ensemble whose
        fits are kept; ``floors``: fit shuffled data as well. See
        :func:`vitxr.factor.fit_ensemble`.
        """
        from vitxr.factor import fit_ensemble

        given = (ranks, replicates, method, random_state, tol, max_iter, progress, resume, floors)
        return fit_ensemble(self._array, *given, **options)

    def choose_rank(
        self,
        ranks: Sequence[int],
        replicates: int = 3,
        splits: int = 3,
        method: str = "ncp_hals",
        random_state: int = 0,
        tol: float = 1e-5,
        max_iter: int = 500,
        progress: bool = True,
        **options: Any,
    ) -> xr.Dataset:
        """Compare ranks by every criterion, each with what shuffled data give.

        ``objective``, ``similarity``, ``core_consistency`` (rank, replicate),
        ``split_half_score`` (rank, split), and ``shuffled_objective`` etc. See
        :func:`vitxr.factor.choose_rank`.
        """
        from vitxr.factor import choose_rank

        given = (ranks, replicates, splits, method, random_state, tol, max_iter, progress)
        return choose_rank(self._array, *given, **options)

    def core_consistency(self, factors: xr.Dataset) -> float:
        """Core consistency of a CP model of this tensor, in percent.

        See :func:`vitxr.factor.core_consistency`.
        """
        from vitxr.factor import core_consistency

        return core_consistency(self._array, factors)

    def factorize_aligned(
        self, rank: int, random_state: int = 0, tol: float = 1e-5, max_iter: int = 2000
    ) -> xr.Dataset:
        """Fit nonnegative CP to responses rolled on the shift lattice to where they fit it best.

        Factors as of :meth:`factorize`, and ``roll_y(neuron, image)``, ``roll_x``. See
        :func:`vitxr.factor.factorize_aligned`.
        """
        from vitxr.factor import factorize_aligned

        return factorize_aligned(self._array, rank, random_state, tol, max_iter)

    def smooth(
        self,
        sigma: float | tuple[float, float] = 1.0,
        mode: Literal["wrap", "reflect"] | None = None,
    ) -> xr.DataArray:
        """Smooth every response by a Gaussian over the shift lattice, lazily.

        ``sigma`` in lattice steps; around the edge where the lattice closes. See
        :func:`vitxr.factor.smooth`.
        """
        from vitxr.factor import smooth

        return smooth(self._array, sigma, mode)

    def to_mat(self, path: str | Path) -> Path:
        """Write a MATLAB file with the original notebook's variable names.

        See :func:`vitxr.matlab.to_mat`.
        """
        from vitxr.matlab import to_mat

        return to_mat(self._array, path)

    def sample_neurons(
        self, n: int, feature_maps: int | None = None, random_state: int = 0
    ) -> xr.DataArray:
        """Draw neurons by their activity: feature maps first, then neurons within them.

        See :func:`vitxr.analysis.sample_neurons`.
        """
        from vitxr.analysis import sample_neurons

        return sample_neurons(self._array, n, feature_maps, random_state)

    def mass_mask(self, mass: float = 0.6) -> xr.DataArray:
        """Keep the fewest patches that hold a share of a map's mass.

        See :func:`vitxr.analysis.mass_mask`.
        """
        from vitxr.analysis import mass_mask

        return mass_mask(self._array, mass)


@xr.register_datatree_accessor("vit")
class VitTree(_Hints):
    """Methods on an ensemble of factorizations."""

    def __init__(self, tree: xr.DataTree):
        self._tree = tree

    def best(self, rank: int) -> xr.Dataset:
        """Take the factors of the replicate of least objective.

        See :func:`vitxr.factor.best`.
        """
        from vitxr.factor import best

        return best(self._tree, rank)
