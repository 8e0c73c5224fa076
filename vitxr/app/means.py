"""Mean responses of neurons, read once, so that a selection needs no more than memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import DataError
from vitxr.memory import available
from vitxr.names import NEURON

__all__ = ["Means", "means"]

Array = npt.NDArray[np.float32]
#: Rows added up in float32 before they go on in float64.
_BLOCK = 2048


@dataclass(frozen=True)
class Means:
    """Responses of neurons, averaged over shifts and over images.

    Attributes
    ----------
    by_image
        (neuron, image), mean over shifts.
    by_shift
        (neuron, shift), mean over images.
    overall
        (neuron,), mean over both.
    """

    by_image: Array
    by_shift: Array
    overall: Array

    def of(self, mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], ...]:
        """Mean over the selected neurons: for each image, and for each shift.

        NaN where none is selected.

        Examples
        --------
        >>> two = np.float32([[1, 3], [5, 7]])
        >>> [v.tolist() for v in Means(two, two, two.mean(1)).of(np.array([False, True]))]
        [[5.0, 7.0], [5.0, 7.0]]
        """
        at = np.flatnonzero(mask)
        rest = np.flatnonzero(~mask)
        both = (self.by_image, self.by_shift)
        # What is not finite cannot be subtracted again.
        if 2 * at.size <= mask.size or not all(np.isfinite(t).all() for t in self.totals):
            return tuple(
                _sum(values, at) / at.size if at.size else _none(values) for values in both
            )
        # Of most of them: the sum of all less that of the others.
        return tuple(
            (whole - _sum(values, rest)) / at.size
            for values, whole in zip(both, self.totals, strict=True)
        )

    @functools.cached_property
    def totals(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Sums over all neurons."""
        return tuple(_sum(v, np.arange(len(v))) for v in (self.by_image, self.by_shift))


def _none(values: Array) -> npt.NDArray[np.float64]:
    return np.full(values.shape[1], np.nan)


def _sum(values: Array, at: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Sum of some rows: blocks in float32, their sums in float64."""
    total = np.zeros(values.shape[1])
    for start in range(0, at.size, _BLOCK):
        part = at[start : start + _BLOCK]
        total += np.ones(part.size, np.float32) @ values[part]
    return total


def means(
    ds: xr.Dataset, layer: int, neurons: xr.Dataset, tell: Callable[[int, int], None] | None = None
) -> Means:
    """Read the responses of neurons, an image at a time, and average them.

    Parameters
    ----------
    ds
        The extraction.
    layer
        Of the neurons.
    neurons
        Their labels; the attributes ``rectify``, ``normalize`` and ``drop_edge`` say how their
        responses are made, as for :func:`vitxr.tensors.neuron_tensor`, whose defaults stand
        where they are missing.
    tell
        Called with the images that were read, and how many there are.

    Raises
    ------
    DataError
        If the means, or the responses to one image, do not fit into a quarter of the memory
        that is available; or the neurons are not those of such a tensor.
    """
    from vitxr.tensors import neuron_tensor

    maps = list(dict.fromkeys(int(v) for v in neurons["feature_map"].values))
    options: dict[str, Any] = {"drop_edge": int(neurons.attrs.get("drop_edge", 0))}
    flags = (k for k in ("rectify", "normalize") if k in neurons.attrs)
    options |= {k: bool(neurons.attrs[k]) for k in flags}
    images, count = ds.sizes["image"], neurons.sizes["neuron"]
    shifts = ds.sizes.get("shift_y", 1) * ds.sizes.get("shift_x", 1)
    _guard(count, images, shifts)
    by_image = np.empty((count, images), np.float32)
    by_shift = np.zeros((count, shifts), np.float32)
    variable = str(neurons.attrs.get("variable", "activation"))
    for i in range(images):
        one = ds.isel(image=[i])
        t = neuron_tensor(one, layer, maps, variable=variable, **options)
        if t.sizes["neuron"] != count or any(
            (t[n].values != neurons[n].values).any() for n in NEURON
        ):
            raise DataError(
                f"the {count} neurons of the factors are not those of the store's tensor of "
                f"block {layer}, which has {t.sizes['neuron']}: rows were left out or reordered. "
                "Give factors of ds.vit.neuron_tensor."
            )
        values = t.isel(image=0).values
        by_image[:, i] = values.mean(axis=1, dtype=np.float64)
        by_shift += values / images
        if tell is not None:
            tell(i + 1, images)
    return Means(by_image, by_shift, by_image.mean(axis=1))


def _guard(neurons: int, images: int, shifts: int) -> None:
    need = 4 * neurons * (images + shifts) + 12 * neurons * shifts
    have = (available() or need * 4) // 4
    if need > have:
        raise DataError(
            f"the responses of {neurons:,} neurons to {images:,} images and {shifts:,} shifts need "
            f"{need / 1e9:.1f} GB, and {have / 1e9:.1f} GB may be used (a quarter of what is "
            "available). Factorize fewer feature maps, or browse where there is more memory."
        )
