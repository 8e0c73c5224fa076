"""A store while it is written: its plan, its shards, its record of finished units.

The group ``_vitxr`` holds the plan (as attributes) and the array ``done``, one
chunk a unit. The metadata of the root group is written last, so that a store
that is not finished cannot be opened as if it were whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import StoreError

__all__ = ["Ledger", "create", "differences", "find", "replacing", "unfinished"]

GROUP = "_vitxr"


class Ledger:
    """Access to a store that is being written; one writer writes whole shards only.

    Parameters
    ----------
    path
        Folder of the store.
    """

    def __init__(self, path: Path):
        import zarr

        self.path = path
        group = zarr.open_group(path, path=GROUP, mode="r+")
        self.fingerprint: dict[str, Any] = dict(group.attrs["fingerprint"])
        self._root: dict[str, Any] = dict(group.attrs["root"])
        self._done: Any = group["done"]
        # Not kept on reopening, and without it a shard that is all NaN, the fill value, would not
        # be written and would count as missing. open_array ignores its argument of that name.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._arrays = {
                name: zarr.open_array(path, path=name, mode="r+")
                for name in group.attrs["variables"]
            }

    def done(self) -> np.ndarray:
        """Return for each unit whether all of it is written."""
        return np.asarray(self._done[:], dtype=bool)

    def write(self, unit: int, region: Mapping[str, slice], arrays: Mapping[str, Any]) -> None:
        """Write one unit's shards, then its record."""
        for name, data in arrays.items():
            target = self._arrays[name]
            where = tuple(region.get(d, slice(None)) for d in target.metadata.dimension_names)
            target[where] = data
        self._done[unit] = 1

    def finish(self) -> None:
        """Write the root metadata, which makes the store whole."""
        import zarr

        left = int((~self.done()).sum())
        if left:
            raise StoreError(
                f"the store {str(self.path)!r} misses {left} of {self._done.size} units and cannot "
                "be finished: run extract again with the same arguments to write them."
            )
        zarr.open_group(self.path, mode="a", attributes=self._root)


def create(
    path: Path,
    template: xr.Dataset,
    layout: Mapping[str, Mapping[str, tuple[int, ...]]],
    units: int,
    fingerprint: Mapping[str, Any],
) -> Ledger:
    """Lay out a new store: coordinates, empty arrays, plan; no root yet.

    ``template`` has Dask arrays for the variables to be written later and
    everything else in memory; ``layout`` gives these variables' ``chunks`` and
    ``shards``. Chunks carry a checksum and are not compressed: activations hardly
    compress, and reading selected feature maps is what stores are for.
    """
    import zarr
    from zarr.codecs import Crc32cCodec

    encoding = {
        name: {
            "chunks": shape["chunks"],
            # A shard of one chunk is the chunk.
            **({"shards": shape["shards"]} if shape["shards"] != shape["chunks"] else {}),
            "compressors": (Crc32cCodec(),),
            "fill_value": np.nan,
        }
        for name, shape in layout.items()
    }

    # Under another name until it is laid out: creating arrays and groups writes a root as well, and
    # a run killed here must leave nothing at `path` that could be opened.
    with replacing(path) as draft:
        template.to_zarr(
            draft, mode="w-", compute=False, consolidated=False, zarr_format=3, encoding=encoding
        )
        root = dict(zarr.open_group(draft, mode="r").attrs)
        group = zarr.create_group(
            draft,
            path=GROUP,
            attributes={
                "about": "plan and record of finished units of a vitxr store",
                "variables": list(layout),
                "fingerprint": dict(fingerprint),
                "root": root,
            },
        )
        group.create_array(
            "done", shape=(units,), chunks=(1,), dtype="uint8", dimension_names=["unit"]
        )
        (draft / "zarr.json").unlink()
    return Ledger(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it becomes ``path`` when all is written.

    If writing fails, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield draft
        draft.rename(path)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise


def find(path: Path, fingerprint: Mapping[str, Any], resume: bool) -> Ledger | None:
    """Open what is at ``path`` to go on with it; None if there is nothing.

    Raises
    ------
    StoreError
        If something else is there, if ``resume`` is False, or if the store was
        made with another fingerprint; the message shows the difference.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        if path.exists():
            path.rmdir()
        return None
    if not (path / GROUP / "zarr.json").exists():
        raise StoreError(
            f"{str(path)!r} exists and is not a vitxr store: nothing was written. "
            "Choose another path."
        )
    if not resume:
        raise StoreError(
            f"the store {str(path)!r} exists and resume=False: nothing was written. Choose another "
            "path, delete the store, or pass resume=True to go on with it."
        )
    ledger = Ledger(path)
    different = differences(ledger.fingerprint, fingerprint)
    if different:
        raise StoreError(
            f"the store {str(path)!r} was made with other settings, so this run cannot go on with "
            "it: nothing was written. Stored -> asked:\n  "
            + "\n  ".join(different)
            + "\nChoose another path, or pass the stored settings."
        )
    return ledger


def unfinished(path: Path) -> str | None:
    """Say how far an unfinished store has come; None if it is not one."""
    if (path / "zarr.json").exists() or not (path / GROUP / "zarr.json").exists():
        return None
    done = Ledger(path).done()
    return f"{int(done.sum())} of {done.size} units are written"


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Sequence[str]:
    """List where two fingerprints differ, one readable line each."""
    out = []
    for key in sorted(set(stored) | set(asked)):
        # Through JSON: what was stored has no tuples or NumPy scalars any more.
        a, b = (json.loads(json.dumps(f.get(key, "absent"))) for f in (stored, asked))
        if a != b:
            out.append(f"{key}: {_short(a)} -> {_short(b)}")
    return out


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:60] + f"... ({len(text)} characters)"
