"""Nonnegative CP of several models in one blocked pass over the tensor an iteration."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vitxr.factor.blocks import BLOCK_BYTES, Pool, block_rows
from vitxr.factor.masks import MASKED_BYTES, Masked
from vitxr.factor.rows import Holder, LocalRows
from vitxr.factor.rules import Rules
from vitxr.factor.state import Compressed, Model, State

__all__ = ["iterate"]


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
    state = State(active, compressed, holder, np.dtype(data.dtype), rules, norm, masked is not None)
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
    state: State,
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
        seen = len(counts) - model.before
        model.converged = seen > 1 and counts[-2] - counts[-1] < tol
        keep.append(not model.converged and len(model.history) < max_iter)
        if not keep[-1]:
            state.finish(i)  # before the call: it may raise
        if after is not None:
            after(model)
    if not all(keep):
        state.drop(keep)
