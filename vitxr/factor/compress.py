"""Shared compression of a tensor, inside which all models are fitted first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import MAX_ROWS, Pool, Share, block_rows, row_blocks, shares
from vitxr.factor.state import Compressed

__all__ = ["FIRST", "TIGHTER", "compress", "directions", "pays"]

Array = npt.NDArray[Any]

#: Directions kept of the mode that is walked over, and of each other long mode, at least.
DIRECTIONS = (200, 100)
#: Directions for each component, where that is more.
PER_COMPONENT = (6, 3)
#: A mode is whole unless it has this many times the directions.
LONG = 1.5
#: Directions drawn beyond those kept.
EXTRA = 20
#: Compression has to make the tensor this many times smaller.
GAIN = 10
#: Iterations that are made on the tensor itself before those inside. In the beginning components
#: are nearly the same, and small parts of the data, which the compression misses, decide what each
#: becomes: without these a fit may end in another minimum than the plain one.
FIRST = 7
#: What inside the compressed tensor the tolerance is multiplied by. An iteration there costs
#: little, and a fit that has gone on for longer makes up for what the compression has missed.
TIGHTER = 0.5
#: Directions of the long mode with a smaller part than this of the squares of the first are
#: dropped: there is nothing in them but rounding.
NOTHING = 1e-12
#: Seed of the drawn directions: the same for all fits, whatever their seeds.
SEED = 0


def directions(shape: tuple[int, ...], rank: int) -> list[int | None]:
    """Directions to keep of each mode for models up to a rank; None for modes that stay whole.

    Examples
    --------
    >>> directions((3920, 20, 462), rank=30)
    [200, None, 100]
    """
    out: list[int | None] = []
    for mode, size in enumerate(shape):
        kept = max(DIRECTIONS[mode > 0], PER_COMPONENT[mode > 0] * rank)
        out.append(kept if size > LONG * kept else None)
    return out


def pays(shape: tuple[int, ...], rank: int) -> bool:
    """Whether an iteration on the compressed tensor is much less work than one on the tensor.

    Examples
    --------
    >>> pays((3920, 20, 462), rank=30), pays((3920, 20), rank=5)
    (True, False)
    """
    kept = directions(shape, rank)
    others = math.prod(d or n for d, n in zip(kept[1:], shape[1:], strict=True))
    if kept[0] is None or others <= kept[0]:
        return False
    return math.prod(shape) > GAIN * kept[0] * (shape[0] + others)


def compress(x: Any, rank: int, pool: Pool) -> Compressed:
    """Compress a tensor, mode by mode, in three passes over it.

    1. ``S = X_(0) (I x W)``, ``W`` Gaussian with few columns for the last mode: cheap directions
       of the first mode.
    2. ``Q`` an orthonormal basis of ``S``; the rows of ``Q^T X_(0)``, orthonormalized, are ``V``.
    3. ``X_(0) V^T``: its left singular vectors are the basis of the first mode, and with ``V``
       they give the core, of which the other long modes are compressed by their own.

    Parameters
    ----------
    x
        Tensor, float32 or float64, NumPy or Dask, the mode to walk over in front.
    rank
        Largest rank of the models to be fitted.
    pool
        Threads.

    Returns
    -------
    Compressed
        Close to the orthogonal projection of ``x`` onto the bases. It is not exactly that, for
        the core has been seen through ``V`` alone.

    References
    ----------
    Halko, Martinsson and Tropp (2011), Finding structure with randomness, SIAM Review 53,
    217-288; Cohen, Farias and Comon (2015), Fast decomposition of large nonnegative tensors,
    IEEE Signal Processing Letters 22, 862-866.

    Examples
    --------
    >>> x = np.einsum("ir,jr,kr->ijk", *(np.random.default_rng(0).random((n, 2))
    ...               for n in (400, 30, 20)))
    >>> c = compress(x, 2, Pool(1, None))
    >>> bool(np.allclose(c.rows @ c.core, x.reshape(400, -1)))
    True
    """
    dtype, others = np.dtype(x.dtype), x.shape[1:]
    kept = directions(x.shape, rank)
    wide = min((kept[0] or x.shape[0]) + EXTRA, *_unfolding(x.shape))
    groups = math.prod(others[:-1])
    draws = np.random.default_rng(SEED).standard_normal((others[-1], -(-wide // groups)))
    draws = draws.astype(dtype)
    drawn = groups * draws.shape[1]
    basis, _, _ = _left_vectors(
        _rowwise(x, lambda b: (b.reshape(-1, others[-1]) @ draws).reshape(len(b), -1), drawn, pool),
        pool,
    )

    y = _project(x, basis, pool)
    # Of many directions those with most of the data.
    vectors = np.linalg.eigh(y @ y.T)[1][:, ::-1][:, :wide]
    wanted = np.linalg.qr((vectors.T @ y).astype(dtype).T)[0]
    del basis  # of the size of a factor, as is what follows
    image = _rowwise(x, lambda b: b @ wanted, wanted.shape[1], pool)
    left, values, right = _left_vectors(image, pool)
    n = min(kept[0] or wide, len(values))
    core = ((values[:n, None] * right[:n]).astype(dtype) @ wanted.T).reshape(n, *others)
    sides: list[Array | None] = [None] * len(others)
    for mode, size in enumerate(kept[1:], start=1):
        if size is not None:
            unfolded = np.moveaxis(core, mode, 0).reshape(core.shape[mode], -1)
            side = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :size]
            sides[mode - 1] = np.ascontiguousarray(side, np.float64)
            core = np.moveaxis(np.tensordot(core, side, (mode, 0)), -1, mode)
    return Compressed(
        np.ascontiguousarray(left[:, :n], dtype),
        np.ascontiguousarray(core.reshape(n, -1), dtype),
        tuple(sides),
    )


def _unfolding(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _rowwise(x: Any, task: Any, width: int, pool: Pool) -> Array:
    """Apply a function to every block of rows, and put the results, of some width, together."""
    rows = block_rows(x.shape, np.dtype(x.dtype).itemsize)
    out = np.empty((x.shape[0], width), x.dtype)

    def work(share: Share) -> None:
        for where, block in row_blocks(x, rows, share):
            out[where] = task(block)

    pool.map(work, shares(x, rows, pool.threads))
    return out


def _project(x: Any, basis: Array, pool: Pool) -> Array:
    """Transpose of a basis of the first mode times the unfolded tensor, added up in float64."""
    rows = block_rows(x.shape, np.dtype(x.dtype).itemsize)

    def work(share: Share) -> Array:
        total = np.zeros((basis.shape[1], math.prod(x.shape[1:])))
        for where, block in row_blocks(x, rows, share):
            total += basis[where].T @ block
        return total

    return np.asarray(sum(pool.map(work, shares(x, rows, pool.threads))))


def _left_vectors(tall: Array, pool: Pool) -> tuple[Array, Array, Array]:
    """Singular value decomposition of a tall matrix, by way of its Gram matrix in float64.

    Such a matrix has as many rows as the long mode. LAPACK would copy it several times; here the
    left vectors take its place.
    """
    walk = shares(tall, MAX_ROWS, pool.threads)

    def gram(share: Share) -> Array:
        total = np.zeros((tall.shape[1],) * 2)
        for where in share:
            block = tall[where].astype(np.float64)
            total += block.T @ block
        return total

    squares, vectors = np.linalg.eigh(sum(pool.map(gram, walk)))
    squares, vectors = squares[::-1], vectors[:, ::-1]
    n = int((squares > NOTHING * squares[0]).sum())
    values, vectors = np.sqrt(squares[:n]), vectors[:, :n]
    turn = vectors / values

    def replace(share: Share) -> None:
        for where in share:
            tall[where, :n] = tall[where].astype(np.float64) @ turn

    pool.map(replace, walk)
    return tall[:, :n], values, vectors.T
