"""What is to be seen: embeddings of factors, and what the model takes images for."""

from __future__ import annotations

from vitxr.analysis.classes import top_classes
from vitxr.analysis.embed import embed
from vitxr.analysis.equivariance import equivariance, unshift

__all__ = ["embed", "equivariance", "top_classes", "unshift"]
