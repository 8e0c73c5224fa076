"""The pass over a tensor before its fit: values that cannot be fitted, the norm of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import DataError
from vitxr.factor import blocks
from vitxr.factor.masks import Masked
from vitxr.factor.same import label_at
from vitxr.factor.words import fingerprint, places
from vitxr.names import unwritten

__all__ = ["scan"]

Array = npt.NDArray[Any]


def scan(
    t: xr.DataArray, data: Any, mask: Any, method: str, nonnegative: bool, maskable: bool
) -> tuple[float, int, str]:
    """Check the values that count, in one pass.

    Parameters
    ----------
    t
        The tensor, for its labels.
    data
        Its values as they are fitted, float, NumPy or Dask.
    mask
        Entries that count, bool, of the same shape; None where all do.
    method
        For the remedies.
    nonnegative
        Whether negative values are refused.
    maskable
        Whether a mask may be given, for the remedies.

    Returns
    -------
    float
        The sum of their squares.
    int
        How many there are.
    str
        The mask in words: sizes, how many entries count, and a fingerprint of which, the same for
        all chunks and orders of dims. Nothing without one.

    Raises
    ------
    DataError
        If a value is not finite or negative, chunks would fill the memory, or the mask hides all
        of a label.

    Examples
    --------
    >>> t = xr.DataArray([[3.0, 4.0]], dims=("neuron", "image"))
    >>> scan(t, t.values, None, "ncp_hals", nonnegative=True, maskable=True)
    (25.0, 2, '')
    """
    mode = blocks.blocked_mode(data) if hasattr(data, "chunks") else 0
    walked = blocks.rotate(data, mode)
    if hasattr(walked, "chunks"):
        _check_chunks(t, mode, blocks.slab_bytes(walked))
    masked = None if mask is None else Masked(walked, mask, mode)
    if masked is None:
        walked = blocks.ready(walked)
    rows = blocks.block_rows(walked.shape, data.itemsize)
    down = np.zeros(walked.shape[0], np.int64)
    dims = sorted(map(str, t.dims))
    steps = [math.prod(t.sizes[d] for d in dims[dims.index(str(dim)) + 1 :]) for dim in t.dims]
    at = places(walked.shape, steps, mode) if masked is not None else None

    def look(share: blocks.Share) -> tuple[float, Array, int]:
        square, across, mark = 0.0, np.zeros(walked.shape[1:], np.int64), 0
        for where, block, kept in _walk(walked, masked, rows, share):
            part = blocks.squares(block)
            if not math.isfinite(part):
                remedy = "drop or fill it"
                if maskable:
                    remedy += ", or hide it with mask=t.notnull() (infinite ones with "
                    remedy += "np.isfinite(t))"
                remedy += unwritten(t)
                _refuse(t, mode, where.start, ~np.isfinite(block), block, "non-finite", remedy)
            if nonnegative and block.min() < 0:
                remedy = "rectify the tensor, or use parafac or tucker"
                if method == "ncp_hals":
                    remedy += ", or name the dimensions to be kept nonnegative, if any: "
                    remedy += "nonnegative=()"
                remedy = f"{method} cannot fit it: {remedy}"
                _refuse(t, mode, where.start, block < 0, block, "negative", remedy)
            square += part
            if kept is not None and at is not None:
                down[where] = kept.sum(axis=1)
                across += kept.sum(axis=0).reshape(across.shape)
                mark += fingerprint(at[0][where], at[1], kept)
        return square, across, mark

    with blocks.own_threads() as pool:  # the error of the first share is the one that comes out
        found = pool.map(look, blocks.shares(walked, rows, pool.threads))
    square, across, mark = (sum(parts) for parts in zip(*found, strict=True))
    if masked is None:
        return square, t.size, ""
    _check_hidden(t, mode, down, across)
    count = int(down.sum())
    sizes = ", ".join(f"{d}: {t.sizes[d]}" for d in dims)
    said = f"({sizes}), {count} of {t.size} True, fingerprint {mark % 2**64:016x}"
    return square, count, said


def _walk(
    walked: Any, masked: Masked | None, rows: int, share: blocks.Share
) -> Iterator[tuple[slice, Array, Array | None]]:
    """Walk over a tensor; what a mask hides is 0."""
    if masked is None:
        for where, block in blocks.row_blocks(walked, rows, share):
            yield where, block, None
    else:
        for where, block, kept, _ in masked.walk(rows, share):
            yield where, np.where(kept, block, block.dtype.type(0)), kept


def _check_hidden(t: xr.DataArray, mode: int, down: Array, across: Array) -> None:
    """Refuse a mask that hides a whole slice of a dimension, by its labels."""
    for i in range(t.ndim):
        dim = t.dims[(mode + i) % t.ndim]
        others = tuple(k for k in range(t.ndim - 1) if k != i - 1)
        hidden = np.flatnonzero((down if i == 0 else across.sum(axis=others)) == 0)
        if len(hidden):
            names = ", ".join(label_at(t, dim, place) for place in hidden[:3])
            more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
            raise DataError(
                f"the mask hides all of {names}{more}, of which nothing could be said: leave "
                f"{'it' if len(hidden) == 1 else 'them'} out of the tensor, t.drop_isel({dim}=...)."
            )


def _check_chunks(t: xr.DataArray, mode: int, slab: int) -> None:
    """Refuse chunks of which none can be read by itself without filling the memory."""
    if blocks.COPIES * slab <= blocks.MEMORY_BYTES:
        return
    dim = t.dims[mode]
    size = max(1, blocks.MEMORY_BYTES * t.sizes[dim] // (2 * blocks.COPIES * t.nbytes))
    raise DataError(
        f"the tensor is in chunks of which {slab / 1e9:.3g} GB have to be in memory at a time "
        f"(one of {dim}, with all beside it), more than the {blocks.MEMORY_BYTES / 1e9:.3g} GB "
        f"for {blocks.COPIES} copies of it: rechunk it, t.chunk({dim}={size}), and store it so."
    )


def _refuse(
    t: xr.DataArray, mode: int, start: int, bad: Array, block: Array, what: str, remedy: str
) -> None:
    """Raise a DataError that names the first bad entry by its labels; return if none is bad.

    The block is one of the unfolding along a mode, with the others behind it in cyclic order.
    """
    where = np.argwhere(bad)
    if not len(where):
        return
    row, column = where[0]
    behind = t.shape[mode + 1 :] + t.shape[:mode]
    turned = (start + row, *np.unravel_index(column, behind))
    index = [turned[(m - mode) % t.ndim] for m in range(t.ndim)]
    labels = [label_at(t, dim, i) for dim, i in zip(t.dims, index, strict=True)]
    raise DataError(
        f"the tensor holds a {what} value, {block[row, column]}, at {', '.join(labels)}; {remedy}."
    )
