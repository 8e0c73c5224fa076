"""Holders of rows: what is done, in one pass over the tensor, with the rows of the first mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import Pool, Share, ready, row_blocks, shares
from vitxr.factor.kernels import hals_update
from vitxr.factor.masks import Masked

__all__ = ["Holder", "LocalRows", "Pass", "Sums", "sweep", "sweep_masked"]

Array = npt.NDArray[Any]

#: Blocks over which products are added up in the dtype of the data, before float64: that takes a
#: quarter of the time, and of so few it loses nothing beside what a product itself does.
PARTIAL = 4


@dataclass(frozen=True)
class Pass:
    """What every holder of rows is told before a pass over the tensor.

    Attributes
    ----------
    lead
        Khatri-Rao products of the other modes, those of all models below one another:
        ``(columns, product of the other modes)``, in the dtype of the data; for a
        :class:`Keeper` ``(columns, 0)``, since it makes them itself.
    grams
        For each model the product of the other modes' Gram matrices, ``(rank, rank)``, float64;
        a penalty may have been added to its diagonal.
    floor
        Smallest divisor of an update; None leaves the first factors as they are.
    nonnegative
        Whether the first factors are kept nonnegative.
    linear
        For each column what a penalty takes off the products of its factor, ``(columns, 1)``, in
        the dtype of the data; None is nothing.
    sides
        For a :class:`Keeper`, the factors of each of the other modes, those of all models below
        one another.
    """

    lead: Array
    grams: Sequence[Array]
    floor: float | None
    nonnegative: bool = True
    linear: Array | None = None
    sides: Sequence[Array] = ()

    @property
    def models(self) -> list[slice]:
        """The columns of each model."""
        edges = np.cumsum([0, *(len(g) for g in self.grams)]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


@dataclass
class Sums:
    """What a holder adds up over its rows, float64.

    Attributes
    ----------
    y
        ``A^T X``, of all models below one another: ``(columns, product of the other modes)``;
        of a :class:`Keeper` ``(columns, 0)``.
    squares
        For each model the Gram matrix of its first factor; of zeros where nothing was updated.
    inner
        For each model ``<X, M>``; zero where nothing was updated.
    totals
        Sums of the columns of the first factors, where there is a penalty; zero elsewhere.
    missed
        Where there is a mask, for each model ``|X - M|^2`` of the entries that count, before the
        pass; zero elsewhere.
    """

    y: Array
    squares: list[Array]
    inner: Array
    totals: Array
    missed: Array

    @classmethod
    def zeros(cls, task: Pass) -> Sums:
        """Return sums of nothing."""
        columns, models = len(task.lead), len(task.grams)
        squares = [np.zeros_like(g) for g in task.grams]
        return cls(
            np.zeros(task.lead.shape),
            squares,
            np.zeros(models),
            np.zeros(columns),
            np.zeros(models),
        )

    def __iadd__(self, other: Sums) -> Sums:
        self.y += other.y
        for mine, theirs in zip(self.squares, other.squares, strict=True):
            mine += theirs
        self.inner += other.inner
        self.totals += other.totals
        self.missed += other.missed
        return self


class Holder(Protocol):
    """Keeps rows of the tensor, and the same rows of the first factors of all active models.

    There are holders of an array in this process, on a device, and on the workers of a cluster.
    Between passes nothing but :class:`Pass` and :class:`Sums` goes in and out.

    Attributes
    ----------
    keeps
        Whether it is a :class:`Keeper`.
    """

    keeps: bool

    def take(self, factor: Array) -> None:
        """Take over first factors, those of all models below one another, ``(columns, n)``."""

    def run(self, task: Pass) -> Sums:
        """Make one pass over the tensor."""

    def give(self, columns: slice) -> Array:
        """Return first factors, a copy; where there is a mask, those before the last pass."""

    def keep(self, columns: Array) -> None:
        """Go on with some of the columns, a mask."""


class Keeper(Holder, Protocol):
    """A holder from which Y does not come back, but its products with the small factors."""

    def contract(self, sides: Sequence[Array], keep: int) -> Array:
        """Multiply Y of the last pass by the factors of all other modes but one.

        Returns ``(columns, n_keep)``: :func:`vitxr.factor.kernels.contract`.
        """


class LocalRows:
    """Threads over blocks of one array, NumPy or Dask, the mode to walk over in front."""

    keeps = False

    def __init__(self, data: Any, rows: int, pool: Pool, masked: Masked | None = None):
        self._data = data if masked else ready(data)
        self._rows, self._pool, self._masked = rows, pool, masked
        self._walk = shares(data, rows, pool.threads)
        self._factor: Array = np.empty((0, data.shape[0]), data.dtype)
        self._before: Array = self._factor

    def take(self, factor: Array) -> None:
        """Take over first factors."""
        self._factor = factor

    def give(self, columns: slice) -> Array:
        """Return first factors, a copy; where there is a mask, those before the last pass."""
        factor = self._factor if self._masked is None else self._before
        return factor[columns].copy()

    def keep(self, columns: Array) -> None:
        """Go on with some of the columns, a mask."""
        self._factor = self._factor[columns]

    def run(self, task: Pass) -> Sums:
        """Make one pass over the tensor."""
        masked = self._masked
        if masked is not None:
            self._before = self._factor.copy()

        def work(share: Share) -> Sums:
            if masked is not None:
                walk = masked.walk(self._rows, share)
                return sweep_masked(walk, self._factor, task, self._pool.turn)
            blocks = row_blocks(self._data, self._rows, share)
            return sweep(blocks, self._factor, task, self._pool.turn)

        total, *others = self._pool.map(work, self._walk)
        for part in others:
            total += part
        return total


def sweep(
    blocks: Iterable[tuple[slice, Array]],
    factor: Array,
    task: Pass,
    turn: AbstractContextManager[Any],
) -> Sums:
    """Update the rows of the first factors that belong to blocks, and sum up.

    For a block ``X_b``, the columns of all models side by side: ``M_b = X_b KR(B, C, ...)`` and
    HALS on those rows of every ``A``, then ``Y += A_b^T X_b``.

    Parameters
    ----------
    blocks
        Rows, and the block ``(rows, product of the other modes)``.
    factor
        First factors of all models below one another, ``(columns, n)``; overwritten at the rows
        of the blocks.
    task
        What is the same for all holders.
    turn
        Held while HALS runs: its many short calls would have threads wait for the interpreter.
    """
    models, out = task.models, Sums.zeros(task)
    product, partial = np.empty((2, *task.lead.shape), factor.dtype)
    number = -1
    for number, (where, block) in enumerate(blocks):
        tile = np.ascontiguousarray(factor[:, where])
        if task.floor is not None:
            mttkrp = task.lead @ block.T
            target = mttkrp if task.linear is None else mttkrp - task.linear
            with turn:
                for part, gram in zip(models, task.grams, strict=True):
                    hals_update(tile[part], target[part], gram, task.floor, task.nonnegative)
            for i, part in enumerate(models):
                own = tile[part].astype(np.float64)
                out.squares[i] += own @ own.T
                out.inner[i] += np.vdot(own, mttkrp[part])
            if task.linear is not None:
                out.totals += tile.sum(axis=1, dtype=np.float64)
            factor[:, where] = tile
        first, last = number % PARTIAL == 0, (number + 1) % PARTIAL == 0
        np.matmul(tile, block, out=partial if first else product)
        if not first:
            partial += product
        if last:
            out.y += partial
    if (number + 1) % PARTIAL:
        out.y += partial
    return out


def sweep_masked(
    blocks: Iterable[tuple[slice, Array, Array, Array | None]],
    factor: Array,
    task: Pass,
    turn: AbstractContextManager[Any],
) -> Sums:
    """Do as :func:`sweep` does, with what does not count filled in by each model itself.

    In a block ``X_b`` entries that do not count are those of the model as it was before the pass,
    and the update is that of the full block: the expectation and the maximization of an EM
    algorithm. ``|X - M|`` of the entries that count cannot rise by it.

    Parameters
    ----------
    blocks
        Rows, the block, the entries that count: :meth:`vitxr.factor.masks.Masked.walk`.
    factor, task, turn
        As for :func:`sweep`.
    """
    models, out = task.models, Sums.zeros(task)
    for where, block, kept, _ in blocks:
        tile = np.ascontiguousarray(factor[:, where])
        model, filled = np.empty((2, *block.shape), factor.dtype)
        for i, (part, gram) in enumerate(zip(models, task.grams, strict=True)):
            own, lead = tile[part], task.lead[part]
            np.matmul(own.T, lead, out=model)
            filled[...] = model
            np.copyto(filled, block, where=kept)
            model -= filled
            # By row: a long sum in float32 would lose digits.
            out.missed[i] += np.vecdot(model, model).astype(np.float64).sum()
            if task.floor is not None:
                target = lead @ filled.T
                if task.linear is not None:
                    target -= task.linear[part]
                with turn:
                    hals_update(own, target, gram, task.floor, task.nonnegative)
                double = own.astype(np.float64)
                out.squares[i] += double @ double.T
                out.totals[part] += double.sum(axis=1)
            out.y[part] += own @ filled
        factor[:, where] = tile
    return out
