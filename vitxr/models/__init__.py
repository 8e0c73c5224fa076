"""Vision Transformers as backbones: loading, structure, preprocessing, capture.

The only room that knows transformers and timm. Nothing here is imported by ``import
vitxr``; torch and transformers come with the extra ``models``, timm with ``timm``.
"""

from vitxr.models.backbone import Backbone
from vitxr.models.load import load_model
from vitxr.models.preprocess import Preprocess
from vitxr.models.structure import Adapter

__all__ = ["Adapter", "Backbone", "Preprocess", "load_model"]
