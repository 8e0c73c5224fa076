"""Reading an array of a store: the chunks that a selection needs, checked, and no others.

Dask cuts the reads; this module does them, some five times as fast as zarr does for
chunks of this size. A shard that is missing, cut short or altered raises.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import StoreError
from vitxr.names import unit_dims
from vitxr.store.location import Location
from vitxr.store.shards import Shards

__all__ = ["ShardedArray", "lazy"]

Array = npt.NDArray[Any]

#: Shards that a process reads at a time.
_THREADS = 8
#: Bytes of a Dask chunk: with less, Dask's own work for each outweighs the reading.
_DASK_BYTES = 16_000_000

_local = threading.local()
_NONE = np.empty(0, np.uint8)


class ShardedArray:
    """An array on disk that can be indexed by integers, slices and arrays of integers.

    Parameters
    ----------
    location
        The store.
    shards
        Of the array.
    written
        What there is of an unfinished store, (image, shift_y); the rest is NaN and is not read.
        None if all is there.
    """

    def __init__(self, location: Location, shards: Shards, written: Array | None):
        self._location = location
        self._shards = shards
        self._written = written
        self.shape = shards.shape
        self.dtype = shards.dtype
        self.ndim = len(shards.shape)

    def __getitem__(self, key: tuple[int | slice | Array, ...]) -> Array:
        spans: list[slice] = []
        inside: list[int | slice | Array] = []
        for part, size in zip(key, self.shape, strict=True):
            if isinstance(part, slice):
                picked = np.arange(size)[part]
                inside.append(slice(None, None, part.step))
            else:
                picked = np.asarray(np.arange(size)[part])
                inside.append(picked - picked.min(initial=size))
            low = int(picked.min(initial=size))
            spans.append(slice(low, max(int(picked.max(initial=-1)) + 1, low)))
        block = self._read(spans)
        # Each axis by itself, the last one first, so that integers do not shift the others.
        for axis in range(self.ndim - 1, -1, -1):
            block = block[(slice(None),) * axis + (inside[axis],)]
        # A small part must not keep the whole alive.
        whole = block if block.base is None else block.base
        return block.copy() if getattr(whole, "nbytes", 0) > 2 * block.nbytes else block

    def _read(self, spans: list[slice]) -> Array:
        """Read a block."""
        shape = tuple(s.stop - s.start for s in spans)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        indices = list(itertools.product(*map(_covered, spans, self._shards.shard)))
        if (
            math.prod(len(_covered(*pair)) for pair in zip(spans, self._shards.chunk, strict=True))
            == 1
        ):
            # One chunk that holds all of the block need not be copied.
            return next(self._parts(indices[0], spans, None))[1]
        out = np.empty(shape, self.dtype)

        def fill(index: tuple[int, ...]) -> None:
            for where, values in self._parts(index, spans, _room(self._shards.most_of_chunk)):
                out[where] = values

        if len(indices) == 1:
            fill(indices[0])
        else:
            # Several at a time: a disk, and an object store even more, gives more that way.
            list(_pool().map(fill, indices))
        return out

    def _parts(
        self, index: tuple[int, ...], spans: list[slice], room: Array | None
    ) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """Read what a shard has of a block: where it goes in the block, and its values.

        With ``room`` the values may lie in it, and are overwritten by the next.
        """
        origin = [s.start for s in spans]
        for place, values in self._chunks(index, spans, room):
            # Where the chunk and the block overlap, seen from each of them.
            low = [max(p, s.start) for p, s in zip(place, spans, strict=True)]
            high = [
                min(p + n, s.stop) for p, n, s in zip(place, self._shards.chunk, spans, strict=True)
            ]
            inside = tuple(map(slice, _less(low, place), _less(high, place)))
            yield tuple(map(slice, _less(low, origin), _less(high, origin))), values[inside]

    def _chunks(
        self, index: tuple[int, ...], spans: list[slice], room: Array | None
    ) -> Iterator[tuple[list[int], Array]]:
        """Read the chunks of a shard that a block touches: where each begins, and its values."""
        shards = self._shards
        key = shards.key(index)
        origin = [i * n for i, n in zip(index, shards.shard, strict=True)]
        grid = [s // c for s, c in zip(shards.shard, shards.chunk, strict=True)]
        wanted = [
            _covered(slice(max(s.start - o, 0), min(s.stop - o, n)), c)
            for s, o, n, c in zip(spans, origin, shards.shard, shards.chunk, strict=True)
        ]
        places = {
            chunk: [o + k * c for o, k, c in zip(origin, chunk, shards.chunk, strict=True)]
            for chunk in itertools.product(*wanted)
        }
        if not self._is_written(origin):
            for place in places.values():
                yield place, np.full(shards.chunk, np.nan, self.dtype)
            return
        with self._location.opened(key, room) as file:
            if file is None:
                raise StoreError(self._damaged(key, "is missing"))
            try:
                # A copy: the next piece may be read into the same memory.
                entries = shards.decode_index(file(None, shards.index_bytes)).copy()
                for chunk, place in places.items():
                    at, size = entries[np.ravel_multi_index(chunk, grid)].tolist()
                    if max(at, size) > shards.most_bytes:
                        raise ValueError("has an index that makes no sense")
                    yield place, shards.decode(file(at, size))
            except ValueError as error:
                raise StoreError(self._damaged(key, str(error))) from error

    def _is_written(self, origin: list[int]) -> bool:
        at = dict(zip(self._shards.dims, origin, strict=True))
        return self._written is None or bool(self._written[at["image"], at.get("shift_y", 0)])

    def _damaged(self, key: str, what: str) -> str:
        return (
            f"the store {str(self._location)!r} is damaged: {key} {what}. vitxr.verify "
            "names all that is; with reset=True it takes them back, and the same extract, run "
            "again, writes them anew."
        )


def _room(size: int) -> Array | None:
    """Memory of this thread, used again for each chunk: fresh memory costs more than reading."""
    if size > _DASK_BYTES:
        return None
    if getattr(_local, "room", _NONE).size < size:
        _local.room = np.empty(size, np.uint8)
    room: Array = _local.room
    return room


@functools.cache
def _pool_of(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="vitxr-read")


def _pool() -> ThreadPoolExecutor:
    """Threads that read; a forked process has its own."""
    return _pool_of(os.getpid())


def _covered(span: slice, step: int) -> range:
    """Blocks of ``step`` that a span touches."""
    return range(span.start // step, math.ceil(span.stop / step))


def _less(a: list[int], b: list[int]) -> list[int]:
    return [x - y for x, y in zip(a, b, strict=True)]


def lazy(location: Location, shards: Shards, written: Array | None) -> Any:
    """Give an array of a store to Dask, in chunks of whole shards side by side.

    Along ``feature_map`` and the like they are chunks inside shards, because a few maps of many
    are what is read most. A selection reads no more than it needs, whatever the Dask chunks.
    """
    import dask.array as da

    sizes = dict(zip(shards.dims, shards.shard, strict=True))
    for dim in unit_dims(shards.dims):
        sizes[dim] = shards.chunk[shards.dims.index(dim)]
    for dim in ("shift_y", "image"):
        if dim in sizes:
            room = _DASK_BYTES // (math.prod(sizes.values()) * shards.dtype.itemsize)
            sizes[dim] = min(sizes[dim] * max(1, room), shards.shape[shards.dims.index(dim)])
    return da.from_array(
        ShardedArray(location, shards, written),
        chunks=tuple(sizes.values()),
        # A name of its own each time: one made of the plan would let a cache take what a unit
        # held before it was written anew for what it holds now, and one made of all records
        # would mean reading them all.
        name=False,
        asarray=False,
        meta=np.empty((0,) * len(sizes), shards.dtype),
    )
