"""What an extraction will compute: arguments checked, labels laid out, units cut."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.extract import checks
from vitxr.extract.first_frame import first_frame_channels
from vitxr.extract.labels import coordinates, provenance
from vitxr.extract.units import Task
from vitxr.models.backbone import Backbone
from vitxr.models.capture import frame_shape
from vitxr.models.load import Reference
from vitxr.models.site import Site
from vitxr.models.sites import find_sites
from vitxr.names import VARIABLES, Variable, of_module, unit_dims
from vitxr.stimuli.images import altered
from vitxr.stimuli.shifts import ShiftGrid, no_shifts
from vitxr.store.layout import Array
from vitxr.store.plans import Cut
from vitxr.store.shards import MOST_CHUNK_BYTES, MOST_SHARD_BYTES

__all__ = ["Plan", "make_plan"]

#: What a task needs to know of its images.
_OF_IMAGE = ("image", "label", "source", "height", "width", "sha256")
_PRECISION = ("float32", "bfloat16")
#: Bytes of one layer of one unit: shards are about this large.
_SHARD_BYTES = 40_000_000
#: Frames of a unit, at least, where batches are "auto" and images have few: with fewer there would
#: be many small files.
_FRAMES = 16
#: Feature maps in an inner chunk of a shard.
_CHUNK_MAPS = 16
#: Chunks that would have more are cut further: by frame, then by head.
_CHUNK_BYTES = 16_000_000


@dataclass(frozen=True)
class Plan:
    """An extraction, ready to run; can be sent to other processes.

    Attributes
    ----------
    stim, altered
        The images, and for each the SHA-256 of its pixels if they were altered.
    model
        The model, in the precision asked for.
    layers
        Blocks, ascending.
    variables
        The row of the vocabulary of each variable.
    frame
        Shape of each variable for one frame.
    channels
        (layer, feature_map) channels of ``activation`` to keep, or None for all.
    sites
        Where those variables are taken whose place had to be found.
    heads, queries
        Heads and tokens of attention to keep, or None for all.
    preprocess
        ``"model"`` or ``"raw"``.
    storage
        How values are rounded.
    batch
        Frames a forward pass takes. Batches are cut from the plan alone, so that a run
        that is resumed sees the same ones.
    coords
        Every coordinate of the result.
    attrs
        Attributes of the result.
    cut
        The units.
    """

    stim: xr.Dataset
    altered: list[str | None]
    model: Reference
    layers: tuple[int, ...]
    variables: dict[str, Variable]
    frame: dict[str, tuple[int, ...]]
    channels: np.ndarray | None
    sites: dict[str, Site]
    heads: np.ndarray | None
    queries: np.ndarray | None
    preprocess: str
    storage: checks.Storage
    batch: int
    coords: xr.Dataset
    attrs: dict[str, Any]
    cut: Cut

    def frames(self, unit: int) -> int:
        """Frames of a unit."""
        return self.cut.frames(unit) * self.coords.sizes["shift_x"]

    def form(self, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Dims and shape of a variable."""
        sizes = self.coords.sizes
        lattice = (self.cut.images, self.cut.rows, sizes["shift_x"])
        return self.variables[name].dims[0], (*lattice, *self.frame[name])

    def attrs_of(self, name: str) -> dict[str, Any]:
        """Attributes of a variable: what it is, where it is taken, how it was rounded."""
        site = {"taken_from": str(self.sites[name])} if name in self.sites else {}
        return {**self.variables[name].attrs, **site, **self.storage.attrs}

    @cached_property
    def _offsets(self) -> np.ndarray:
        """(shift_y, shift_x, 2) vertical and horizontal offsets."""
        shape = self.coords.sizes["shift_y"], self.coords.sizes["shift_x"]
        both = [
            np.broadcast_to(c if c.ndim == 2 else c.reshape(form), shape)
            for c, form in (
                (self.coords["offset_y"].values, (-1, 1)),
                (self.coords["offset_x"].values, (1, -1)),
            )
        ]
        return np.stack(both, axis=-1)

    def task(self, unit: int) -> Task:
        """Make the task of one unit."""
        region = self.cut.region(unit)
        return Task(
            model=self.model,
            stim=self._alone(region["image"]),
            offsets=self._offsets[region["shift_y"]].reshape(-1, 2),
            columns=self.coords.sizes["shift_x"],
            row=region["shift_y"].start,
            frame=self.frame,
            layers=self.layers,
            channels=self.channels,
            preprocess=self.preprocess,
            dtype=self.storage.dtype,
            keepbits=self.storage.keepbits,
            batch=self.batch,
            sites=self.sites,
            heads=self.heads,
            queries=self.queries,
        )

    def _alone(self, images: slice) -> xr.Dataset:
        """Some images of the stimuli, without the others' Dask graph."""
        import dask

        some = self.stim.isel(image=images)
        some = some.drop_vars([v for v in some.coords if v not in _OF_IMAGE], errors="ignore")
        if not dask.is_dask_collection(some.get("pixels")):
            return some
        files = map(os.path.isabs, some["source"].values.astype(str))
        if not any(self.altered[images]) and all(files):
            return some.drop_vars("pixels")  # the worker reads the files itself
        return dask.optimize(some)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the numbers, for the record and for resuming."""
        chosen = {"heads": self.heads, "queries": self.queries}
        return {
            **self.attrs,
            **{key: value.tolist() for key, value in chosen.items() if value is not None},
            **({"sites": {n: str(s) for n, s in self.sites.items()}} if self.sites else {}),
            "variables": list(self.frame),
            "layers": list(self.layers),
            "channels": None if self.channels is None else self.channels.tolist(),
            "images": self.stim["sha256"].values.astype(str).tolist(),
            "altered_pixels": self.altered,
            "image_names": self.stim["image"].values.astype(str).tolist(),
            "image_size": self.stim.attrs.get("size"),
            "coordinates": {
                str(name): hashlib.sha256(repr(coord.values.tolist()).encode()).hexdigest()[:12]
                for name, coord in sorted(self.coords.coords.items())
            },
            "images_per_unit": self.cut.images_per_unit,
            "rows_per_unit": self.cut.rows_per_unit,
            "batch_size": self.batch,
        }

    def array(self, name: str) -> Array:
        """How a variable lies on disk: a unit writes one shard of it, or one a layer.

        Raises
        ------
        ArgumentError
            If one frame is too large for a chunk, or one row of the lattice for a shard.
        """
        dims, shape = self.form(name)
        small = {
            "image": self.cut.images_per_unit,
            "shift_y": self.cut.rows_per_unit,
            "layer": 1,
        }
        whole = [min(small.get(d, n), n) for d, n in zip(dims, shape, strict=True)]
        # One head, or some of the maps: what is read most.
        *heads, unit = unit_dims(dims) or ("",)
        chunk = [
            1
            if d in heads
            else _even(n, _CHUNK_MAPS, _CHUNK_MAPS // 2 + 1)
            if d == unit and not heads
            else n
            for d, n in zip(dims, whole, strict=True)
        ]
        itemsize = np.dtype(self.storage.dtype).itemsize
        for dim in ("image", "shift_y", "shift_x", "head"):
            if dim in dims and math.prod(chunk) * itemsize > _CHUNK_BYTES:
                chunk[dims.index(dim)] = 1
        # A shard holds whole chunks only.
        shard = [math.ceil(s / c) * c for s, c in zip(whole, chunk, strict=True)]
        for what, sizes, most in (
            (f"a frame{' and head' * ('head' in dims)}", chunk, MOST_CHUNK_BYTES),
            ("a row of shifts", shard, MOST_SHARD_BYTES),
        ):
            if math.prod(sizes) * itemsize > most:
                raise ArgumentError(
                    f"`{name}` of {what} has {math.prod(sizes) * itemsize / 1e9:,.1f} GB; a store "
                    f"takes {most / 1e9:,.1f} GB at most. Leave it out of variables, choose "
                    "heads= and queries= of attention, take larger steps between shifts, or give "
                    "the model smaller images."
                )
        return Array(
            dims=dims,
            shape=shape,
            dtype=self.storage.dtype,
            shard=tuple(shard),
            chunk=tuple(chunk),
            compress=self.storage.keepbits is not None,
            attrs=self.attrs_of(name),
        )

    @property
    def arrays(self) -> dict[str, Array]:
        """How every variable lies on disk."""
        return {name: self.array(name) for name in self.frame}

    @property
    def nbytes(self) -> int:
        """Bytes of the result in memory."""
        return self.frame_bytes * sum(self.frames(unit) for unit in range(len(self.cut)))

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame of the result in memory."""
        values = sum(math.prod(shape) for shape in self.frame.values())
        return values * np.dtype(self.storage.dtype).itemsize


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
    heads: Any = None,
    queries: Any = None,
    modules: Any = None,
) -> Plan:
    """Check every argument of :func:`vitxr.extract` and lay the result out."""
    checks.check_stimuli(stim)
    stim = checks.plain_strings(stim)
    if not isinstance(model, Backbone):
        raise ArgumentError(
            f"model is a {type(model).__name__}; expected what vitxr.load_model returns. "
            "Call vitxr.load_model(model) first."
        )
    blocks = checks.check_layers(layers, len(model.blocks))
    patterns = checks.check_modules(modules, stim)
    names = checks.check_variables(variables, model, list(patterns))
    heads = checks.check_heads(heads, names, model.heads)
    queries = checks.check_queries(queries, names, model)
    for option, value, legal in (
        ("preprocess", preprocess, ("model", "raw")),
        ("precision", precision, _PRECISION),
    ):
        if value not in legal:
            raise ArgumentError(
                f"{option}={value!r}: expected {' or '.join(repr(v) for v in legal)}."
            )
    storage = checks.check_storage(storage_dtype)
    if shifts is not None and not isinstance(shifts, ShiftGrid):
        raise ArgumentError(
            f"shifts={shifts!r}: expected a vitxr.ShiftGrid, or None for no shifts."
        )
    lattice = no_shifts() if shifts is None else shifts.lattice(*model.input_size)
    checks.check_preprocess(stim, model, preprocess)
    fixed = checks.check_channels(feature_maps, names, model.channels)
    batch = checks.check_batch(batch_size, model, precision)
    unit = max(batch, _FRAMES) if batch_size == "auto" else batch
    attrs = provenance(model, shifts, preprocess, precision, storage_dtype)
    weights = attrs["model_fingerprint"]
    model = model.cast(precision)
    reference = Reference(model, weights)
    sites = find_sites(model, blocks, names, patterns)
    rows = {name: VARIABLES[name] for name in names}
    for name, pattern in patterns.items():
        site = sites[name]
        rows[name] = of_module(name, pattern, site.layered, grid=site.form != "frame")
    if isinstance(feature_maps, int | np.integer):
        channels: np.ndarray | None = first_frame_channels(
            stim, reference, blocks, lattice, preprocess, int(feature_maps)
        )
        attrs["feature_map_selection"] = "first_frame"
        maps = {
            "feature_map": np.arange(int(feature_maps)),
            "channel": (("layer", "feature_map"), channels, VARIABLES["channel"].attrs),
        }
    else:
        channels = None if fixed is None else np.tile(fixed, (len(blocks), 1))
        maps = {"feature_map": np.arange(model.channels) if fixed is None else fixed}
    maps |= {d: n for d, n in (("head", heads), ("query", queries)) if n is not None}
    frame = {
        name: frame_shape(model, name, len(blocks), channels, sites.get(name), heads, queries)
        for name in rows
    }
    coords = coordinates(stim, model, blocks, rows, frame, lattice, maps)
    coords.attrs = attrs
    return Plan(
        stim=stim,
        altered=altered(stim),
        model=reference,
        layers=blocks,
        variables=rows,
        frame=frame,
        channels=channels,
        sites=sites,
        heads=heads,
        queries=queries,
        preprocess=preprocess,
        storage=storage,
        batch=batch,
        coords=coords,
        attrs=attrs,
        cut=_cut(coords, rows, frame, len(blocks), np.dtype(storage.dtype).itemsize, unit),
    )


def _cut(
    coords: xr.Dataset,
    rows_of: dict[str, Variable],
    frame: dict[str, tuple[int, ...]],
    layers: int,
    itemsize: int,
    frames: int,
) -> Cut:
    """Cut units: rows of one image that fill a shard; of images with few, so many frames."""
    images, rows, columns = (coords.sizes[d] for d in ("image", "shift_y", "shift_x"))
    heaviest = max(
        math.prod(shape) // (layers if "layer" in rows_of[name].dims[0] else 1)
        for name, shape in frame.items()
    )
    per_row = columns * heaviest * itemsize
    most = max(1, _SHARD_BYTES // per_row)
    rows_per_unit = _even(rows, most, max(1, most // 2))
    images_per_unit = 1
    if rows_per_unit == rows:
        fill = min(frames // (rows * columns), _SHARD_BYTES // (per_row * rows))
        # All alike, as far as that goes: with fewer, passes would cost more than padding.
        images_per_unit = math.ceil(images / math.ceil(images / max(1, fill)))
    return Cut(images, rows, images_per_unit, rows_per_unit)


def _even(size: int, most: int, least: int) -> int:
    """Cut ``size`` into parts of ``least`` to ``most`` so that little is padded.

    A last part that is shorter takes the place of a whole one.

    >>> [_even(20, 16, 9), _even(21, 6, 3), _even(23, 6, 3), _even(3, 16, 9)]
    [10, 3, 6, 3]
    """
    if size <= most:
        return size
    return min(range(most, least - 1, -1), key=lambda n: math.ceil(size / n) * n)
