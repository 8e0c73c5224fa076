"""Gram matrices of arrays larger than memory: what is read together, and in how many parts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.analysis._blas import one_thread
from vitxr.analysis._grams import gram
from vitxr.errors import ArgumentError

__all__ = ["blocks", "fit", "grams", "groups", "room_for"]

Array = npt.NDArray[Any]
Block = tuple[slice, slice]

#: Bytes of activations that a task holds: some shifts of some images, layers and feature maps.
_BLOCK_BYTES = 96 << 20
#: Bytes that it may hold instead where less would cut through a Dask chunk, which is then made
#: several times: read again, or, of an extraction without a store, run through the model again.
_CHUNK_BYTES = 256 << 20
#: Bytes that matrices between images may take at a time.
_GRAM_BYTES = 1 << 30
#: Sums over feature maps that are added up at a time.
_AT_A_TIME = 8


def groups(arrays: Sequence[xr.DataArray], parts: Sequence[Array]) -> list[range]:
    """Take batches together whose images fill Dask chunks within the memory allowed; at best all.

    A chunk may hold images of many batches.
    """
    images, lazy = sum(map(len, parts)), [x for x in arrays if x.chunks]
    chunk = max((_frame(x) * math.prod(_chunk(x)) for x in lazy), default=0)
    if images * chunk <= _CHUNK_BYTES:
        return [range(len(parts))]
    many = max(1, _BLOCK_BYTES // chunk // len(parts[0]))
    return [range(i, min(i + many, len(parts))) for i in range(0, len(parts), many)]


def blocks(arrays: Sequence[xr.DataArray], images: Sequence[int]) -> list[Block]:
    """Cut the shift lattice into blocks, rows first, that hold few bytes for batches of images."""
    height, width = arrays[0].shape[1:3]
    lazy = [x for x in arrays if x.chunks]
    most, tall, wide = height * width, 1, 1
    for x in lazy:
        frame, (high, broad) = sum(images) * _frame(x), _chunk(x)
        whole = high * broad
        room = _BLOCK_BYTES // frame
        if room < whole and whole * frame <= _CHUNK_BYTES:
            room = whole
        most, tall, wide = min(most, room), max(tall, high), max(wide, broad)
    matrices = max(x.sizes["layer"] for x in arrays) * sum(n * (n + 1) * 8 for n in images)
    most = max(1, min(most, _GRAM_BYTES // 4 // matrices))
    if most < tall * wide:
        rows, columns = max(1, most // width), min(width, most)
    else:
        columns = min(width, most // tall)
        rows = min(height, most // width) if columns == width else tall
    ends = [_ends(lazy, d) for d in ("shift_y", "shift_x")]
    return list(itertools.product(_cut(height, rows, ends[0]), _cut(width, columns, ends[1])))


def _ends(arrays: Sequence[xr.DataArray], dim: str) -> set[int]:
    """Where chunks of all of them end."""
    of_each = [set(itertools.accumulate(x.chunksizes[dim])) for x in arrays]
    return set.intersection(*of_each) if of_each else set()


def _cut(size: int, most: int, ends: set[int]) -> list[slice]:
    """Cut where chunks end, if one does within reach, and else as late as may be."""
    out, start = [], 0
    while start < size:
        stop = min(start + most, size)
        stop = max((e for e in ends if start < e <= stop), default=stop)
        out.append(slice(start, stop))
        start = stop
    return out


def _chunk(x: xr.DataArray) -> tuple[int, int]:
    """Shifts of a Dask chunk."""
    return max(x.chunksizes["shift_y"]), max(x.chunksizes["shift_x"])


def _frame(x: xr.DataArray) -> int:
    """Bytes that a Dask chunk has of a frame."""
    whole = x.sizes["patch_row"] * x.sizes["patch_col"] * x.dtype.itemsize
    return math.prod(max(x.chunksizes[d]) for d in ("layer", "feature_map")) * whole


def room_for(matrices: int, images: int, remedy: str) -> None:
    """Refuse what would take more memory than it may."""
    size = matrices * images**2 * 8
    if size > _GRAM_BYTES:
        raise ArgumentError(
            f"{matrices} matrices between {images} images take {size / 1e9:.1f} GB in memory, more "
            f"than the {_GRAM_BYTES / 1e9:.1f} GB that vitxr allows: {remedy}."
        )


def fit(matrices: int, images: int) -> int:
    """How often so many matrices fit."""
    return _GRAM_BYTES // (matrices * images**2 * 8)


def grams(
    x: xr.DataArray, parts: Sequence[Array], block: Block, dtype: Any, sums: bool = False
) -> list[Array]:
    """Compute :func:`vitxr.analysis._grams.gram` of batches of images and a block of shifts.

    Of Dask, nothing but these images and shifts is read, each chunk once.
    """
    if x.chunks is None:
        return [gram([x.values[i, *block] for i in images], dtype, sums) for images in parts]
    import dask

    data = x.variable.chunk({"patch_row": -1, "patch_col": -1}).data
    # (shift_y, shift_x, layer, map) blocks of some images each; where an image is.
    pieces: list[Any] = []
    where: dict[int, tuple[int, int]] = {}
    images = np.unique(np.concatenate(parts))
    for run in np.split(images, np.flatnonzero(np.diff(images) > 1) + 1):
        # What is selected reaches the reader, which reads no more than that.
        part = data[run[0] : run[-1] + 1, *block]
        at = iter(run.tolist())
        for piece, size in zip(part.to_delayed()[..., 0, 0], part.chunks[0], strict=True):
            where.update({next(at): (len(pieces), k) for k in range(size)})
            pieces.append(piece)
    kernel = functools.partial(
        _grams_of_blocks,
        where=[[where[i] for i in p.tolist()] for p in parts],
        dtype=dtype,
        sums=sums,
    )
    of_blocks, added = dask.delayed(kernel, pure=False), dask.delayed(_added, pure=False)
    wanted = []
    for layer in range(pieces[0].shape[2]):
        tasks = [
            of_blocks([p[:, :, layer, maps].tolist() for p in pieces])
            for maps in range(pieces[0].shape[3])
        ]
        # A few at a time: of all feature maps matrices of many images would not fit in memory.
        while len(tasks) > 1:
            tasks = [added(tasks[i : i + _AT_A_TIME]) for i in range(0, len(tasks), _AT_A_TIME)]
        wanted += tasks
    with one_thread():  # Dask has its own threads
        found = dask.compute(*wanted)
    return [np.concatenate(of_layers) for of_layers in zip(*found, strict=True)]


def _grams_of_blocks(
    pieces: list[list[list[Array]]], where: list[list[tuple[int, int]]], dtype: Any, sums: bool
) -> list[Array]:
    """Compute the Gram matrices of batches, of images whose shifts come in blocks."""
    whole = [
        rows[0][0]
        if len(rows) == len(rows[0]) == 1
        else np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)
        for rows in pieces
    ]
    return [gram([whole[piece][k] for piece, k in images], dtype, sums) for images in where]


def _added(grams_of: list[list[Array]]) -> list[Array]:
    first, *others = grams_of
    for other in others:
        first = [a + b for a, b in zip(first, other, strict=True)]
    return first
