"""Vision Transformers as backbones: loading, structure, preprocessing, capture.

The only room that knows transformers. Nothing here is imported by ``import
vitxr``; torch and transformers come with the extra ``models``.
"""

from vitxr.models.backbone import Backbone
from vitxr.models.load import load_model

__all__ = ["Backbone", "load_model"]
