"""What models share while they are iterated: products, Gram matrices, who holds their rows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import Pool
from vitxr.factor.kernels import contract, hals_update, khatri_rao, l1_penalty, l1_terms
from vitxr.factor.rows import Holder, Keeper, Pass
from vitxr.factor.rules import Rules

__all__ = ["Compressed", "Model", "State"]

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
        How many iterations were made on a compressed tensor. Their residuals are those of the
        tensor only as far as the model lies within the bases.
    before
        How many iterations were made on another tensor, compressed or whole, or before that: a
        fall of the objective from them to the next says nothing.
    """

    factors: list[Array]
    history: list[float] = field(default_factory=list)
    penalized: list[float] = field(default_factory=list)
    converged: bool = False
    compressed_iterations: int = 0
    before: int = 0

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


class State:
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
        self.keeper = cast(Keeper, holder) if holder.keeps else None
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
        holder.take(self._first())

    def _first(self) -> Array:
        """First factors of all models below one another, taken out of the models."""
        ranks, n = [m.rank for m in self.models], self.models[0].factors[0].shape[1]
        out, start = np.empty((sum(ranks), n), self.dtype), 0
        for model, rank in zip(self.models, ranks, strict=True):
            out[start : start + rank] = model.factors[0]
            model.factors[0] = np.empty((rank, 0), self.dtype)
            start += rank
        return out

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
        if self.keeper is not None:
            lead = np.empty((sum(m.rank for m in self.models), 0), self.dtype)
        else:
            lead = np.concatenate(pool.each(lambda s: khatri_rao(s, self.dtype), sides))
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
            () if self.keeper is None else _stacked(sides),
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
        mttkrp = self._kept(sides, 1)
        self.inner = [
            float(np.vdot(contract(y, own, 0) if here is None else here, own[0]))
            for y, own, here in zip(self.products, sides, mttkrp, strict=True)
        ]

    def _kept(self, sides: list[list[Array]], mode: int) -> Sequence[Array | None]:
        """Products of Y for the update of a mode, of each model, from the one who keeps Y."""
        if self.keeper is None:
            return [None] * len(self.models)
        edges = np.cumsum([m.rank for m in self.models])[:-1]
        return np.split(self.keeper.contract(_stacked(sides), mode - 1), edges)

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
        if not free:
            return
        # All modes of a group in turn, unless someone else has to be asked before each.
        for step in [free] if self.keeper is None else [[mode] for mode in free]:
            kept = self._kept([self._sides(m) for m in self.models], step[0])
            pool.each(functools.partial(self._update_group, step, kept), groups)

    def _update_group(
        self, modes: list[int], kept: Sequence[Array | None], group: list[int]
    ) -> None:
        sides = [self._sides(self.models[i]) for i in group]
        for mode in modes:
            basis = None if self.compressed is None else self.compressed.sides[mode - 1]
            grams = np.array(
                [np.prod(self.grams[i][:mode] + self.grams[i][mode + 1 :], axis=0) for i in group]
            )
            products = []
            for i, side in zip(group, sides, strict=True):
                here = kept[i]
                products.append(
                    contract(self.products[i], side, mode - 1) if here is None else here
                )
            mttkrp = np.array(products, np.float64)
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


def _stacked(sides: list[list[Array]]) -> list[Array]:
    """Factors of each mode, those of all models below one another."""
    return [np.concatenate(own) for own in zip(*sides, strict=True)]


def _by_columns(pool: Pool, product: Callable[[slice], Array], n: int) -> Array:
    """A matrix product of ``n`` columns, divided among the threads."""
    edges = np.linspace(0, n, min(pool.threads, n) + 1).astype(int).tolist()
    return np.concatenate(
        pool.map(product, [slice(a, b) for a, b in itertools.pairwise(edges)]), axis=1
    )
