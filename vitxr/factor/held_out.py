"""Speckled cross-validation: how well models describe entries that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.factor.blocks import blocked_mode, own_threads, rotate
from vitxr.factor.checks import Tensor
from vitxr.factor.fits import Tell, fit_jobs
from vitxr.factor.masks import Masked, Speckle, masked_errors, survey

__all__ = ["HELD_OUT", "held_out"]

Array = npt.NDArray[Any]

#: Share of the entries that is held out.
HELD_OUT = 0.1


def held_out(
    tensor: Tensor,
    jobs: Sequence[tuple[int, int]],
    settings: dict[str, Any],
    seed: int,
    tell: Tell | None = None,
) -> tuple[Array, Array]:
    """Fit all jobs to nine tenths of the entries, scattered over the tensor.

    Which entries are held out is drawn block by block and never stored
    (:class:`vitxr.factor.masks.Speckle`). Every neuron, image and shift is seen in other entries,
    so that all its loadings are fitted, and a model predicts what is held out.

    Parameters
    ----------
    tensor
        A tensor without a mask.
    jobs
        Rank and seed of each fit, by "ncp_hals".
    settings
        ``method``, ``tol``, ``max_iter`` and ``options``.
    seed
        Seed of the draw.
    tell
        As for :func:`vitxr.factor.methods.fit`.

    Returns
    -------
    train, test
        For each job the relative residual ``|W (X - M)| / |W X|``, ``W`` being the entries that
        were kept, and those held out.

    Raises
    ------
    DataError
        If nothing is left of a slice of the tensor.
    """
    mask = Speckle(HELD_OUT, seed)
    mode = blocked_mode(tensor.data)
    with own_threads() as pool:
        left = survey(Masked(rotate(tensor.data, mode), mask, mode), pool)
    size, count = math.prod(tensor.data.shape), int(left.counts[0].sum())
    start_norm = left.norm * math.sqrt(size / count)
    masked = replace(tensor, norm=left.norm, mask=mask, start_norm=start_norm)
    # Masked fits are never compressed.
    options = {name: value for name, value in settings["options"].items() if name != "compress"}
    fits, _, interrupted = fit_jobs(masked, jobs, {**settings, "options": options}, tell)
    if interrupted:
        raise KeyboardInterrupt
    models = []
    for f in fits:
        factors = [np.asarray(f[f"{d}_factor"].values, np.float64) for d in tensor.labelled.dims]
        models.append([factors[0] * f["weight"].values, *factors[1:]])
    return masked_errors(tensor.data, models, mask)
