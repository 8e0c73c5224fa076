"""Walking over a tensor block by block, with threads of our own: NumPy, memory-mapped, Dask."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.reading import Chunks, ahead

__all__ = [
    "Pool",
    "block_rows",
    "blocked_mode",
    "own_threads",
    "ready",
    "relative_residuals",
    "rotate",
    "row_blocks",
    "shares",
    "slab_bytes",
    "squared_norm",
    "squares",
]

Array = npt.NDArray[Any]

#: Bytes of the tensor in one block. It is used twice, and every block adds to the accumulator of
#: its thread: smaller ones would be in a cache, larger ones add less often.
BLOCK_BYTES = 32 << 20
#: Rows of a block: with fewer the matrix products are slow, with more the tiles of
#: :func:`vitxr.factor.kernels.hals_update` leave a core's own cache.
MIN_ROWS, MAX_ROWS = 64, 1024
#: Bytes of a Dask tensor that may be in memory: a smaller one is read once, of a larger one as
#: much at a time.
MEMORY_BYTES = 2 << 30
#: Copies of what is read that exist at the same time: what is worked on, and of what comes next
#: its chunks, their sum, it in another order.
COPIES = 4
#: Chunks with fewer rows are read together, if that takes no more than such a part of the memory.
FEW_ROWS, JOINED = 256, 1 / 8
#: Bytes of which one is touched so that all are read from a file that is mapped into memory.
PAGE_BYTES = 4096
#: Values that are squared at a time: in float64 half of a core's own cache, or less.
FEW = 1 << 16
#: A residual below this is taken from products in float64.
SMALL = 1e-3

Share = list[slice]


class Pool:
    """Threads that each do one share of a task; results come in the order of the shares."""

    def __init__(self, threads: int, executor: ThreadPoolExecutor | None):
        self.threads, self._executor = threads, executor
        self.turn = threading.Lock()

    def map(self, task: Callable[..., Any], shares: Iterable[Any]) -> list[Any]:
        """Call ``task`` with every share, the first in this thread; wait for all."""
        first, *others = shares
        if self._executor is None:
            return [task(share) for share in (first, *others)]
        waiting = [self._executor.submit(task, share) for share in others]
        try:
            return [task(first), *(future.result() for future in waiting)]
        except BaseException:
            for future in waiting:
                future.cancel()
            for future in waiting:  # none may go on writing into arrays that are given up
                if not future.cancelled():
                    future.exception()
            raise

    def each(self, task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Call a task with every item, divided evenly among the threads."""
        parts = [items[i :: self.threads] for i in range(min(self.threads, len(items)))]
        done = self.map(lambda part: [task(item) for item in part], parts)
        return [done[i % len(parts)][i // len(parts)] for i in range(len(items))]


@contextmanager
def own_threads(threads: int | None = None, libraries: Any = None) -> Iterator[Pool]:
    """Threads over blocks, and one thread for each BLAS call within them.

    BLAS libraries keep their idle threads spinning: two libraries, or a library and our threads,
    on the same cores take several times as long as one. As many threads are used as BLAS would
    use, so that ``OMP_NUM_THREADS`` and ``threadpoolctl.threadpool_limits`` mean what they mean
    elsewhere, and no more than the process has cores.

    Parameters
    ----------
    threads
        How many, where that is known.
    libraries
        A ``threadpoolctl.ThreadpoolController``, where there is one already.

    Examples
    --------
    >>> with own_threads(2) as pool:
    ...     pool.map(lambda share: sum(share), [[1, 2], [3, 4], [5]])
    [3, 7, 5]
    """
    from threadpoolctl import ThreadpoolController

    libraries = libraries or ThreadpoolController()
    if threads is None:
        allowed = [lib["num_threads"] for lib in libraries.info() if lib["user_api"] == "blas"]
        threads = max(1, min(max(allowed, default=1), _cores()))
    with libraries.limit(limits=1, user_api="blas"):
        if threads == 1:
            yield Pool(1, None)
        else:
            with ThreadPoolExecutor(threads - 1, "vitxr-factor") as executor:
                yield Pool(threads, executor)


def _cores() -> int:
    """Cores that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def block_rows(shape: Sequence[int], itemsize: int, size: int = BLOCK_BYTES) -> int:
    """Rows of a block of a size in bytes."""
    of_block = size // (math.prod(shape[1:]) * itemsize)
    return max(MIN_ROWS, min(of_block, MAX_ROWS))


def blocked_mode(x: Any) -> int:
    """Mode along which to walk over a tensor.

    The longest; of a Dask array, which is in memory one chunk of that mode at a time with all
    that lies beside it, the one for which that is least, and of equal ones the longest. The first
    of several that are equal.

    Examples
    --------
    >>> blocked_mode(np.zeros((2, 5, 3)))
    1
    """
    if not hasattr(x, "chunks"):
        return int(np.argmax(x.shape))
    return min(range(x.ndim), key=lambda m: (max(x.chunks[m]) / x.shape[m], -x.shape[m]))


def slab_bytes(x: Any) -> int:
    """Bytes of what is read at a time when a Dask array is walked over along its first axis.

    Examples
    --------
    >>> import dask.array as da
    >>> slab_bytes(da.zeros((10, 6, 5), chunks=(2, 3, 5)))
    480
    """
    return int(max(x.chunks[0]) * math.prod(x.shape[1:]) * x.dtype.itemsize)


def rotate(x: Any, mode: int) -> Any:
    """Bring a mode to the front, the others behind it in cyclic order.

    An array in memory is copied if that is what makes it contiguous, or every pass would copy
    it; memory-mapped and Dask arrays are not.

    Examples
    --------
    >>> rotate(np.zeros((2, 3, 4)), 1).shape
    (3, 4, 2)
    """
    x = x.transpose([(mode + i) % x.ndim for i in range(x.ndim)])
    in_memory = isinstance(x, np.ndarray) and not _mapped(x)
    return np.ascontiguousarray(x) if in_memory else x


def _mapped(x: Any) -> bool:
    while x is not None:
        if isinstance(x, np.memmap):
            return True
        x = getattr(x, "base", None)
    return False


def ready(x: Any) -> Any:
    """Make a Dask array ready to be read many times; any other array is left as it is.

    What comes out is for :func:`shares` and :func:`row_blocks`, which take Dask arrays too.
    """
    return Chunks(x) if hasattr(x, "__dask_graph__") else x


def shares(x: Any, rows: int, threads: int) -> list[Share]:
    """Divide the first axis among threads.

    A chunk of a Dask array goes to one thread, small ones several at a time, and no more threads
    are used than may hold their chunks in memory at the same time; an array in memory is divided
    between blocks.

    Returns
    -------
    list of lists of slice
        For each thread what it reads at a time, in order; none is empty. They depend on the
        arguments alone, so that sums over them are the same in each run.

    Examples
    --------
    >>> shares(np.zeros((10, 2)), rows=4, threads=2)
    [[slice(0, 4, None)], [slice(4, 8, None), slice(8, 10, None)]]
    """
    n = x.shape[0]
    if hasattr(x, "chunks"):
        threads = max(1, min(threads, MEMORY_BYTES // (COPIES * slab_bytes(x))))
        of_row = math.prod(x.shape[1:]) * x.dtype.itemsize
        most = int(JOINED * MEMORY_BYTES / (COPIES * threads * of_row))
        edges = _joined(x.chunks[0], min(FEW_ROWS, rows, -(-n // threads), most))
    else:
        even = -(-n // threads)  # small arrays are divided evenly
        step = min(rows, even) if even >= MIN_ROWS else rows
        edges = [*range(0, n, step), n]
    pieces = [slice(low, high) for low, high in itertools.pairwise(edges) if high > low]
    out: list[Share] = [[] for _ in range(min(threads, len(pieces)))]
    for piece in pieces:
        middle = (piece.start + piece.stop) / 2
        out[min(int(middle * len(out) / n), len(out) - 1)].append(piece)
    return [share for share in out if share]


def _joined(chunks: Sequence[int], most: int) -> list[int]:
    """Edges of chunks, of which neighbours are joined while together they are no more than that.

    Examples
    --------
    >>> _joined((2, 2, 2, 5, 1), most=4)
    [0, 4, 6, 11, 12]
    """
    edges = [0]
    for end in itertools.accumulate(chunks):
        if len(edges) > 1 and end - edges[-2] <= most:
            edges[-1] = end
        else:
            edges.append(end)
    return edges


def row_blocks(x: Any, rows: int, share: Share | None = None) -> Iterator[tuple[slice, Array]]:
    """Walk over an array along its first axis, as matrices.

    Parameters
    ----------
    x
        A NumPy array, or a Dask array, of which two chunks of the first axis are in memory at a
        time, with all that lies beside them on the other axes: one is read, in a thread of its
        own, while the one before is worked on. So is a file that is mapped into memory.
    rows
        Most rows of a block.
    share
        What to walk over, one of :func:`shares`; everything by default.

    Yields
    ------
    slice
        The rows.
    numpy.ndarray
        ``(rows, product of the other axes)``, a view where ``x`` is a C-contiguous array.

    Examples
    --------
    >>> [block.shape for _, block in row_blocks(np.zeros((5, 2, 3)), 2)]
    [(2, 6), (2, 6), (1, 6)]
    """
    columns = math.prod(x.shape[1:])
    if share is None:
        share = [s for part in shares(x, rows, 1) for s in part]
    x = ready(x)

    def read(piece: slice) -> Array:
        part = x.read(piece) if isinstance(x, Chunks) else np.asarray(x[piece])
        return part.reshape(piece.stop - piece.start, columns)

    def fetch(piece: slice) -> Array:
        part = read(piece)
        part.reshape(-1).view(np.uint8)[::PAGE_BYTES].max()  # waits for the file, here
        return part

    if isinstance(x, Chunks):
        parts: Iterable[tuple[slice, Array]] = ahead(read, share)
    elif _mapped(x):
        parts = ahead(fetch, share)
    else:
        parts = ((piece, read(piece)) for piece in share)
    for piece, part in parts:
        for low in range(0, len(part), rows):
            high = min(low + rows, len(part))
            yield slice(piece.start + low, piece.start + high), part[low:high]
        del part  # before the next one is read


def squares(block: Array) -> float:
    """Sum of squares of a block, in float64; a few values at a time, which stay in the cache.

    Examples
    --------
    >>> squares(np.full((2, 2), 3, "float32"))
    36.0
    """
    flat = block.reshape(-1)
    parts = (flat[i : i + FEW].astype(np.float64) for i in range(0, flat.size, FEW))
    return float(sum(np.vdot(part, part) for part in parts))


def squared_norm(x: Any, pool: Pool | None = None) -> float:
    """Sum of squares of an array, accumulated in float64, in threads where there are some.

    Examples
    --------
    >>> squared_norm(np.full((2, 2), 3, "float32"))
    36.0
    """
    pool, x = pool or Pool(1, None), ready(x)

    def work(share: Share) -> float:
        return sum(squares(block) for _, block in row_blocks(x, MAX_ROWS, share))

    return float(sum(pool.map(work, shares(x, MAX_ROWS, pool.threads))))


def relative_residuals(
    x: Any,
    models: Sequence[tuple[Array, Array]],
    norm: float,
    pool: Pool | None = None,
    rows: int = 256,
) -> list[float]:
    """Relative residuals of several models, each from its residual, in one pass over the tensor.

    ``|X - left right| / norm``, with ``X`` the unfolding of the first mode. A CP model is
    ``left = A diag(w)``, ``right = KR(B, C, ...)^T``; a Tucker model has the core, multiplied by
    the other factors, on the right. No difference of large numbers is taken. Entries of the
    residual have the dtype of the data, squares are added in float64; what comes out below 1e-3
    is computed again in float64, so that a residual near zero is as exact as any other.

    Parameters
    ----------
    x
        The tensor, NumPy or Dask.
    models
        Pairs of ``(n_0, r)`` and ``(r, product of the other modes)``.
    norm
        ``|X|``.
    pool
        Threads, from :func:`own_threads`.
    rows
        Rows of the residual in memory at a time, in each thread.

    Examples
    --------
    >>> a, b = np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])
    >>> relative_residuals(a @ b, [(a, b)], norm=1.0)
    [0.0]
    """
    pool = pool or Pool(1, None)
    dtypes = dict.fromkeys((np.dtype(x.dtype), np.dtype(np.float64)))
    out = [0.0] * len(models)
    wanted = list(range(len(models)))
    for dtype in dtypes:
        chosen = [tuple(np.ascontiguousarray(m, dtype) for m in models[i]) for i in wanted]

        def squares(share: Share, chosen: list[Any] = chosen, dtype: Any = dtype) -> Array:
            total = np.zeros(len(chosen))
            for where, block in row_blocks(x, rows, share):
                for i, (left, right) in enumerate(chosen):
                    residual = left[where] @ right
                    residual -= block
                    # By row: a long sum in float32 would lose digits.
                    total[i] += np.vecdot(residual, residual).astype(np.float64).sum()
            return total

        totals = sum(pool.map(squares, shares(x, rows, pool.threads)))
        for i, total in zip(wanted, totals, strict=True):
            out[i] = math.sqrt(float(total)) / norm
        wanted = [i for i in wanted if out[i] < SMALL]
        if not wanted:
            break
    return out
