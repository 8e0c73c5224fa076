"""The exceptions vitxr raises. One base class, one class a kind of remedy.

Every message names what was given, what was expected and what to do about it.
Each class also derives from the built-in a NumPy or xarray user would catch.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "DataError",
    "DependencyError",
    "ImageError",
    "ModelError",
    "StoreError",
    "VitxrError",
]


class VitxrError(Exception):
    """Base of every exception vitxr raises on purpose."""


class ArgumentError(VitxrError, ValueError):
    """An argument is out of range or of the wrong kind: correct the call."""


class DataError(VitxrError, ValueError):
    """Data lack a variable, dimension or property that the step needs."""


class ImageError(VitxrError, ValueError):
    """An image cannot be used: missing, truncated, oversized or ambiguous."""


class ModelError(VitxrError, RuntimeError):
    """A model cannot be found, loaded or understood."""


class StoreError(VitxrError, OSError):
    """A store is missing, unfinished, damaged or in the way."""


class DependencyError(VitxrError, ImportError):
    """An optional package is missing: install the extra the message names."""
