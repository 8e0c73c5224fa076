"""Labels of an extraction: every coordinate of the result, and where its numbers come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.models.backbone import Backbone
from vitxr.names import VARIABLES, Variable
from vitxr.stimuli.shifts import ShiftGrid

__all__ = ["coordinates", "provenance"]


def provenance(
    model: Backbone,
    shifts: ShiftGrid | None,
    preprocess: str,
    precision: str,
    storage_dtype: str,
) -> dict[str, Any]:
    """Attributes of the result: the model, its weights, its settings, the versions."""
    settings = model.preprocessing() if preprocess == "model" else {}
    return {
        "vitxr_version": __version__,
        **model.versions(),
        "model": model.name,
        "model_revision": model.revision,
        "model_fingerprint": model.fingerprint,
        "model_hooks": "; ".join(model.hooks()),
        "preprocess": preprocess,
        "preprocess_settings": json.dumps(settings, sort_keys=True, default=str),
        "precision": precision,
        "storage_dtype": storage_dtype,
        "shift_scheme": "none" if shifts is None else shifts.scheme,
        "shift_step": 0 if shifts is None else shifts.step,
        "input_height": model.input_size[0],
        "input_width": model.input_size[1],
        "patch_height": model.patch[0],
        "patch_width": model.patch[1],
        "prefix_tokens": len(model.prefix),
        "prefix_names": ", ".join(model.prefix),
        "heads": model.heads,
    }


def coordinates(
    stim: xr.Dataset,
    model: Backbone,
    layers: tuple[int, ...],
    variables: Mapping[str, Variable],
    frame: Mapping[str, tuple[int, ...]],
    lattice: xr.Dataset,
    maps: Mapping[str, Any],
) -> xr.Dataset:
    """Every coordinate of the result, in memory; ``maps`` are those that a choice makes."""
    ds = stim.coords.to_dataset()
    ds = ds.drop_vars([v for v in ds.variables if set(ds[v].dims) - {"image"}]).load()
    for name, text in list(ds.variables.items()):
        if text.dtype.kind == "U":
            # Zarr v3 has no fixed-width strings.
            ds[name] = text.astype(object)
    rows, columns = model.grid
    tokens = len(model.prefix) + rows * columns
    sizes = {
        dim: size
        for name, shape in frame.items()
        for dim, size in zip(variables[name].dims[0][3:], shape, strict=True)
    }
    extra: dict[str, Any] = {
        "layer": np.array(layers),
        "patch_row": np.arange(rows),
        "patch_col": np.arange(columns),
        "token": np.array(model.prefix, dtype=object),
        "head": np.arange(model.heads),
        "query": np.arange(tokens),
        "key": np.arange(tokens),
        "class": np.array(model.classes, dtype=object),
    }
    extra |= {dim: np.arange(size) for dim, size in sizes.items() if dim not in extra}
    extra |= maps
    named = np.array([*model.prefix, *map(str, np.ndindex(rows, columns))], dtype=object)
    for dim in ("query", "key"):
        name = f"{dim}_token"
        extra[name] = (dim, named[extra[dim]], VARIABLES[name].attrs)
    used = set(sizes)
    for key, value in extra.items():
        dims = value[0] if isinstance(value, tuple) else (key,)
        if used.issuperset((dims,) if isinstance(dims, str) else dims):
            ds = ds.assign_coords({key: value})
    return ds.merge(lattice)
