"""Nonnegative CP of several models in one blocked pass over the tensor an iteration."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import BLOCK_BYTES, Pool, block_rows
from vitxr.factor.kernels import contract, hals_update, khatri_rao, l1_penalty, l1_terms
from vitxr.factor.masks import MASKED_BYTES, Masked
from vitxr.factor.rows import Holder, LocalRows, Pass
from vitxr.factor.rules import Rules

__all__ = ["Compressed", "Model", "iterate"]

Array = npt.NDArray[Any]

#: Smallest divisor of an update, for data of norm 1 or more.
FLOOR = 1e-6


@dataclass
class Model:
    """One model while it is fitted.

    Attributes
    ----------
    factors
        Component-major, ``(rank, n)``, in the order of the modes of the tensor that is walked
        over: the first in the dtype of the data, the others float64. While the model is iterated
        its first factor is elsewhere, and comes back when it has ended.
    history
        Relative residual after each iteration.
    penalized
        ``sqrt(residual^2 + 2 penalty)`` after each iteration, where there is a penalty.
    converged
        Whether the tolerance ended the fit.
    compressed_iterations
        How many of the first iterations were made on a compressed tensor. Their residuals are
        those of the tensor only as far as the model lies within the bases.
    """

    factors: list[Array]
    history: list[float] = field(default_factory=list)
    penalized: list[float] = field(default_factory=list)
    converged: bool = False
    compressed_iterations: int = 0

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.factors[0])


@dataclass(frozen=True)
class Compressed:
    """A tensor compressed in some of its modes, ``X = core x_0 rows x_m sides[m] ...``.

    Attributes
    ----------
    rows
        Orthonormal basis of the first mode, ``(n_0, d_0)``, in the dtype of the data.
    core
        ``(d_0, d_1 d_2 ...)``, in the dtype of the data.
    sides
        Orthonormal basis ``(n_m, d_m)`` of each other mode, float64; None where it is whole.
    """

    rows: Array
    core: Array
    sides: tuple[Array | None, ...]


def iterate(
    x: Any,
    models: Sequence[Model],
    *,
    norm: float,
    tol: float,
    max_iter: int,
    pool: Pool,
    rules: Rules | None = None,
    masked: Masked | None = None,
    holder: Holder | None = None,
    early: int = 0,
    rows: int | None = None,
    after: Callable[[Model], object] | None = None,
) -> None:
    """Iterate HALS on all models, in place, until each has converged or is at its limit.

    For a block ``X_b`` of rows of the first mode, the columns of all models side by side,

    - ``M_b = X_b KR(B, C, ...)`` and HALS on those rows of every ``A``;
    - ``Y += A_b^T X_b``, from which the products of all other modes follow.

    A model takes no further part when it has converged. On a :class:`Compressed` tensor the same
    is done with ``rows`` in place of ``X``, and the core between it and the other modes.

    Parameters
    ----------
    x
        Tensor, float32 or float64, NumPy or Dask, the mode to walk over in front
        (:func:`vitxr.factor.blocks.rotate`); or :class:`Compressed`.
    models
        Models to fit. Their iterations so far count towards the limit.
    norm
        Norm of the tensor, of which the history has its unit.
    tol, max_iter
        The fit of a model ends when its objective falls by less than ``tol``, a rise included,
        or with its iteration ``max_iter``. With a penalty it is ``penalized`` that counts.
    pool
        Threads over blocks. Sums over blocks are taken in an order that depends on their number
        only.
    rules
        What is asked of the factors, in the order of the modes of ``x``; by default that they are
        nonnegative.
    masked
        The same tensor with the entries that count. What does not is filled in by each model as
        it was before the iteration. Its objective is known in the next pass, so that there is
        one more pass than iterations.
    holder
        Who holds the rows of ``x``; by default this process does.
    early
        How many of the last modes come before the first one in an iteration: where the mode in
        front is not the first of the notebook's. They are updated once before the first pass,
        which takes one more, and after the objective then: so the iterates are the notebook's.
        After iterations on a compressed tensor, the first pass begins where it is.
    rows
        Rows of a block.
    after
        Called with each model after each of its iterations.
    """
    compressed = x if isinstance(x, Compressed) else None
    data = x if compressed is None else compressed.rows
    if rows is None:
        size = BLOCK_BYTES if masked is None else MASKED_BYTES
        rows = block_rows(data.shape, data.dtype.itemsize, size)
    active = [m for m in models if len(m.history) < max_iter and not m.converged]
    # Models of one rank side by side: the small modes of all of them are updated in common.
    active.sort(key=lambda m: m.rank)
    if not active:
        return
    modes = len(active[0].factors)
    holder = holder or LocalRows(data, rows, pool, masked)
    rules = rules or Rules.plain(modes)
    state = _State(
        active, compressed, holder, np.dtype(data.dtype), rules, norm, masked is not None
    )
    ends = functools.partial(_ends, tol=tol, max_iter=max_iter, after=after)
    if masked is not None:
        begun = False
        while state.models:
            penalties = state.penalties()
            state.accumulate(pool)
            if begun:  # what is known now are the objectives of the models before this pass
                ends(state, state.missed(), penalties)
            state.update(range(1, modes), pool)
            begun = True
        return
    if early and not active[0].compressed_iterations:
        state.accumulate(pool, update=False)
        state.update(range(modes - early, modes), pool)
    while state.models:
        state.accumulate(pool)
        state.update(range(1, modes - early), pool)
        ends(state, state.residuals(), state.penalties())
        if early:
            state.update(range(modes - early, modes), pool)


def _ends(
    state: _State,
    residuals: list[float],
    penalties: list[float] | None,
    *,
    tol: float,
    max_iter: int,
    after: Callable[[Model], object] | None,
) -> None:
    """Note the residuals after an iteration, and take out the models of which it was the last."""
    keep = []
    for i, (model, residual) in enumerate(zip(state.models, residuals, strict=True)):
        model.history.append(residual)
        counts = model.history
        if penalties is not None:
            model.penalized.append(math.sqrt(residual**2 + 2 * penalties[i]))
            counts = model.penalized
        seen = len(counts) - model.compressed_iterations
        model.converged = seen > 1 and counts[-2] - counts[-1] < tol
        keep.append(not model.converged and len(model.history) < max_iter)
        if not keep[-1]:
            state.finish(i)  # before the call: it may raise
        if after is not None:
            after(model)
    if not all(keep):
        state.drop(keep)


class _State:
    """What the unfinished models share in an iteration: products, Grams, the holder of rows.

    While a model is here its first factor is with the holder.
    """

    def __init__(
        self,
        models: list[Model],
        compressed: Compressed | None,
        holder: Holder,
        dtype: Any,
        rules: Rules,
        norm: float,
        refills: bool,
    ):
        self.models, self.compressed = models, compressed
        self.holder, self.dtype, self.rules, self.norm = holder, dtype, rules, norm
        self.refills = refills
        modes = len(models[0].factors)
        self.floor = FLOOR * min(1.0, norm ** (2 * (modes - 1) / modes))
        self.grams = [
            [np.asarray(f, np.float64) @ np.asarray(f.T, np.float64) for f in m.factors]
            for m in models
        ]
        self.totals = [[f.sum(axis=1, dtype=np.float64) for f in m.factors] for m in models]
        self.products: list[Array] = []
        self.inner = [0.0] * len(models)
        self.squares_missed = [0.0] * len(models)
        holder.take(np.concatenate([m.factors[0] for m in models]))

    def finish(self, number: int) -> None:
        """Give a model its first factor."""
        start = sum(m.rank for m in self.models[:number])
        model = self.models[number]
        model.factors[0] = self.holder.give(slice(start, start + model.rank))

    def drop(self, keep: list[bool]) -> None:
        """Take models out."""
        self.holder.keep(np.repeat(keep, [m.rank for m in self.models]))
        self.models = list(itertools.compress(self.models, keep))
        self.grams = list(itertools.compress(self.grams, keep))
        self.totals = list(itertools.compress(self.totals, keep))
        self.products = list(itertools.compress(self.products, keep))
        self.inner = list(itertools.compress(self.inner, keep))
        self.squares_missed = list(itertools.compress(self.squares_missed, keep))

    def _sides(self, model: Model) -> list[Array]:
        """Factors of all modes but the first, in the bases of a compressed tensor."""
        if self.compressed is None:
            return model.factors[1:]
        sides = zip(model.factors[1:], self.compressed.sides, strict=True)
        return [f if basis is None else f @ basis for f, basis in sides]

    def accumulate(self, pool: Pool, update: bool = True) -> None:
        """One pass over the tensor: update the first mode (unless told not to), then Y."""
        fixed = self.rules.fixed[0]
        sides = [self._sides(m) for m in self.models]
        if fixed and self.products and not self.refills:  # Y stays as it is
            self._inner_of(sides)
            return
        core = None if self.compressed is None else self.compressed.core
        lead = np.concatenate(_each(pool, lambda s: khatri_rao(s).astype(self.dtype), sides))
        if core is not None:
            lead = _by_columns(pool, lambda part: lead @ core[part].T, len(core))
        update = update and not fixed
        linear, ridge = zip(*(self._terms(i, 0) for i in range(len(self.models))), strict=True)
        task = Pass(
            lead,
            [np.prod(g[1:], axis=0) + np.diag(d) for g, d in zip(self.grams, ridge, strict=True)],
            self.floor if update else None,
            self.rules.nonnegative[0],
            np.concatenate(linear).astype(self.dtype)[:, None] if self.rules.sparsity[0] else None,
        )
        sums = self.holder.run(task)
        y = sums.y
        if core is not None:
            small = y.astype(self.dtype)
            y = _by_columns(pool, lambda part: small @ core[:, part], core.shape[1])
        self.products = [y[where] for where in task.models]
        self.squares_missed = sums.missed.tolist()
        if update:
            self.inner = sums.inner.tolist()
            for i, where in enumerate(task.models):
                self.grams[i][0], self.totals[i][0] = sums.squares[i], sums.totals[where]
        elif fixed:
            self._inner_of(sides)

    def _inner_of(self, sides: list[list[Array]]) -> None:
        """Take ``<X, M>`` from Y."""
        pairs = zip(self.products, sides, strict=True)
        self.inner = [float(np.vdot(y, khatri_rao(s))) for y, s in pairs]

    def update(self, modes: range, pool: Pool) -> None:
        """Update other modes from Y, models of one rank in common."""
        if not self.models:
            return
        ranks = [m.rank for m in self.models]
        groups = [
            [i for i, _ in group]
            for _, group in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1])
        ]
        free = [mode for mode in modes if not self.rules.fixed[mode]]
        _each(pool, lambda group: self._update_group(group, free), groups)

    def _update_group(self, group: list[int], modes: list[int]) -> None:
        sides = [self._sides(self.models[i]) for i in group]
        for mode in modes:
            basis = None if self.compressed is None else self.compressed.sides[mode - 1]
            grams = np.array(
                [np.prod(self.grams[i][:mode] + self.grams[i][mode + 1 :], axis=0) for i in group]
            )
            mttkrp = np.array(
                [
                    contract(self.products[i], side, mode - 1)
                    for i, side in zip(group, sides, strict=True)
                ],
                np.float64,
            )
            if basis is not None:
                mttkrp = mttkrp @ basis.T
            target = mttkrp
            if any(self.rules.sparsity):
                linear, ridge = np.swapaxes([self._terms(i, mode) for i in group], 0, 1)
                target = mttkrp - linear[:, :, None]
                grams += ridge[:, :, None] * np.eye(len(ridge[0]))
            factors = np.array([self.models[i].factors[mode] for i in group])
            hals_update(factors, target, grams, self.floor, self.rules.nonnegative[mode])
            for j, i in enumerate(group):
                factor = factors[j]
                self.models[i].factors[mode] = factor
                self.grams[i][mode] = factor @ factor.T
                self.totals[i][mode] = factor.sum(axis=1)
                self.inner[i] = float(np.vdot(factor, mttkrp[j]))
                sides[j][mode - 1] = factor if basis is None else factor @ basis

    def _columns(self, number: int) -> tuple[Array, Array, Array]:
        """Weights of the penalty, lengths and sums of the columns of a model's factors."""
        lengths = np.sqrt([np.diagonal(gram) for gram in self.grams[number]])
        return np.array(self.rules.sparsity), lengths, np.array(self.totals[number])

    def _terms(self, number: int, mode: int) -> tuple[Array, Array]:
        """What the penalty does to the update of a mode."""
        if not any(self.rules.sparsity):
            rank = self.models[number].rank
            return np.zeros(rank), np.zeros(rank)
        weights, lengths, totals = self._columns(number)
        return l1_terms(self.norm * weights, lengths, totals, mode)

    def penalties(self) -> list[float] | None:
        """Penalties of the models, of the tensor divided by its norm; None without one."""
        if not any(self.rules.sparsity):
            return None
        return [l1_penalty(*self._columns(i)) / self.norm for i in range(len(self.models))]

    def missed(self) -> list[float]:
        """Relative residuals of the entries that count, of the models before the last pass."""
        return [math.sqrt(square) / self.norm for square in self.squares_missed]

    def residuals(self) -> list[float]:
        """Relative residuals, from the product of the mode that was updated last."""
        out = []
        for inner, grams in zip(self.inner, self.grams, strict=True):
            square = self.norm**2 - 2 * inner + float(np.prod(grams, axis=0).sum())
            out.append(math.sqrt(max(square, 0.0)) / self.norm)  # rounding may leave -1e-17
        return out


def _each(pool: Pool, task: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Call a task with every item, divided evenly among the threads."""
    parts = [items[i :: pool.threads] for i in range(min(pool.threads, len(items)))]
    done = pool.map(lambda part: [task(item) for item in part], parts)
    return [done[i % len(parts)][i // len(parts)] for i in range(len(items))]


def _by_columns(pool: Pool, product: Callable[[slice], Array], n: int) -> Array:
    """A matrix product of ``n`` columns, divided among the threads."""
    edges = np.linspace(0, n, min(pool.threads, n) + 1).astype(int).tolist()
    return np.concatenate(
        pool.map(product, [slice(a, b) for a, b in itertools.pairwise(edges)]), axis=1
    )
