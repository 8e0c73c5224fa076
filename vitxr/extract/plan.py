"""What an extraction will compute: arguments checked, labels laid out, units cut."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import ArgumentError
from vitxr.extract import checks
from vitxr.extract.ranking import rank_channels
from vitxr.models.backbone import Backbone
from vitxr.models.load import Reference
from vitxr.names import VARIABLES
from vitxr.stimuli.images import altered
from vitxr.stimuli.shifts import ShiftGrid, no_shifts

__all__ = ["Plan", "Unit", "make_plan"]

#: What a task needs to know of its image.
_OF_IMAGE = ("image", "label", "source", "height", "width", "sha256")
_PRECISION = ("float32", "bfloat16")
_STORAGE = ("float32", "float16")
#: Bytes of one layer of one unit: shards are about this large.
_SHARD_BYTES = 40_000_000
#: Feature maps in an inner chunk of a shard.
_CHUNK_MAPS = 16


@dataclass(frozen=True)
class Unit:
    """One piece of work: some rows of the lattice for one image."""

    index: int
    image: int
    rows: slice

    @property
    def region(self) -> dict[str, slice]:
        """Where its results go, by dimension."""
        return {"image": slice(self.image, self.image + 1), "shift_y": self.rows}


@dataclass(frozen=True)
class Task:
    """A unit with all it needs and nothing else: what is sent to a worker.

    Attributes
    ----------
    model
        The model, or how to load it.
    stim
        The one image.
    offsets
        (frame, 2) vertical and horizontal offsets, row by row.
    columns
        Frames in a row.
    row
        Lattice row of the first frame, for messages.
    layers, variables, channels, preprocess, dtype, batch
        As in the plan.
    """

    model: Reference
    stim: xr.Dataset
    offsets: np.ndarray
    columns: int
    row: int
    layers: tuple[int, ...]
    variables: tuple[str, ...]
    channels: np.ndarray | None
    preprocess: str
    dtype: str
    batch: int


@dataclass(frozen=True)
class Plan:
    """An extraction, ready to run.

    Attributes
    ----------
    stim, altered
        The images, and for each the SHA-256 of its pixels if they were altered.
    model
        The model, in the precision asked for.
    weights
        Its fingerprint as it was given.
    layers
        Blocks, ascending.
    variables
        Names to capture.
    channels
        (layer, feature_map) channels of ``activation`` to keep, or None for all.
    preprocess
        ``"model"`` or ``"raw"``.
    dtype
        Storage dtype.
    batch
        Frames a forward pass takes.
    coords
        Every coordinate of the result.
    attrs
        Attributes of the result.
    rows
        Lattice rows in a unit.
    """

    stim: xr.Dataset
    altered: list[str | None]
    model: Backbone
    weights: str
    layers: tuple[int, ...]
    variables: tuple[str, ...]
    channels: np.ndarray | None
    preprocess: str
    dtype: str
    batch: int
    coords: xr.Dataset
    attrs: dict[str, Any]
    rows: int

    @property
    def units(self) -> list[Unit]:
        """All units, image by image."""
        bands = range(0, self.coords.sizes["shift_y"], self.rows)
        height = self.coords.sizes["shift_y"]
        return [
            Unit(i * len(bands) + b, i, slice(start, min(start + self.rows, height)))
            for i in range(self.stim.sizes["image"])
            for b, start in enumerate(bands)
        ]

    @property
    def forms(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Dims and shape of each variable."""
        return {
            name: (dims := VARIABLES[name].dims[0], tuple(self._size(name, d) for d in dims))
            for name in self.variables
        }

    def _size(self, name: str, dim: str) -> int:
        if dim == "feature_map" and name != "activation":
            return self.model.channels
        return self.coords.sizes[dim]

    def offsets(self, unit: Unit) -> np.ndarray:
        """(frame, 2) vertical and horizontal offsets of a unit's frames, row by row."""
        lattice = self.coords[["offset_y", "offset_x"]].isel(shift_y=unit.rows)
        shape = lattice.sizes["shift_y"], lattice.sizes["shift_x"]
        dy, dx = (
            np.broadcast_to(lattice[k].values.reshape(r), shape)
            if lattice[k].ndim == 1
            else lattice[k].values
            for k, r in (("offset_y", (-1, 1)), ("offset_x", (1, -1)))
        )
        return np.stack([dy.ravel(), dx.ravel()], axis=1)

    @cached_property
    def reference(self) -> Reference:
        """The model, for tasks."""
        return Reference(self.model, self.weights)

    def task(self, unit: Unit) -> Task:
        """Make the task of one unit."""
        return Task(
            model=self.reference,
            stim=self._alone(unit.image),
            offsets=self.offsets(unit),
            columns=self.coords.sizes["shift_x"],
            row=unit.rows.start,
            layers=self.layers,
            variables=self.variables,
            channels=self.channels,
            preprocess=self.preprocess,
            dtype=self.dtype,
            batch=self.batch,
        )

    def _alone(self, image: int) -> xr.Dataset:
        """One image of the stimuli, without the others' Dask graph."""
        import dask

        one = self.stim.isel(image=[image])
        one = one.drop_vars([v for v in one.coords if v not in _OF_IMAGE], errors="ignore")
        if not dask.is_dask_collection(one.get("pixels")):
            return one
        if self.altered[image] is None:
            return one.drop_vars("pixels")  # the worker reads the file itself
        return dask.optimize(one)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the numbers, for the record and for resuming."""
        return {
            **self.attrs,
            "variables": list(self.variables),
            "layers": list(self.layers),
            "channels": None if self.channels is None else self.channels.tolist(),
            "images": self.stim["sha256"].values.astype(str).tolist(),
            "altered_pixels": self.altered,
            "image_names": self.stim["image"].values.astype(str).tolist(),
            "image_size": self.stim.attrs.get("size"),
            "rows_per_unit": self.rows,
            "batch_size": self.batch,
        }

    def template(self) -> tuple[xr.Dataset, dict[str, dict[str, tuple[int, ...]]]]:
        """Return the result with nothing computed, and how it is laid out on disk."""
        import dask.array as da

        ds = self.coords.copy()
        layout = {}
        for name, (dims, shape) in self.forms.items():
            shard = self.shard(name)
            ds[name] = (dims, da.zeros(shape, chunks=shard, dtype=self.dtype), _attrs(name))
            chunk = tuple(
                min(_CHUNK_MAPS, n) if d == "feature_map" else n
                for d, n in zip(dims, shard, strict=True)
            )
            # A shard holds whole chunks only.
            whole = tuple(math.ceil(s / c) * c for s, c in zip(shard, chunk, strict=True))
            layout[name] = {"chunks": chunk, "shards": whole}
        ds.attrs = self.attrs
        return ds, layout

    def shard(self, name: str) -> tuple[int, ...]:
        """Shape of what one unit writes of a variable, one layer at a time."""
        dims, shape = self.forms[name]
        small = {"image": 1, "shift_y": self.rows, "layer": 1}
        return tuple(min(small.get(d, n), n) for d, n in zip(dims, shape, strict=True))


def _attrs(name: str) -> dict[str, str]:
    return VARIABLES[name].attrs


def make_plan(
    stim: xr.Dataset,
    model: Backbone,
    *,
    layers: Any,
    shifts: ShiftGrid | None,
    variables: Sequence[str],
    feature_maps: int | Sequence[int] | None,
    preprocess: str,
    precision: str,
    storage_dtype: str,
    batch_size: int | str,
) -> Plan:
    """Check every argument of :func:`vitxr.extract` and lay the result out."""
    checks.check_stimuli(stim)
    if not isinstance(model, Backbone):
        raise ArgumentError(
            f"model is a {type(model).__name__}; expected what vitxr.load_model returns. "
            "Call vitxr.load_model(model) first."
        )
    blocks = checks.check_layers(layers, len(model.blocks))
    names = checks.check_variables(variables, model)
    for option, value, legal in (
        ("preprocess", preprocess, ("model", "raw")),
        ("precision", precision, _PRECISION),
        ("storage_dtype", storage_dtype, _STORAGE),
    ):
        if value not in legal:
            raise ArgumentError(
                f"{option}={value!r}: expected {' or '.join(repr(v) for v in legal)}."
            )
    if shifts is not None and not isinstance(shifts, ShiftGrid):
        raise ArgumentError(
            f"shifts={shifts!r}: expected a vitxr.ShiftGrid, or None for no shifts."
        )
    lattice = no_shifts() if shifts is None else shifts.lattice(*model.input_size)
    checks.check_preprocess(stim, model, preprocess)
    if feature_maps is not None and "activation" not in names:
        raise ArgumentError(
            f"feature_maps={feature_maps!r} selects channels of `activation`, which is not among "
            f"variables={list(names)}. Add it, or leave feature_maps out."
        )
    if feature_maps is not None and {"prefix", "embedding"} & set(names):
        raise ArgumentError(
            "feature_maps selects channels of `activation` only, while `prefix` and `embedding` "
            "share its dimension feature_map: extract them in a call of their own."
        )
    fixed = checks.check_channels(feature_maps, model.channels)
    batch = checks.check_batch(batch_size, model)
    attrs = _provenance(model, shifts, preprocess, precision, storage_dtype)
    weights = attrs["model_fingerprint"]
    model = model.cast(precision)
    changed = altered(stim)
    if isinstance(feature_maps, int | np.integer):
        channels: np.ndarray | None = _first_frame_channels(
            stim, model, blocks, lattice, preprocess, int(feature_maps)
        )
        attrs["feature_map_selection"] = "first_frame"
        maps = {
            "feature_map": np.arange(int(feature_maps)),
            "channel": (("layer", "feature_map"), channels, _attrs("channel")),
        }
    else:
        channels = None if fixed is None else np.tile(fixed, (len(blocks), 1))
        maps = {"feature_map": np.arange(model.channels) if fixed is None else fixed}
    coords = _coords(stim, model, blocks, names, lattice, maps)
    plan = Plan(
        stim=stim,
        altered=changed,
        model=model,
        weights=weights,
        layers=blocks,
        variables=names,
        channels=channels,
        preprocess=preprocess,
        dtype=storage_dtype,
        batch=batch,
        coords=coords,
        attrs=attrs,
        rows=1,
    )
    heaviest = max(
        math.prod(plan._size(n, d) for d in VARIABLES[n].dims[0][3:] if d != "layer") for n in names
    )
    per_row = coords.sizes["shift_x"] * heaviest * np.dtype(storage_dtype).itemsize
    rows = max(1, min(_SHARD_BYTES // per_row, coords.sizes["shift_y"]))
    return replace(plan, rows=int(rows))


def _first_frame_channels(
    stim: xr.Dataset,
    model: Backbone,
    layers: tuple[int, ...],
    lattice: xr.Dataset,
    preprocess: str,
    count: int,
) -> np.ndarray:
    """Channels of each layer, the most active in the first frame of the first image."""
    from vitxr.extract.units import forward, prepare

    image = prepare(stim, 0, model, preprocess)
    first = np.array([[lattice["offset_y"].values.flat[0], lattice["offset_x"].values.flat[0]]])
    out = forward(model, image, first, layers, ("activation",), None, "float32", batch=1)
    frame = out["activation"][0].clip(min=0)
    mean = frame.mean(axis=(-2, -1), dtype=np.float64)
    return rank_channels(mean)[:, :count]


def _provenance(
    model: Backbone,
    shifts: ShiftGrid | None,
    preprocess: str,
    precision: str,
    storage_dtype: str,
) -> dict[str, Any]:
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
    }


def _coords(
    stim: xr.Dataset,
    model: Backbone,
    layers: tuple[int, ...],
    names: tuple[str, ...],
    lattice: xr.Dataset,
    maps: Mapping[str, Any],
) -> xr.Dataset:
    """Every coordinate of the result, in memory."""
    ds = stim.coords.to_dataset()
    ds = ds.drop_vars([v for v in ds.variables if set(ds[v].dims) - {"image"}]).load()
    for name, text in list(ds.variables.items()):
        if text.dtype.kind == "U":
            # Zarr v3 has no fixed-width strings.
            ds[name] = text.astype(object)
    rows, columns = model.grid
    tokens = len(model.prefix) + rows * columns
    extra: dict[str, Any] = {
        "layer": np.array(layers),
        "patch_row": np.arange(rows),
        "patch_col": np.arange(columns),
        "token": np.array(model.prefix, dtype=object),
        "head": np.arange(model.heads),
        "query": np.arange(tokens),
        "key": np.arange(tokens),
        "class": np.array(model.classes, dtype=object),
        **maps,
    }
    used = set(_dims(names))
    for key, value in extra.items():
        dims = value[0] if isinstance(value, tuple) else (key,)
        if used.issuperset(dims):
            ds = ds.assign_coords({key: value})
    return ds.merge(lattice)


def _dims(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        yield from VARIABLES[name].dims[0]
