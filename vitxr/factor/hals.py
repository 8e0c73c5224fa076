"""Nonnegative CP by hierarchical alternating least squares, on plain arrays.

The algorithm is the one the original notebook calls (tensortools' ``ncp_hals``). The order of
the work is another: the tensor is read once an iteration, block by block along its first mode,
instead of once for every mode. Inside, factors are component-major, ``(rank, n)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Fit",
    "hals_update",
    "khatri_rao",
    "ncp_hals",
    "random_start",
    "relative_residual",
    "row_blocks",
    "squared_norm",
]

Array = npt.NDArray[Any]

#: Inner HALS sweeps over the components at each update of a mode.
SWEEPS = 3
#: Smallest divisor of an update, for data of norm 1 or more.
FLOOR = 1e-6
#: Bytes of the tensor in one block: it is used twice, and should stay in the last-level cache.
BLOCK_BYTES = 4 << 20
#: Bytes of the (rank, block) tiles of one update: they should stay in a core's own cache.
TILE_BYTES = 512 << 10
#: Fewest rows of a block; with fewer the matrix products are slow.
MIN_ROWS = 64


@dataclass(frozen=True)
class Fit:
    """What :func:`ncp_hals` found.

    Attributes
    ----------
    factors
        One matrix ``(n, rank)`` for each mode, nonnegative, columns of any length: the first in
        the dtype of the data, the others float64.
    history
        The relative residual after each iteration, float64.
    converged
        Whether the tolerance, and not the limit on iterations, ended the fit.
    """

    factors: tuple[Array, ...]
    history: Array
    converged: bool


def row_blocks(x: Any, rows: int) -> Iterator[tuple[slice, Array]]:
    """Walk over an array along its first axis, as matrices.

    Parameters
    ----------
    x
        A NumPy array, or a Dask array, of which one chunk of the first axis is in memory at a
        time, with all that lies beside it on the other axes.
    rows
        Most rows of a block.

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
    start = 0
    for size in getattr(x, "chunks", ((x.shape[0],),))[0]:
        part = np.asarray(x[start : start + size]).reshape(size, columns)
        for low in range(0, size, rows):
            high = min(low + rows, size)
            yield slice(start + low, start + high), part[low:high]
        start += size


def block_rows(shape: Sequence[int], rank: int, itemsize: int) -> int:
    """Rows of a block such that the block and its tiles stay in their caches."""
    of_block = BLOCK_BYTES // (math.prod(shape[1:]) * itemsize)
    of_tile = TILE_BYTES // (3 * rank * itemsize)  # factor, product, update
    return max(MIN_ROWS, min(of_block, of_tile))


def khatri_rao(factors: Sequence[Array]) -> Array:
    """Column-wise Kronecker product of component-major factors.

    Parameters
    ----------
    factors
        Matrices ``(rank, n_m)``.

    Returns
    -------
    numpy.ndarray
        ``(rank, n_1 n_2 ...)``; the last mode runs fastest, as in a C-ordered unfolding.

    Examples
    --------
    >>> khatri_rao([np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])])
    array([[3., 4., 6., 8.]])
    """
    return reduce(
        lambda a, b: (a[:, :, None] * b[:, None, :]).reshape(len(a), a.shape[1] * b.shape[1]),
        factors,
    )


def squared_norm(x: Any, rows: int = 4096) -> float:
    """Sum of squares of an array, accumulated in float64.

    Examples
    --------
    >>> squared_norm(np.full((2, 2), 3, "float32"))
    36.0
    """
    return float(sum(np.square(b, dtype=np.float64).sum() for _, b in row_blocks(x, rows)))


def relative_residual(x: Any, left: Array, right: Array, norm: float, rows: int = 256) -> float:
    """Relative residual of a model, from the residual itself, in float64.

    ``|X - left right| / norm``, with ``X`` the unfolding of the first mode. A CP model is
    ``left = A diag(w)``, ``right = KR(B, C, ...)^T``; a Tucker model has the core, multiplied by
    the other factors, on the right. No difference of large numbers is taken, so that a residual
    near zero is as exact as any other.

    Parameters
    ----------
    x
        The tensor, NumPy or Dask.
    left
        ``(n_0, r)``.
    right
        ``(r, product of the other modes)``.
    norm
        ``|X|``.
    rows
        Rows of the residual in memory at a time.

    Examples
    --------
    >>> a, b = np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])
    >>> relative_residual(a @ b, a, b, norm=1.0)
    0.0
    """
    total = 0.0
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    for where, block in row_blocks(x, rows):
        residual = left[where] @ right
        residual -= block
        total += float(np.vdot(residual, residual))
    return math.sqrt(total) / norm


def random_start(shape: Sequence[int], rank: int, norm: float, seed: int) -> list[Array]:
    """Uniform random factors of a given norm, the start of the original notebook.

    Entries are uniform on [0, 1); the model is scaled to ``norm``, and each component's scale is
    shared equally by the modes.

    Parameters
    ----------
    shape
        Sizes of the modes.
    rank
        Number of components.
    norm
        Frobenius norm of the model.
    seed
        Seed of :func:`numpy.random.default_rng`.

    Returns
    -------
    list of numpy.ndarray
        One float64 matrix ``(n, rank)`` for each mode.

    Examples
    --------
    >>> a, b = random_start((3, 4), rank=2, norm=5.0, seed=0)
    >>> round(float(np.linalg.norm(a @ b.T)), 12)
    5.0
    """
    rng = np.random.default_rng(seed)
    factors = [rng.uniform(size=(n, rank)) for n in shape]
    lengths = np.array([np.linalg.norm(f, axis=0) for f in factors])
    size = math.sqrt(float(np.prod([f.T @ f for f in factors], axis=0).sum()))
    shared = (lengths.prod(axis=0) * (norm / size)) ** (1 / len(factors))
    return [f * (shared / length) for f, length in zip(factors, lengths, strict=True)]


def hals_update(factor: Array, mttkrp: Array, gram: Array, floor: float) -> None:
    """Update one factor in place: three sweeps of HALS over its components.

    Component ``p`` of the factor ``a`` becomes ::

        a_p = max((m_p - sum_{q != p} g_pq a_q) / max(g_pp, floor), 0)

    which lowers ``|X - M|`` as far as a change of ``a_p`` alone can. The rows of a factor do not
    touch one another, so that any block of them may be updated by itself.

    Parameters
    ----------
    factor
        ``(rank, n)``, overwritten.
    mttkrp
        ``m``: the unfolded tensor times the Khatri-Rao product of the other factors, ``(rank, n)``.
    gram
        ``g``: elementwise product of the other factors' Gram matrices, ``(rank, rank)`` float64.
    floor
        Smallest divisor, for components that have died.

    References
    ----------
    Cichocki and Phan (2009), Fast local algorithms for large scale nonnegative matrix and tensor
    factorizations, IEICE Transactions E92-A, 708-721.

    Examples
    --------
    >>> a = np.ones((1, 2))
    >>> hals_update(a, np.array([[4.0, -1.0]]), np.array([[2.0]]), floor=1e-6)
    >>> a
    array([[2., 0.]])
    """
    rank = len(factor)
    divisor = np.maximum(gram.diagonal(), floor)
    if rank == 1 and gram[0, 0] > 0:
        divisor = gram.diagonal()
    target = mttkrp / divisor[:, None].astype(factor.dtype)
    others = gram / divisor[:, None]
    np.fill_diagonal(others, 0.0)
    others = others.astype(factor.dtype)
    row = np.empty(factor.shape[1], factor.dtype)
    for _ in range(SWEEPS if rank > 1 else 1):
        for p in range(rank):
            np.dot(others[p], factor, out=row)
            np.subtract(target[p], row, out=row)
            np.maximum(row, 0.0, out=factor[p])


def _contract(y: Array, factors: Sequence[Array], keep: int, shape: Sequence[int]) -> Array:
    """Multiply ``y(component, modes 1..)`` by every factor but ``keep``: ``(rank, n_keep)``."""
    rank = len(y)
    for mode in range(len(shape) - 1, 0, -1):
        if mode == keep:
            continue
        right = shape[keep] if keep > mode else 1
        y = y.reshape(rank, -1, shape[mode], right)
        if right == 1:
            y = y[..., 0] @ factors[mode][:, :, None]
        else:
            y = factors[mode][:, None, None, :] @ y
    return y.reshape(rank, shape[keep])


def ncp_hals(
    x: Any,
    rank: int,
    *,
    seed: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    start: Sequence[Array] | None = None,
    norm: float | None = None,
    rows: int | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> Fit:
    """Fit a nonnegative CP model by HALS, reading the tensor once an iteration.

    Minimises ``|X - sum_r a_r o b_r o c_r ...|`` over nonnegative factors. An iteration updates
    the modes in order, each by :func:`hals_update`. For a block ``X_b`` of rows of the first mode

    - ``M_b = X_b KR(B, C, ...)`` and HALS on those rows of ``A``;
    - ``Y += A_b^T X_b``, from which the products of all other modes follow.

    The iterates are those of a mode-by-mode implementation up to rounding. The objective is
    ``|X - M| / |X|`` from the last mode's product. As in tensortools the fit ends when the
    objective has fallen by less than ``tol``, a rise included.

    Parameters
    ----------
    x
        Tensor of two or more modes, float32 or float64, NumPy or Dask. Products with it are taken
        in its dtype; Gram matrices, the updates of all modes but the first, and the objective are
        float64. A Dask array is computed anew in each iteration, one chunk of the first axis at a
        time.
    rank
        Number of components.
    seed
        Seed of :func:`random_start`.
    tol
        Least fall of the objective that keeps the fit going.
    max_iter
        Most iterations. (tensortools does one more than it is asked for.)
    start
        Factors ``(n, rank)`` to start from, in place of the random ones.
    norm
        ``|X|`` where it is known, which saves a pass.
    rows
        Rows of a block; chosen for the caches by default. The result does not depend on it.
    callback
        Called with the iteration (from 0) and the objective after each.

    Returns
    -------
    Fit
        Factors, history of the objective, and whether it converged.

    Raises
    ------
    TypeError
        If ``x`` is not float32 or float64.

    Notes
    -----
    The divisor of an update is at least 1e-6, as in tensortools. That number has the unit of the
    data, so for data of norm below 1 it shrinks along, and ``c X`` is fitted as ``X`` is.

    References
    ----------
    Cichocki and Phan (2009), see :func:`hals_update`; Williams et al. (2018), Unsupervised
    discovery of demixed, low-dimensional neural dynamics across multiple timescales through
    tensor component analysis, Neuron 98, 1099-1115; the original notebook's section 7.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> a, b, c = rng.random((6, 2)), rng.random((5, 2)), rng.random((4, 2))
    >>> fit = ncp_hals(np.einsum("ir,jr,kr->ijk", a, b, c), rank=2, tol=1e-7)
    >>> fit.converged, bool(fit.history[-1] < 1e-3)
    (True, True)
    """
    dtype, shape, modes = np.dtype(x.dtype), x.shape, x.ndim
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"ncp_hals takes float32 or float64, not {dtype}: convert the array first")
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x)  # or every iteration would copy it
    if rows is None:
        rows = block_rows(shape, rank, dtype.itemsize)
    if norm is None:
        norm = math.sqrt(squared_norm(x))
    if start is None:
        start = random_start(shape, rank, norm, seed)
    floor = FLOOR * min(1.0, norm ** (2 * (modes - 1) / modes))

    first = np.array(start[0].T, dtype, order="C")
    factors = [first, *(np.array(f.T, np.float64, order="C") for f in start[1:])]
    grams = [np.asarray(f, np.float64) @ np.asarray(f.T, np.float64) for f in factors]
    columns = math.prod(shape[1:])
    history: list[float] = []
    converged = False

    while len(history) < max_iter and not converged:
        gram = np.prod(grams[1:], axis=0)
        kr = khatri_rao(factors[1:]).astype(dtype)
        y = np.zeros((rank, columns))
        grams[0] = np.zeros((rank, rank))
        for where, block in row_blocks(x, rows):
            tile = np.ascontiguousarray(first[:, where])
            hals_update(tile, kr @ block.T, gram, floor)
            first[:, where] = tile
            y += tile @ block
            tile = tile.astype(np.float64)
            grams[0] += tile @ tile.T
        for mode in range(1, modes):
            gram = np.prod(grams[:mode] + grams[mode + 1 :], axis=0)
            mttkrp = _contract(y, factors, mode, shape)
            hals_update(factors[mode], mttkrp, gram, floor)
            grams[mode] = factors[mode] @ factors[mode].T
        square = norm**2 - 2 * float(np.vdot(factors[-1], mttkrp))
        square += float(np.vdot(gram, grams[-1]))
        history.append(math.sqrt(max(square, 0.0)) / norm)  # rounding may leave -1e-17
        converged = len(history) > 1 and history[-2] - history[-1] < tol
        if callback is not None:
            callback(len(history) - 1, history[-1])
    return Fit(tuple(f.T for f in factors), np.array(history), converged)
