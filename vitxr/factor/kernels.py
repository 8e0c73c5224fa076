"""The arithmetic of nonnegative CP by HALS, on plain component-major arrays ``(rank, n)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "contract",
    "hals_terms",
    "hals_update",
    "khatri_rao",
    "l1_penalty",
    "l1_terms",
    "random_start",
]

Array = npt.NDArray[Any]

#: Length of a column below which a penalty takes it for this long.
TINY = 1e-20
#: Inner HALS sweeps over the components at each update of a mode.
SWEEPS = 3
#: Bytes of a (rank, n) array up to which a batch of models is swept in common: the work of such
#: small arrays is all in calling NumPy.
BATCH_BYTES = 256 << 10


def khatri_rao(factors: Sequence[Array], dtype: npt.DTypeLike | None = None) -> Array:
    """Column-wise Kronecker product of component-major factors.

    Parameters
    ----------
    factors
        Matrices ``(rank, n_m)``.
    dtype
        What the products, taken in the dtype of the factors, are rounded to.

    Returns
    -------
    numpy.ndarray
        ``(rank, n_1 n_2 ...)``; the last mode runs fastest, as in a C-ordered unfolding.

    Examples
    --------
    >>> khatri_rao([np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])])
    array([[3., 4., 6., 8.]])
    """
    *others, last = factors
    if not others:
        return last.astype(dtype or last.dtype, copy=False)
    first = khatri_rao(others)
    shape = (len(first), first.shape[1], last.shape[1])
    out = np.empty(shape, dtype or np.result_type(first, last))
    np.multiply(first[:, :, None], last[:, None, :], out=out, casting="same_kind")
    return out.reshape(len(first), -1)


def contract(y: Array, factors: Sequence[Array], keep: int) -> Array:
    """Multiply ``y(component, modes ...)`` by the factors of all modes but one.

    Parameters
    ----------
    y
        ``(rank, n_0 n_1 ...)``.
    factors
        Matrices ``(rank, n_m)``; that of the mode kept only tells its size.
    keep
        Position of the mode kept.

    Returns
    -------
    numpy.ndarray
        ``(rank, n_keep)``.

    Examples
    --------
    >>> contract(np.arange(6.0)[None], [np.ones((1, 2)), np.ones((1, 3))], keep=1)
    array([[3., 5., 7.]])
    """
    rank, size = len(y), factors[keep].shape[1]
    for mode in range(len(factors) - 1, -1, -1):
        if mode == keep:
            continue
        right = size if keep > mode else 1
        y = y.reshape(rank, -1, factors[mode].shape[1], right)
        if right == 1:
            y = y[..., 0] @ factors[mode][:, :, None]
        else:
            y = factors[mode][:, None, None, :] @ y
    return y.reshape(rank, size)


def hals_update(
    factor: Array, mttkrp: Array, gram: Array, floor: float, nonnegative: bool = True
) -> None:
    """Update factors in place: three sweeps of HALS over their components.

    Component ``p`` of the factor ``a`` becomes ::

        a_p = max((m_p - sum_{q != p} g_pq a_q) / max(g_pp, floor), 0)

    (without the maximum where the factor is not kept nonnegative), which lowers ``|X - M|`` as
    far as a change of ``a_p`` alone can. The rows of a factor do not touch one another, so that
    any block of them may be updated by itself.

    Parameters
    ----------
    factor
        ``(rank, n)``, or ``(model, rank, n)`` for several models at a time; overwritten.
    mttkrp
        ``m``: the unfolded tensor times the Khatri-Rao product of the other factors; of the
        factor's shape and dtype.
    gram
        ``g``: elementwise product of the other factors' Gram matrices, ``(rank, rank)`` or
        ``(model, rank, rank)``, float64.
    floor
        Smallest divisor, for components that have died.
    nonnegative
        Whether negative entries become zero.

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
    divisor, others, sweeps = hals_terms(gram, floor)
    target = mttkrp / divisor[..., None].astype(factor.dtype)
    others = others.astype(factor.dtype)
    if factor.ndim == 2:
        _sweep(factor, target, others, sweeps, nonnegative)
    elif factor[0].nbytes > BATCH_BYTES or len(factor) == 1:
        for one, its_target, its_others in zip(factor, target, others, strict=True):
            _sweep(one, its_target, its_others, sweeps, nonnegative)
    else:
        _sweep_together(factor, target, others, sweeps, nonnegative)


def hals_terms(gram: Array, floor: float) -> tuple[Array, Array, int]:
    """What :func:`hals_update` divides by, the weights of the other components, and its sweeps.

    Parameters
    ----------
    gram, floor
        As for :func:`hals_update`.

    Returns
    -------
    divisor, others
        ``max(g_pp, floor)`` and ``g_pq`` divided by it, 0 for ``p = q``; float64. A single
        component is divided by any ``g_pp`` above 0.
    sweeps
        Of a single component one is enough.

    Examples
    --------
    >>> hals_terms(np.array([[2.0, 1.0], [1.0, 4.0]]), floor=1e-6)
    (array([2., 4.]), array([[0.  , 0.5 ],
           [0.25, 0.  ]]), 3)
    """
    rank = gram.shape[-1]
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    divisor = np.maximum(diagonal, floor)
    if rank == 1:
        divisor = np.where(diagonal > 0, diagonal, divisor)
    others = gram / divisor[..., None]
    others[..., np.arange(rank), np.arange(rank)] = 0.0
    return divisor, others, SWEEPS if rank > 1 else 1


def _sweep(factor: Array, target: Array, others: Array, sweeps: int, nonnegative: bool) -> None:
    """Sweep over the components of one model; what is in the loop is most of the time."""
    row, zero = np.empty_like(factor[0]), np.zeros_like(factor[0])
    steps = list(zip(others, target, factor, strict=True))
    dot, subtract, maximum = np.dot, np.subtract, np.maximum
    for _ in range(sweeps):
        for weights, goal, component in steps:
            dot(weights, factor, row)
            if nonnegative:
                subtract(goal, row, row)
                maximum(row, zero, out=component)
            else:
                subtract(goal, row, component)


def _sweep_together(
    factor: Array, target: Array, others: Array, sweeps: int, nonnegative: bool
) -> None:
    """Sweep over the components of several models, component ``p`` of all of them at a time."""
    row, zero = np.empty_like(factor[:, :1]), np.zeros_like(factor[:, :1])
    steps = [
        (others[:, p : p + 1], target[:, p : p + 1], factor[:, p : p + 1])
        for p in range(factor.shape[1])
    ]
    matmul, subtract, maximum = np.matmul, np.subtract, np.maximum
    for _ in range(sweeps):
        for weights, goal, component in steps:
            matmul(weights, factor, row)
            if nonnegative:
                subtract(goal, row, row)
                maximum(row, zero, out=component)
            else:
                subtract(goal, row, component)


def l1_penalty(weights: Array, lengths: Array, totals: Array) -> float:
    """L1 penalty of a nonnegative model: of each unit column, times its component's weight.

    ``sum_m weight_m sum_r |a_mr|_1 prod_(k != m) |a_kr|_2``, which no change of scale between the
    modes alters.

    Parameters
    ----------
    weights
        One for each mode.
    lengths
        Norms of the columns, ``(modes, rank)``.
    totals
        Sums of the columns, ``(modes, rank)``.

    Examples
    --------
    >>> l1_penalty(np.array([0.5, 0.0]), np.array([[1.0], [2.0]]), np.array([[1.4], [9.0]]))
    1.4
    """
    return sum(
        float(weights[m] * np.vdot(totals[m], np.delete(lengths, m, axis=0).prod(axis=0)))
        for m in np.flatnonzero(weights)
    )


def l1_terms(weights: Array, lengths: Array, totals: Array, mode: int) -> tuple[Array, Array]:
    """What an L1 penalty does to the update of one mode.

    As a function of a column ``a`` of that mode, :func:`l1_penalty` is
    ``linear sum(a) + concave |a|``. Now ``|a|`` is at most ``|a|^2 / (2 l) + l / 2``, with equality
    where ``l`` is the length of ``a`` before the update. So the update takes ``linear`` off the
    products, adds ``concave / l`` to the diagonal of the Gram matrix, and the penalized objective
    cannot rise.

    Parameters
    ----------
    weights, lengths, totals
        As for :func:`l1_penalty`.
    mode
        The mode that is to be updated.

    Returns
    -------
    linear, diagonal
        ``(rank,)`` each.

    References
    ----------
    Hunter and Lange (2004), A tutorial on MM algorithms, The American Statistician 58, 30-37.

    Examples
    --------
    >>> weights, lengths = np.array([0.5, 0.0]), np.array([[1.0], [2.0]])
    >>> l1_terms(weights, lengths, np.array([[1.4], [9.0]]), mode=0)
    (array([1.]), array([0.]))
    >>> l1_terms(weights, lengths, np.array([[1.4], [9.0]]), mode=1)
    (array([0.]), array([0.35]))
    """
    linear = weights[mode] * np.delete(lengths, mode, axis=0).prod(axis=0)
    concave = np.zeros(lengths.shape[1])
    for m in np.flatnonzero(weights):
        if m != mode:
            others = [k for k in range(len(lengths)) if k not in (m, mode)]
            concave += weights[m] * totals[m] * lengths[others].prod(axis=0)
    return linear, concave / np.maximum(lengths[mode], TINY)


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
