"""Lay a store out: plan, coordinates, empty arrays, empty record; no root yet."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from vitxr._version import __version__
from vitxr.errors import StoreError
from vitxr.store.ledger import RECORD, Ledger
from vitxr.store.location import Location
from vitxr.store.plans import PLAN, ROOT, Cut, altered, plan_json, read_plan, signature

__all__ = ["Array", "count_objects", "create", "is_laid_out", "mend"]


@dataclass(frozen=True)
class Array:
    """A variable to be written: its form, and how it is cut.

    Attributes
    ----------
    dims, shape, dtype, attrs
        Of the variable.
    shard, chunk
        Shapes of a shard, which a unit writes whole, and of a chunk inside it; whole chunks
        make a shard.
    compress
        Whether chunks are compressed (Blosc: byte shuffle, Zstandard), which pays for rounded
        values only.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    compress: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)


def create(
    location: Location,
    coords: xr.Dataset,
    arrays: Mapping[str, Array],
    cut: Cut,
    fingerprint: Mapping[str, Any],
) -> Ledger:
    """Lay out a new store, or one that a killed run has laid out in part.

    ``coords`` has the coordinates, in memory, and the attributes of the result. The plan
    is written first and the record's metadata last, so that a run that finds the first
    without the second lays the rest out again.
    """
    objects = _objects(coords, arrays, cut)
    root = objects.pop(ROOT)
    plan = plan_json(objects, list(arrays), cut, root, fingerprint, __version__)
    fresh = read_plan(location) is None
    try:
        last = f"{RECORD}/zarr.json"
        end = {last: objects.pop(last)}
        location.write({PLAN: plan})
        location.write(objects)
        location.write(end)
    except BaseException:
        if fresh:
            with contextlib.suppress(StoreError):
                location.remove()
        raise
    return Ledger(location)


def count_objects(coords: xr.Dataset, arrays: Mapping[str, Array], cut: Cut) -> int:
    """Count the objects of a store that are no unit's: coordinates, metadata, the plan."""
    return len(_objects(coords, arrays, cut) | {PLAN: b""})


def is_laid_out(location: Location) -> bool:
    """Whether :func:`create` came to its end."""
    return location.read(f"{RECORD}/zarr.json") is not None


def mend(
    location: Location,
    plan: Mapping[str, Any],
    coords: xr.Dataset,
    arrays: Mapping[str, Array],
    cut: Cut,
) -> None:
    """Write coordinates and metadata that are missing or were altered anew.

    Raises
    ------
    StoreError
        If what would be written is not what the plan has the checksum of, as with another
        version of zarr.
    """
    bad, _ = altered(location, plan)
    if not bad:
        return
    objects = _objects(coords, arrays, cut)
    other = [k for k in bad if k not in objects or signature(objects[k]) != plan["layout"][k]]
    if other:
        raise StoreError(
            f"the store {str(location)!r} has coordinates or metadata that are not as they were "
            f"written ({', '.join(other[:5])}), and this version of zarr writes them in another "
            "way. Restore them from a copy, or extract into another path."
        )
    location.write({key: objects[key] for key in bad})


def _objects(coords: xr.Dataset, arrays: Mapping[str, Array], cut: Cut) -> dict[str, Any]:
    """Make every object of a new store in memory: bytes by key, and the root's attributes."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    memory: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(memory)
    coords.to_zarr(store, consolidated=False, zarr_format=3)
    flat = {"name": "default", "separator": "."}  # one folder an array: fewer files to list
    for name, array in arrays.items():
        blosc = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=4)
        zarr.create_array(
            store,
            name=name,
            shape=array.shape,
            dtype=array.dtype,
            shards=array.shard,
            chunks=array.chunk,
            compressors=((blosc,) if array.compress else ()) + (Crc32cCodec(),),
            fill_value=np.nan,
            dimension_names=array.dims,
            attributes=dict(array.attrs),
            chunk_key_encoding=flat,
        )
    first = cut.region(0)
    shards = sum(
        math.prod(
            1 if dim in first else math.ceil(n / s)
            for dim, n, s in zip(a.dims, a.shape, a.shard, strict=True)
        )
        for a in arrays.values()
    )
    zarr.create_array(
        store,
        name=RECORD,
        shape=(len(cut), shards, 2),
        dtype="uint64",
        chunks=(1, shards, 2),
        compressors=None,
        fill_value=0,
        dimension_names=("unit", "shard", "size_checksum"),
        chunk_key_encoding=flat,
    )
    root = dict(zarr.open_group(store, mode="r").attrs)
    out = {key: data.to_bytes() for key, data in memory.items() if key != PLAN}
    return out | {ROOT: root}
