"""What is to be seen: embeddings of factors, and what the model takes images for."""

from __future__ import annotations

from vitxr.analysis.classes import top_classes
from vitxr.analysis.embed import embed

__all__ = ["embed", "top_classes"]
