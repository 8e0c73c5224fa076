"""Two sets of representations compared: matrices of each, sums over batches, labelled results."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._pairs import Across
from vitxr.analysis._walk import blocks, fit, grams, groups, room_for
from vitxr.errors import ArgumentError
from vitxr.names import SHIFT, VARIABLES, provenance

__all__ = ["QUANTILE", "check_counts", "compared", "labelled"]

Array = npt.NDArray[Any]
#: From matrices of both, (of x, part, image, image) each, and the number of a batch: what is added
#: up over batches and blocks.
Kernel = Callable[[Array, Array, int], Sequence[Array]]

#: Share of the shuffled similarities that lie below the upper floor. Weibull's
#: positions, i / (n + 1), so that one more shuffle lies above with the chance that is left.
QUANTILE = 0.95


def compared(
    arrays: list[xr.DataArray],
    orders: list[Array],
    parts: list[Array],
    across: Across,
    dtype: Any,
    kernel: Kernel,
    sums: bool,
    remedy: str,
) -> list[Array]:
    """Add up a kernel's values over batches of images.

    Across layers, matrices are of layers and the parts are shifts, a block at a time. Across
    shifts, of all shifts of one layer, with one part.

    Parameters
    ----------
    arrays, orders, parts, dtype, sums
        Frames with all dims, NumPy or Dask; where each has the images; batches of images; as of
        :func:`vitxr.analysis._grams.gram`.
    across
        What is compared.
    kernel
        Values of a batch.
    remedy
        What to do if matrices do not fit in memory.

    Returns
    -------
    list of numpy.ndarray
        For each value of the kernel: across layers its sum; across shifts the same of each layer,
        along a new first axis.
    """
    if across == "layer":
        of_blocks = _of_blocks(arrays, orders, parts, dtype, sums)
        return _added(kernel(x, y, g) for g, (x, y) in of_blocks)
    # Of all shifts, and as they are centred a second time.
    matrices, images = 2 * sum(x.shape[1] * x.shape[2] for x in arrays), len(parts[0])
    room_for(matrices, images, remedy)
    # All layers and batches at once, if they fit: of an extraction without a store the model
    # computes them all together.
    some, layers = fit(matrices * len(parts), images), arrays[0].sizes["layer"]
    sets = groups(arrays, parts) if some else [range(g, g + 1) for g in range(len(parts))]
    some = some or fit(matrices, images)
    out: list[list[Array]] = []
    for first in range(0, layers, some):
        of = [x.isel(layer=slice(first, first + some)) for x in arrays]
        each: list[list[Sequence[Array]]] = [[] for _ in range(of[0].sizes["layer"])]
        for group in sets:
            found = [
                _of_lattice(x, [order[parts[g]] for g in group], dtype, sums)
                for x, order in zip(of[: _distinct(arrays)], orders, strict=False)
            ]
            for g, x, y in zip(group, found[0], found[-1], strict=True):
                for layer, values in enumerate(each):
                    values.append(kernel(x[layer][:, None], y[layer][:, None], g))
        out += [_added(values) for values in each]
    return [np.stack(values) for values in zip(*out, strict=True)]


def _distinct(arrays: list[xr.DataArray]) -> int:
    """One array that is compared with itself is read once."""
    return 1 if arrays[0] is arrays[1] else 2


def _added(values: Any) -> list[Array]:
    total: list[Any] = []
    for each in values:
        total = [a + b for a, b in zip(total, each, strict=True)] if total else list(each)
    return total


def _of_blocks(
    arrays: list[xr.DataArray], orders: list[Array], parts: list[Array], dtype: Any, sums: bool
) -> Iterator[tuple[int, tuple[Array, Array]]]:
    """Take the matrices of one batch and some shifts, (layer, frame, image, image)."""
    for group in groups(arrays, parts):
        for block in blocks(arrays, [len(parts[g]) for g in group]):
            found = [
                grams(x, [order[parts[g]] for g in group], block, dtype, sums)
                for x, order in zip(arrays[: _distinct(arrays)], orders, strict=False)
            ]
            yield from zip(group, zip(found[0], found[-1], strict=True), strict=True)


def _of_lattice(x: xr.DataArray, images: list[Array], dtype: Any, sums: bool) -> list[Array]:
    """Compute the matrices of batches and all shifts, (layer, frame, image, image) each."""
    height, width, layers = x.shape[1:4]
    out = [np.empty((layers, height, width, len(i), len(i) + sums)) for i in images]
    for block in blocks([x], [len(i) for i in images]):
        for into, k in zip(out, grams(x, images, block, dtype, sums), strict=True):
            here = into[:, *block]
            here[:] = k.reshape(here.shape)
    return [k.reshape(layers, height * width, *k.shape[-2:]) for k in out]


def labelled(
    name: str,
    found: Array,
    shuffled: Array,
    arrays: list[xr.DataArray],
    across: Across,
    sources: tuple[xr.Dataset, xr.Dataset],
    attrs: dict[str, Any],
) -> xr.Dataset:
    """Give similarities and those of shuffled images their labels.

    Parameters
    ----------
    name
        Of the similarity.
    found
        (layer, other), or (layer, shift, other shift).
    shuffled
        The same, with permutations along the first axis.
    arrays, across, sources
        What was compared.
    attrs
        Of the result.
    """
    dims: tuple[str, ...] = ("layer", "other_layer")
    if across == "shift":
        sizes = [x.sizes[d] for x in arrays for d in SHIFT]
        found = np.moveaxis(found.reshape(-1, *sizes), 0, 2)
        shuffled = np.moveaxis(shuffled.reshape(*shuffled.shape[:2], *sizes), 1, 3)
        dims = (*SHIFT, "layer", *(f"other_{d}" for d in SHIFT))
    coords: dict[str, Any] = {}
    for x, prefix in zip(arrays, ("", "other_"), strict=True):
        for key, c in x.coords.items():
            here = tuple(prefix + str(d) for d in c.dims)
            if here and set(here) <= set(dims) and (not prefix or key in c.dims):
                coords[prefix + str(key)] = (here, c.values, c.attrs)
    out = xr.Dataset(coords=coords)
    for key, values in (
        (name, found),
        (f"{name}_floor_mean", shuffled.mean(axis=0)),
        (f"{name}_floor_quantile", np.quantile(shuffled, QUANTILE, axis=0, method="weibull")),
    ):
        out[key] = (dims, values, VARIABLES[key].attrs)
    mine, theirs = (provenance(ds.attrs) for ds in sources)
    theirs = {f"other_{key}": value for key, value in theirs.items()}
    out.attrs = {**mine, **theirs, **attrs, "quantile": QUANTILE}
    return out


def check_counts(**counts: tuple[Any, int]) -> None:
    """Refuse what is not an integer of at least so much."""
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ArgumentError(f"{name}={value!r}: expected an integer of {least} or more.")
