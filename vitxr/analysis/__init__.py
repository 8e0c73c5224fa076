"""What is to be seen: embeddings of factors, and what the model takes images for."""

from __future__ import annotations

from vitxr.analysis.classes import top_classes
from vitxr.analysis.embed import embed
from vitxr.analysis.equivariance import equivariance, unshift

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_map",
    "attention_rollout",
    "embed",
    "equivariance",
    "mass_mask",
    "patch_filters",
    "position_similarity",
    "relevance",
    "top_classes",
    "unshift",
]
