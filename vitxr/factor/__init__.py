"""Neuron tensors to labelled factors: nonnegative CP, tensorly's methods, ensembles."""

from __future__ import annotations

from vitxr.factor.aligned import factorize_aligned, roll
from vitxr.factor.checks import METHODS
from vitxr.factor.compare import align, congruence, factor_match_score, similarity
from vitxr.factor.consistency import core_consistency
from vitxr.factor.convert import from_tensorly, to_tensorly
from vitxr.factor.ensemble import best, fit_ensemble
from vitxr.factor.methods import factorize
from vitxr.factor.rank import choose_rank
from vitxr.factor.reconstruct import explained, reconstruct
from vitxr.factor.smooth import smooth
from vitxr.factor.transform import transform

__all__ = [
    "METHODS",
    "align",
    "best",
    "choose_rank",
    "congruence",
    "core_consistency",
    "explained",
    "factor_match_score",
    "factorize",
    "factorize_aligned",
    "fit_ensemble",
    "from_tensorly",
    "reconstruct",
    "roll",
    "similarity",
    "smooth",
    "to_tensorly",
    "transform",
]
