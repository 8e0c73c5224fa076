"""vitxr: what a Vision Transformer's neurons do, on xarray, Dask and Zarr.

Images, circularly shifted, go through a Vision Transformer; every activation is
kept with its labels, becomes a neuron tensor, nonnegative factors, an embedding
and pictures. Importing vitxr loads neither torch, transformers nor panel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vitxr.accessor as _accessor  # noqa: F401 (registers .vit)
from vitxr import errors, names, stimuli, store, tensors
from vitxr._version import __version__
from vitxr.extract import estimate, extract
from vitxr.matlab import read_mat
from vitxr.stimuli import ShiftGrid, open_images, read_image
from vitxr.store import open_store as open  # noqa: A004 (the public name; the builtin is not used)
from vitxr.store import save, verify

if TYPE_CHECKING:
    from vitxr import analysis, catalog, factor, models, plot, report
    from vitxr.app import browse
    from vitxr.factor import factorize, fit_ensemble
    from vitxr.models import load_model
    from vitxr.stimuli import datasets

__all__ = [
    "ShiftGrid",
    "__version__",
    "analysis",
    "browse",
    "catalog",
    "datasets",
    "errors",
    "estimate",
    "extract",
    "factor",
    "factorize",
    "fit_ensemble",
    "load_model",
    "models",
    "names",
    "open",
    "open_images",
    "plot",
    "read_image",
    "read_mat",
    "report",
    "save",
    "stimuli",
    "store",
    "tensors",
    "verify",
]

# Loaded when first used: they stand on optional or slow packages.
_LAZY = {
    "analysis": ("vitxr.analysis", None),
    "browse": ("vitxr.app", "browse"),
    "catalog": ("vitxr.catalog", None),
    "datasets": ("vitxr.stimuli.datasets", None),
    "factor": ("vitxr.factor", None),
    "factorize": ("vitxr.factor", "factorize"),
    "fit_ensemble": ("vitxr.factor", "fit_ensemble"),
    "load_model": ("vitxr.models", "load_model"),
    "models": ("vitxr.models", None),
    "plot": ("vitxr.plot", None),
    "report": ("vitxr.report", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vitxr' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = import_module(module)
    return value if attribute is None else getattr(value, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
