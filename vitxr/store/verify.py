"""Read a whole store and compare it with what was recorded when it was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import StoreError
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import ROOT, check_layout, check_root, read_plan
from vitxr.store.shards import Shards

__all__ = ["verify"]


def verify(path: str | Path, reset: bool = False, progress: bool = True) -> xr.Dataset:
    """Check every byte of a store against the sizes and checksums recorded with it.

    Parameters
    ----------
    path
        Store of :func:`vitxr.extract`, finished or not: a folder or an fsspec URL.
    reset
        Take damaged units back. The store is then unfinished, and the same extraction,
        run again, writes them anew.
    progress
        Show a progress bar.

    Returns
    -------
    xarray.Dataset
        Along ``shard``, the shards that are not as they were written; none if all is well:
        ``problem`` ("missing", "cut short", "altered", "not recorded"), ``unit`` (its number),
        ``image`` and ``shift_y`` (the first of the unit's), ``layer`` (-1 where the variable
        has none), ``variable``, ``key`` (its name in the store). "not recorded" is what an
        unfinished store still lacks. Attributes: ``units``, ``damaged``, ``bytes`` read.

    Raises
    ------
    StoreError
        If there is no such store, its plan is unreadable, or its coordinates or metadata
        are not as they were written: the same extraction, run again, mends those.

    Notes
    -----
    Checksums are CRC-32C, which find accidents, not forgery: each chunk's of its bytes, and the
    recorded one of the chunks' and of the index.

    Examples
    --------
    >>> import tempfile, vitxr
    >>> path = tempfile.mkdtemp() + "/run.zarr"
    >>> ds = vitxr.extract(vitxr.datasets.digits(per_class=1), vitxr.load_model("digits"),
    ...                    layers=[0], shifts=None, store=path, progress=False)
    >>> vitxr.verify(path, progress=False).sizes["shard"]
    0
    """
    location = Location(path)
    plan = read_plan(location)
    if plan is None:
        what = "is not a store of vitxr.extract" if location.exists() else "does not exist"
        raise StoreError(
            f"{str(location)!r} {what}: it has no record to verify against. Expected a store that "
            "vitxr.extract wrote."
        )
    check_layout(location, plan)
    if location.read(ROOT) is not None:
        check_root(location, plan)
    book = Ledger(location, plan)
    rows = list(_problems(book, progress))
    damaged = sorted({row["unit"] for row in rows if row["problem"] != "not recorded"})
    if reset and damaged:
        with location.alone():
            book.forget(damaged)
    read = int(book.records()[:, :, 0].sum())
    return _table(rows, {"units": len(book.cut), "damaged": len(damaged), "bytes": read})


def _problems(book: Ledger, progress: bool) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    records = book.records()
    units = tqdm(range(len(book.cut)), desc="verify", unit="unit", disable=not progress, delay=1)
    for unit in units:
        for (array, key, place), (size, checksum) in zip(
            book.shards(unit), records[unit].tolist(), strict=True
        ):
            problem = "not recorded"
            if size:
                problem = _problem(array, book.location.read(key), size, checksum)
            if problem:
                yield _row(book, unit, array, key, place, problem)


def _problem(array: Shards, data: bytes | None, size: int, checksum: int) -> str:
    if data is None:
        return "missing"
    if len(data) < size:
        return "cut short"
    raw = np.frombuffer(data, np.uint8)
    sound = len(raw) == size and array.is_whole(raw) and array.checksum(raw) == checksum
    return "" if sound else "altered"


def _row(
    book: Ledger, unit: int, array: Shards, key: str, place: tuple[slice, ...], problem: str
) -> dict[str, Any]:
    at = {dim: part.start for dim, part in zip(array.dims, place, strict=True)}
    images = book.fingerprint.get("image_names", [])
    layers = book.fingerprint.get("layers", [])
    return {
        "problem": problem,
        "unit": unit,
        "image": images[at["image"]] if images else str(at["image"]),
        "shift_y": at.get("shift_y", 0),
        "layer": (layers[at["layer"]] if layers else at["layer"]) if "layer" in at else -1,
        "variable": array.name,
        "key": key,
    }


def _table(rows: list[dict[str, Any]], attrs: dict[str, int]) -> xr.Dataset:
    numbers = ("unit", "shift_y", "layer")
    names = ("problem", *numbers, "image", "variable", "key")
    columns = {
        name: np.array([row[name] for row in rows], np.int64 if name in numbers else object)
        for name in names
    }
    ds = xr.Dataset({name: ("shard", values) for name, values in columns.items()}, attrs=attrs)
    return ds.set_coords([name for name in names if name != "problem"])
