"""Neuron tensors to labelled factors: nonnegative CP, tensorly's methods, ensembles."""

from __future__ import annotations

from vitxr.factor.checks import METHODS
from vitxr.factor.ensemble import align, best, fit_ensemble, similarity
from vitxr.factor.methods import factorize

__all__ = ["METHODS", "align", "best", "factorize", "fit_ensemble", "similarity"]
