"""Nonnegative CP by hierarchical alternating least squares, on plain arrays.

The algorithm is the one the original notebook calls (tensortools' ``ncp_hals``). The order of
the work is another: the tensor is read once an iteration, block by block along its longest mode,
for all models, instead of once for every mode of every model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import Pool, blocked_mode, own_threads, ready, rotate, squared_norm
from vitxr.factor.compress import FIRST, TIGHTER, compress, directions
from vitxr.factor.device import on_device
from vitxr.factor.engine import iterate
from vitxr.factor.kernels import random_start
from vitxr.factor.masks import Masked, survey
from vitxr.factor.rules import Rules
from vitxr.factor.state import Model
from vitxr.factor.workers import on_workers

__all__ = ["Fit", "fit_models", "ncp_hals", "random_start"]

Array = npt.NDArray[Any]

#: Bytes of the products and sums of models that are fitted side by side; of more models, as many
#: at a time.
FUSED_BYTES = 1 << 30


@dataclass(frozen=True)
class Fit:
    """What :func:`ncp_hals` found.

    Attributes
    ----------
    factors
        One matrix ``(n, rank)`` for each mode, nonnegative, columns of any length: that of the
        mode walked over in the dtype of the data, the others float64. Empty if interrupted.
    history
        The relative residual after each iteration, float64.
    converged
        Whether the tolerance, and not the limit on iterations, ended the fit.
    compressed_iterations
        How many iterations were made on the compressed tensor, after the first
        :data:`vitxr.factor.compress.FIRST`. Their entries of ``history`` are estimates, all
        others are exact.
    seconds
        Wall time from the start of the fit, of all models, to the end of this one.
    interrupted
        Whether the fit was broken off before either.
    penalized
        ``sqrt(residual^2 + 2 penalty)`` after each iteration: what is minimised where the rules
        ask for sparsity; empty elsewhere.
    """

    factors: tuple[Array, ...]
    history: Array
    converged: bool
    compressed_iterations: int
    seconds: float
    interrupted: bool
    penalized: Array


def ncp_hals(
    x: Any,
    rank: int,
    *,
    seed: int = 0,
    tol: float = 1e-5,
    max_iter: int = 500,
    start: Sequence[Array] | None = None,
    norm: float | None = None,
    compressed: bool = False,
    rows: int | None = None,
    threads: int | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> Fit:
    """Fit a nonnegative CP model by HALS, reading the tensor once an iteration.

    Minimises ``|X - sum_r a_r o b_r o c_r ...|`` over nonnegative factors. An iteration updates
    the modes in order, each by :func:`vitxr.factor.kernels.hals_update`. How one pass over the
    tensor serves all of them: :func:`vitxr.factor.engine.iterate`.

    The iterates are those of a mode-by-mode implementation up to rounding. The objective is
    ``|X - M| / |X|`` from the last mode's product. As in tensortools the fit ends when the
    objective has fallen by less than ``tol``, a rise included.

    Parameters
    ----------
    x
        Tensor of two or more modes, float32 or float64; NumPy, memory-mapped or Dask. It is
        walked over along its longest mode. Products with it are taken in its dtype; Gram
        matrices, the updates of the other modes, and the objective are float64. A Dask array is
        computed anew in each iteration, in each thread one chunk of that mode at a time.
    rank
        Number of components.
    seed
        Seed of :func:`vitxr.factor.kernels.random_start`.
    tol
        Least fall of the objective that keeps the fit going.
    max_iter
        Most iterations. (tensortools does one more than it is asked for.)
    start
        Factors ``(n, rank)`` to start from, in place of the random ones.
    norm
        ``|X|`` where it is known, which saves a pass.
    compressed
        Fit inside a compressed tensor first (:func:`vitxr.factor.compress.compress`), and
        finish on the tensor itself, which decides when to stop. The iterates are then not those
        of the plain method.
    rows
        Rows of a block; chosen for speed by default. The result does not depend on it, nor on
        the threads, but for rounding.
    threads
        Threads over blocks; by default as many as BLAS would use.
    callback
        Called with the iteration (from 0) and the objective after each.

    Returns
    -------
    Fit
        Factors, history of the objective, whether it converged.

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
    Cichocki and Phan (2009), see :func:`vitxr.factor.kernels.hals_update`; Williams et al.
    (2018), Unsupervised discovery of demixed, low-dimensional neural dynamics across multiple
    timescales through tensor component analysis, Neuron 98, 1099-1115; the original notebook's
    section 7.

    Examples
    --------
    >>> rng = np.random.default_rng(1)
    >>> a, b, c = rng.random((6, 2)), rng.random((5, 2)), rng.random((4, 2))
    >>> fit = ncp_hals(np.einsum("ir,jr,kr->ijk", a, b, c), rank=2, tol=1e-7)
    >>> fit.converged, bool(fit.history[-1] < 1e-3)
    (True, True)
    """
    with own_threads(threads) as pool:
        if norm is None:
            norm = math.sqrt(squared_norm(rotate(x, blocked_mode(x)), pool))
        if start is None:
            start = random_start(x.shape, rank, norm, seed)
        fit = fit_models(
            x,
            [start],
            norm=norm,
            tol=tol,
            max_iter=max_iter,
            pool=pool,
            compressed=compressed,
            rows=rows,
            callback=None if callback is None else lambda _, n, value, __: callback(n, value),
        )[0]
    if fit.interrupted:
        raise KeyboardInterrupt
    return fit


def fit_models(
    x: Any,
    starts: Iterable[Sequence[Array]],
    *,
    norm: float | None,
    tol: float,
    max_iter: int,
    pool: Pool,
    rules: Rules | None = None,
    mask: Any = None,
    client: Any = None,
    device: str | None = None,
    compressed: bool | Sequence[bool] = False,
    rows: int | None = None,
    callback: Callable[[int, int, float, bool], object] | None = None,
) -> list[Fit]:
    """Fit several models at a time, each from its own start: see :func:`ncp_hals`.

    A KeyboardInterrupt ends the fit: models that have converged are whole, the others are marked
    ``interrupted`` and have no factors.

    Parameters
    ----------
    x, norm, tol, max_iter, rows
        As for :func:`ncp_hals`. With a mask the norm is that of the entries that count.
    compressed
        Whether to fit inside a compressed tensor first: all models, or each. Models share one
        only where it would be the same for each by itself.
    starts
        For each model its factors ``(n, rank)``; ranks may differ.
    pool
        Threads, from :func:`vitxr.factor.blocks.own_threads`.
    rules
        What is asked of the factors, by mode; by default that they are nonnegative.
    mask
        Entries that count: bool, of the shape of ``x``, NumPy or Dask, or a
        :class:`vitxr.factor.masks.Speckle`. The others are filled in by each model as it was
        before the iteration, in which the mode walked over is then the first; the history is
        ``|W (X - M)| / |W X|``. What is held out by a speckle:
        :func:`vitxr.factor.masks.masked_errors`.
    client
        A ``dask.distributed.Client``: its workers load the tensor, a Dask array, once and keep it
        (:mod:`vitxr.factor.workers`).
    device
        A torch device, "cpu", "cuda" or "cuda:1", on which the passes are made
        (:mod:`vitxr.factor.device`), or "auto".
    callback
        Called with the number of the model, its iteration, its objective, and whether that was
        the last, after each.

    Returns
    -------
    list of Fit
        In the order of ``starts``.

    Examples
    --------
    >>> x = np.random.default_rng(0).random((9, 5, 4))
    >>> starts = [random_start(x.shape, rank, 1.0, seed=0) for rank in (1, 2)]
    >>> with own_threads() as pool:
    ...     fits = fit_models(x, starts, norm=1.0, tol=1e-5, max_iter=9, pool=pool)
    >>> [fit.factors[0].shape for fit in fits]
    [(9, 1), (9, 2)]
    """
    dtype, modes = np.dtype(x.dtype), x.ndim
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"ncp_hals takes float32 or float64, not {dtype}: convert the array first")
    began = time.perf_counter()
    early = blocked_mode(x)
    data = rotate(x, early)
    models = []
    for start in starts:
        turned = [start[(early + i) % modes].T for i in range(modes)]
        first = np.array(turned[0], dtype, order="C")
        models.append(Model([first, *(np.array(f, np.float64, order="C") for f in turned[1:])]))
    numbers = {id(model): i for i, model in enumerate(models)}
    flags = [compressed] * len(models) if isinstance(compressed, bool) else list(compressed)
    inside: dict[tuple[int | None, ...], list[Model]] = {}
    for model, flag in zip(models, flags, strict=True):
        if flag:
            inside.setdefault(tuple(directions(data.shape, model.rank)), []).append(model)
    seconds = [0.0] * len(models)

    finishing = True  # what is told of now are iterations on the tensor

    def tell(model: Model) -> None:
        number = numbers[id(model)]
        seconds[number] = time.perf_counter() - began
        if callback is not None:
            done = finishing and (model.converged or len(model.history) == max_iter)
            callback(number, len(model.history) - 1, model.history[-1], done)

    rules = rules or Rules.plain(modes)
    here = client is None and device is None
    if inside and (mask is not None or not here or not rules.is_plain):
        raise ValueError("a compressed tensor is for plain nonnegative CP by NumPy")
    if (mask is not None and not here) or (client is not None and device is not None):
        raise ValueError("give one of mask, client and device")
    if client is None and mask is None:
        data = ready(data)
    masked = None if mask is None else Masked(data, mask, early)
    if norm is None:
        norm = survey(masked, pool).norm if masked else math.sqrt(squared_norm(data, pool))
    given: dict[str, Any] = {"norm": norm, "pool": pool, "after": tell}
    given |= {"rules": rules.turned(early), "masked": masked, "early": 0 if masked else early}
    interrupted, unsettled = False, list[Model]()
    batches = _batches(models, data, pool.threads)
    where: Any = nullcontext()
    if client is not None:
        where = on_workers(data, client)
    elif device is not None:
        columns = max((sum(m.rank for m in batch) for batch in batches), default=0)
        where = on_device(data, device, columns, rows)
    # The last iterations are those on the tensor: two are needed to see a fall.
    most = max_iter - 2
    try:
        with where as holder:
            on_tensor = {"rows": rows, "holder": holder, **given}
            small: dict[tuple[int | None, ...], Any] = {}
            for batch in batches:
                ours = {id(m): kept for kept, own in inside.items() for m in own}
                flagged = [m for m in batch if id(m) in ours]
                iterate(data, flagged, tol=tol, max_iter=min(FIRST, most), **on_tensor)
                flagged = [m for m in flagged if not m.converged and len(m.history) < most]
                for kept, own in inside.items():
                    unsettled = [m for m in flagged if ours[id(m)] == kept]
                    if not unsettled:
                        continue
                    if kept not in small:
                        small[kept] = compress(data, own[0].rank, pool)
                    finishing = False
                    for model in unsettled:
                        model.before = len(model.history)
                    iterate(small[kept], unsettled, tol=tol * TIGHTER, max_iter=most, **given)
                    for model in unsettled:
                        model.compressed_iterations = len(model.history) - model.before
                        model.before, model.converged = len(model.history), False
                    finishing, unsettled = True, []
                begun = [m for m in batch if m.before]
                fresh = [m for m in batch if not m.before]
                for part in (begun, fresh):
                    iterate(data, part, tol=tol, max_iter=max_iter, **on_tensor)
    except KeyboardInterrupt:
        interrupted = True
        for model in unsettled:
            model.converged = False
    out = []
    for model, spent in zip(models, seconds, strict=True):
        broken = interrupted and not model.converged and len(model.history) < max_iter
        turned = [] if broken else [model.factors[(m - early) % modes].T for m in range(modes)]
        out.append(
            Fit(
                tuple(turned),
                np.array(model.history),
                model.converged,
                model.compressed_iterations,
                spent,
                broken,
                np.array(model.penalized),
            )
        )
    return out


def _batches(models: list[Model], data: Any, threads: int) -> list[list[Model]]:
    """Divide models into as few lists as fit into memory side by side, in their order."""
    columns = math.prod(data.shape[1:])
    # Of each component: the Khatri-Rao product, and in each thread two products and a sum.
    each = columns * (np.dtype(data.dtype).itemsize * (1 + 2 * threads) + 8 * (1 + threads))
    batches: list[list[Model]] = []
    room = 0
    for model in models:
        size = model.rank * each
        if not batches or size > room:
            batches.append([])
            room = FUSED_BYTES
        batches[-1].append(model)
        room -= size
    return batches
