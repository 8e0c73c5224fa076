"""What factors show: embeddings of neurons and the manifolds they form."""

from __future__ import annotations

from vitxr.analysis.embed import embed

__all__ = ["embed"]
