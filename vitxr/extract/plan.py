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
from vitxr.extract.labels import coordinates, provenance
from vitxr.extract.ranking import rank_channels
from vitxr.extract.units import Task, compute
from vitxr.models.backbone import Backbone
from vitxr.models.capture import frame_shape
from vitxr.models.load import Reference
from vitxr.names import VARIABLES
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
    frame
        Shape of each variable for one frame.
    channels
        (layer, feature_map) channels of ``activation`` to keep, or None for all.
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
    frame: dict[str, tuple[int, ...]]
    channels: np.ndarray | None
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
        return VARIABLES[name].dims[0], (*lattice, *self.frame[name])

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
        return {
            **self.attrs,
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
        chunk = [
            _even(n, _CHUNK_MAPS, _CHUNK_MAPS // 2 + 1) if d == "feature_map" else n
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
                    f"takes {most / 1e9:,.1f} GB at most. Leave it out of variables, take larger "
                    "steps between shifts, or give the model smaller images."
                )
        return Array(
            dims=dims,
            shape=shape,
            dtype=self.storage.dtype,
            shard=tuple(shard),
            chunk=tuple(chunk),
            compress=self.storage.keepbits is not None,
            attrs={**VARIABLES[name].attrs, **self.storage.attrs},
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
    names = checks.check_variables(variables, model)
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
    batch = checks.check_batch(batch_size, model, precision)
    unit = max(batch, _FRAMES) if batch_size == "auto" else batch
    attrs = provenance(model, shifts, preprocess, precision, storage_dtype)
    weights = attrs["model_fingerprint"]
    model = model.cast(precision)
    reference = Reference(model, weights)
    if isinstance(feature_maps, int | np.integer):
        channels: np.ndarray | None = _first_frame_channels(
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
    coords = coordinates(stim, model, blocks, names, lattice, maps)
    coords.attrs = attrs
    kept = 0 if channels is None else channels.shape[1]
    frame = {name: frame_shape(model, name, len(blocks), kept) for name in names}
    return Plan(
        stim=stim,
        altered=altered(stim),
        model=reference,
        layers=blocks,
        frame=frame,
        channels=channels,
        preprocess=preprocess,
        storage=storage,
        batch=batch,
        coords=coords,
        attrs=attrs,
        cut=_cut(coords, frame, len(blocks), np.dtype(storage.dtype).itemsize, unit),
    )


def _cut(
    coords: xr.Dataset, frame: dict[str, tuple[int, ...]], layers: int, itemsize: int, frames: int
) -> Cut:
    """Cut units: rows of one image that fill a shard; of images with few, so many frames."""
    images, rows, columns = (coords.sizes[d] for d in ("image", "shift_y", "shift_x"))
    heaviest = max(
        math.prod(shape) // (layers if "layer" in VARIABLES[name].dims[0] else 1)
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


def _first_frame_channels(
    stim: xr.Dataset,
    model: Reference,
    layers: tuple[int, ...],
    lattice: xr.Dataset,
    preprocess: str,
    count: int,
) -> np.ndarray:
    """Channels of each layer, the most active in the first frame of the first image."""
    first = np.array([[lattice["offset_y"].values.flat[0], lattice["offset_x"].values.flat[0]]])
    task = Task(
        model=model,
        stim=stim.isel(image=[0]),
        offsets=first,
        columns=1,
        row=0,
        frame={"activation": frame_shape(model.model(), "activation", len(layers))},
        layers=layers,
        channels=None,
        preprocess=preprocess,
        dtype="float32",
        keepbits=None,
        batch=1,
    )
    activation = compute(task)[0]["activation"][0, 0, 0]
    mean = activation.clip(min=0).mean(axis=(-2, -1), dtype=np.float64)
    return rank_channels(mean)[:, :count]
