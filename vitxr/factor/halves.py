"""Split-half reproducibility: whether two halves of the neurons give the same factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from vitxr.errors import DataError
from vitxr.factor import checks
from vitxr.factor.compare import factor_match_score
from vitxr.factor.fits import Tell, fit_jobs, least

__all__ = ["halves", "split_half"]

Array = npt.NDArray[Any]


def halves(t: xr.DataArray, seed: int) -> Iterator[xr.DataArray]:
    """Two random halves of a tensor along its first dimension, in their order.

    Examples
    --------
    >>> t = xr.DataArray(np.arange(5), dims="neuron")
    >>> sorted(n for half in halves(t, seed=0) for n in half.values.tolist())
    [0, 1, 2, 3, 4]
    """
    n = t.shape[0]
    order = np.random.default_rng(seed).permutation(n)
    for part in (order[: n // 2], order[n // 2 :]):
        yield t.isel({t.dims[0]: np.sort(part)})


def split_half(
    t: xr.DataArray,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    seed: int,
    tell: Tell | None = None,
) -> tuple[Array, str]:
    """Fit two random halves of the neurons apart, and compare their other factors.

    Of each half and rank the fit of least objective counts. The score is the factor match score
    without the neurons and without weights: the mean over matched components of the product of
    cosines of the image factor and of the shift factor.

    Parameters
    ----------
    t
        The tensor, neurons first.
    jobs
        Rank and seed of each fit; of every rank as many, one after the other.
    settings
        ``method``, ``tol``, ``max_iter`` and ``options``.
    seed
        Seed of the division.
    tell
        As for :func:`vitxr.factor.methods.fit`.

    Returns
    -------
    scores
        One for each rank, in the order of the jobs. NaN where no fit of a half has a model, and
        of all ranks where a half cannot be fitted.
    why
        Why a half cannot be fitted, as when all of its neurons are silent; empty where both can.
    """
    ranks = list(dict.fromkeys(rank for rank, _ in jobs))
    each = len(jobs) // len(ranks)
    models: list[list[xr.Dataset | None]] = []
    for half in halves(t, seed):
        try:
            tensor = checks.prepare(half, settings["method"], settings["options"])
        except DataError as error:
            return np.full(len(ranks), np.nan), f"of one half of {t.dims[0]}, {error}"
        fits, _, interrupted = fit_jobs(tensor, jobs, settings, tell)
        if interrupted:
            raise KeyboardInterrupt
        own = [fits[i : i + each] for i in range(0, len(fits), each)]
        chosen = [least([float(f["objective"]) for f in of_rank]) for of_rank in own]
        models.append([own[i][k] if k >= 0 else None for i, k in enumerate(chosen)])
    scores = [
        np.nan if f is None or g is None else factor_match_score(f, g, skip=t.dims[0])
        for f, g in zip(*models, strict=True)
    ]
    return np.array(scores), ""
