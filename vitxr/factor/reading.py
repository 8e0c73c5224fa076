"""Reading a Dask array chunk by chunk along its first axis, in pass after pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Chunks", "ahead"]

Array = npt.NDArray[Any]
T = TypeVar("T")


class Chunks:
    """A Dask array of which whole chunks of the first axis are computed, any number of times.

    Its graph is optimized once. ``x[rows].compute()`` optimizes the graph of all chunks for each
    of them, in every pass: some milliseconds each, in which no other thread has the interpreter.

    Examples
    --------
    >>> import dask.array as da
    >>> chunks = Chunks(da.from_array(np.arange(12.0).reshape(4, 3), chunks=(2, 2)))
    >>> chunks.read(slice(2, 4))
    array([[ 6.,  7.,  8.],
           [ 9., 10., 11.]])
    """

    def __init__(self, x: Any):
        import dask
        from dask.utils import ensure_dict

        (ready,) = dask.optimize(x)
        self.shape, self.dtype = tuple(map(int, x.shape)), np.dtype(x.dtype)
        self.chunks, self.ndim = x.chunks, x.ndim
        self._graph, self._keys = ensure_dict(ready.__dask_graph__()), ready.__dask_keys__()
        edges = np.cumsum([0, *x.chunks[0]]).tolist()
        self._number = {edge: i for i, edge in enumerate(edges)}  # of chunks of none the last

    def read(self, rows: slice) -> Array:
        """Compute the chunks of these rows, in this thread."""
        import dask
        from dask.optimization import cull

        keys = self._keys[self._number[rows.start] : self._number[rows.stop]]
        graph, _ = cull(self._graph, list(_leaves(keys)))
        return _join(dask.get(graph, keys), self.ndim)


def _leaves(keys: Any) -> Iterator[Any]:
    for key in keys:
        if isinstance(key, list):
            yield from _leaves(key)
        else:
            yield key


def _join(parts: Any, depth: int, axis: int = 0) -> Array:
    """Put blocks in nested sequences together; one alone is not copied."""
    if axis == depth:
        return np.asarray(parts)
    joined = [_join(part, depth, axis + 1) for part in parts]
    return joined[0] if len(joined) == 1 else np.concatenate(joined, axis=axis)


def ahead(read: Callable[[T], Array], pieces: Sequence[T]) -> Iterator[tuple[T, Array]]:
    """Read pieces in order, each in a thread of its own while the one before is worked on.

    Examples
    --------
    >>> [(n, part.tolist()) for n, part in ahead(np.arange, [1, 2])]
    [(1, [0]), (2, [0, 1])]
    """
    if len(pieces) < 2:
        for piece in pieces:
            yield piece, read(piece)
        return
    with ThreadPoolExecutor(1, "vitxr-read") as reader:
        coming = reader.submit(read, pieces[0])
        for piece, following in itertools.zip_longest(pieces, pieces[1:]):
            part = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            else:
                del coming
            yield piece, part
            del part
