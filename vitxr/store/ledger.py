"""A store while it is written: its plan, its shards, its record of finished units.

The group ``_vitxr`` holds the plan (as attributes) and the array ``record``: for
each unit and each of its shards the size and a checksum. The metadata of the root
group is written last, so that a store that is not finished cannot be opened as if
it were whole.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import StoreError
from vitxr.names import VARIABLES
from vitxr.store.location import Location, aligned
from vitxr.store.shards import Shards, crc32c

__all__ = ["GROUP", "Cut", "Ledger", "differences", "find", "is_finished", "read_plan"]

GROUP = "_vitxr"
PLAN = f"{GROUP}/zarr.json"
RECORD = f"{GROUP}/record"
ROOT = "zarr.json"
#: Version of the layout that this module writes, and the only one it reads.
FORMAT = 1
#: Units that a plan may have: hundreds of terabytes.
_MOST_UNITS = 20_000_000


@dataclass(frozen=True)
class Cut:
    """How a result is cut into units: blocks of images by bands of lattice rows.

    Attributes
    ----------
    images, rows
        Sizes of ``image`` and ``shift_y``.
    images_per_unit, rows_per_unit
        What a unit has of them; the last one may have less. More than one image goes with
        all rows.
    """

    images: int
    rows: int
    images_per_unit: int
    rows_per_unit: int

    @property
    def bands(self) -> int:
        """Units an image, or a block of images, is cut into."""
        return math.ceil(self.rows / self.rows_per_unit)

    def __len__(self) -> int:
        return math.ceil(self.images / self.images_per_unit) * self.bands

    def region(self, unit: int) -> dict[str, slice]:
        """Where a unit lies, by dimension; it has the whole of all others."""
        block, band = divmod(unit, self.bands)
        image, row = block * self.images_per_unit, band * self.rows_per_unit
        return {
            "image": slice(image, min(image + self.images_per_unit, self.images)),
            "shift_y": slice(row, min(row + self.rows_per_unit, self.rows)),
        }

    def frames(self, unit: int) -> int:
        """Images times lattice rows of a unit."""
        return math.prod(s.stop - s.start for s in self.region(unit).values())


def read_plan(location: Location) -> dict[str, Any] | None:
    """Return the plan of a store; None if there is none.

    Raises
    ------
    StoreError
        If it cannot be read, or another version of vitxr has written it.
    """
    raw = location.read(PLAN)
    if raw is None:
        return None
    try:
        plan = json.loads(raw)["attributes"]
        version = plan["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(_unreadable(location, repr(error))) from error
    if version != FORMAT:
        raise StoreError(
            f"the store {str(location)!r} has the layout {version!r}; this version of vitxr knows "
            f"{FORMAT}. Open it with the version that wrote it ({plan.get('vitxr_version', '?')})."
        )
    wrong = [key for key, fits in _SHAPE_OF_A_PLAN.items() if not fits(plan.get(key))]
    if wrong:
        raise StoreError(_unreadable(location, f"{', '.join(wrong)} make no sense"))
    return dict(plan)


def _unreadable(location: Location, why: str) -> str:
    return (
        f"the plan of the store {str(location)!r} ({PLAN}) cannot be read: {why}. Restore the file "
        "from a copy, or extract into another path."
    )


def _is_cut(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = list(value.values())
    if sorted(value) != sorted(f.name for f in fields(Cut)) or not all(
        type(n) is int and n >= 1 for n in numbers
    ):
        return False
    cut = Cut(**value)
    return (
        cut.images_per_unit <= cut.images
        and cut.rows_per_unit <= cut.rows
        and cut.images * cut.rows <= _MOST_UNITS
    )


#: What each part of a plan must be.
_SHAPE_OF_A_PLAN: dict[str, Callable[[Any], bool]] = {
    "cut": _is_cut,
    "variables": lambda v: (
        isinstance(v, list) and bool(v) and all(isinstance(n, str) and n in VARIABLES for n in v)
    ),
    "fingerprint": lambda v: isinstance(v, dict),
    "root": lambda v: isinstance(v, dict),
    "layout": lambda v: (
        isinstance(v, dict)
        and all(".." not in key.split("/") and not key.startswith("/") for key in v)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in v.values())
    ),
}


def is_finished(location: Location, root: Mapping[str, Any]) -> bool:
    """Whether the root metadata is there, with the attributes that the plan has for it.

    An empty group is not enough: zarr makes one of whatever it opens to write.
    """
    try:
        found = json.loads(location.read(ROOT) or b"")["attributes"]
        return all(found[key] == value for key, value in root.items())
    except (ValueError, KeyError, TypeError):
        return False


class Ledger:
    """Access to a store that is written unit by unit, in any order, by any number of writers.

    Each writer has a Ledger of its own.

    Parameters
    ----------
    location
        Where the store is.
    plan
        Its plan, if it is at hand.
    """

    def __init__(self, location: Location, plan: Mapping[str, Any] | None = None):
        plan = read_plan(location) if plan is None else plan
        if plan is None:
            raise StoreError(f"{str(location)!r} has no plan ({PLAN}): it is no store of extract.")
        self.location = location
        self.fingerprint: dict[str, Any] = plan["fingerprint"]
        self.cut = Cut(**plan["cut"])
        self.root: dict[str, Any] = plan["root"]
        self.layout: dict[str, list[int]] = plan["layout"]
        self._scratch = np.empty(0, np.uint8)
        self.arrays: dict[str, Shards] = {}
        for name in plan["variables"]:
            metadata = location.read(f"{name}/zarr.json")
            if metadata is None:
                raise StoreError(f"the store {str(location)!r} has lost {name}/zarr.json.")
            try:
                array = Shards.of(name, metadata)
                lattice = dict(zip(array.dims, array.shape, strict=True))
                if (lattice["image"], lattice.get("shift_y", 1)) != (
                    self.cut.images,
                    self.cut.rows,
                ):
                    raise ValueError(f"{lattice} is not the shape of the plan")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise StoreError(
                    f"{name}/zarr.json of the store {str(location)!r} cannot be read: {error!r}. "
                    "Restore it from a copy, or extract into another path."
                ) from error
            self.arrays[name] = array

    def shards(self, unit: int) -> Iterator[tuple[Shards, str, tuple[slice, ...]]]:
        """Walk over a unit's shards in the order of the record: array, key, place in the array."""
        region = self.cut.region(unit)
        for array in self.arrays.values():
            for key, place in array.within(region):
                yield array, key, place

    def records(self, units: Sequence[int] | None = None) -> npt.NDArray[np.uint64]:
        """Sizes and checksums of each unit's shards, (unit, shard, 2); zeros where not done."""
        every = range(len(self.cut)) if units is None else units
        out = np.zeros((len(every), sum(1 for _ in self.shards(0)), 2), np.uint64)
        found = self.location.read_many(map(_record, every))
        for row, unit in zip(out, every, strict=True):
            raw = found.get(_record(unit), b"")
            if len(raw) == row.nbytes:
                row[...] = np.frombuffer(raw, "<u8").reshape(row.shape)
        return out

    def done(self) -> npt.NDArray[np.bool_]:
        """Return for each unit whether it is recorded and its shards have the recorded sizes."""
        records = self.records()
        done: npt.NDArray[np.bool_] = np.all(records[:, :, 0] > 0, axis=1)
        sizes = self._sizes()
        for unit in np.flatnonzero(done):
            expected = records[unit, :, 0]
            keys = (key for _, key, _ in self.shards(int(unit)))
            done[unit] = all(
                sizes.get(key) == size for key, size in zip(keys, expected.tolist(), strict=True)
            )
        return done

    def _sizes(self) -> dict[str, int]:
        out: dict[str, int] = {}
        for name in self.arrays:
            out |= self.location.sizes(name)
        return out

    def forget(self, units: Sequence[int]) -> None:
        """Take units back: the store is unfinished again, and the next run writes them."""
        self.location.erase([ROOT])
        self.location.erase(map(_record, units))

    def write(
        self,
        unit: int,
        arrays: Mapping[str, npt.NDArray[Any]],
        stop: threading.Event | None = None,
    ) -> None:
        """Write one unit's shards, then its record; once ``stop`` is set, no further one."""
        region = self.cut.region(unit)
        record = []
        for name, data in arrays.items():
            array = self.arrays[name]
            origin = [region[d].start if d in region else 0 for d in array.dims]
            expected = tuple(
                region[d].stop - region[d].start if d in region else n
                for d, n in zip(array.dims, array.shape, strict=True)
            )
            if data.shape != expected:
                raise ValueError(f"{name} of unit {unit}: shape {data.shape}, expected {expected}")
            for key, place in array.within(region):
                if stop is not None and stop.is_set():
                    return
                inside = tuple(
                    slice(s.start - o, s.stop - o) for s, o in zip(place, origin, strict=True)
                )
                shard = array.encode(data[inside], self._room(array.most_bytes))
                record.append((len(shard), array.checksum(shard)))
                self.location.write({key: shard})
        self.location.write({_record(unit): np.array(record, "<u8").tobytes()})

    def _room(self, size: int) -> npt.NDArray[np.uint8]:
        # Used again for every shard: fresh memory costs as much as filling it.
        if self._scratch.size < size:
            self._scratch = aligned(size)
        return self._scratch

    def finished(self) -> bool:
        """Whether the root metadata is there."""
        return is_finished(self.location, self.root)

    def finish(self) -> None:
        """Write the root metadata, which makes the store whole.

        Raises
        ------
        StoreError
            If a unit is not recorded, or a recorded shard is gone or has another size.
        """
        left = np.flatnonzero(~self.done())
        if left.size:
            raise StoreError(
                f"the store {str(self.location)!r} misses {left.size} of {len(self.cut)} units "
                f"(the first: {self.describe(int(left[0]))}) and cannot be finished: run extract "
                "again with the same arguments to write them."
            )
        self.location.write({ROOT: self.root_json()})

    def root_json(self) -> bytes:
        """Return the root metadata of the whole store."""
        return _json({"zarr_format": 3, "node_type": "group", "attributes": self.root})

    def describe(self, unit: int) -> str:
        """Name a unit by what it holds."""
        region = self.cut.region(unit)
        names = self.fingerprint.get("image_names", [])[region["image"]]
        if not names:
            names = [str(i) for i in range(region["image"].start, region["image"].stop)]
        what = f"image {names[0]!r}" + (f" to {names[-1]!r}" if len(names) > 1 else "")
        rows = region["shift_y"]
        if rows.stop - rows.start == self.cut.rows:
            return what
        return f"{what}, shift_y {rows.start} to {rows.stop - 1}"


def _record(unit: int) -> str:
    return f"{RECORD}/c.{unit}.0.0"


def plan_json(
    layout: Mapping[str, bytes],
    variables: Sequence[str],
    cut: Cut,
    root: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    version: str,
) -> bytes:
    """Write a plan as the metadata of the group ``_vitxr``."""
    return _json(
        {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                "about": "plan of a vitxr store; record(unit, shard) has the size and checksum of "
                "each finished unit's shards",
                "format": FORMAT,
                "vitxr_version": version,
                "variables": list(variables),
                "cut": asdict(cut),
                "fingerprint": dict(fingerprint),
                "root": dict(root),
                "layout": {
                    key: [len(data), crc32c(np.frombuffer(data, np.uint8))]
                    for key, data in layout.items()
                },
            },
        }
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def find(location: Location, fingerprint: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """Return the plan of what is at ``location``, to go on with it; None if there is nothing.

    Raises
    ------
    StoreError
        If something else is there, if ``resume`` is False, or if the store was
        made with another fingerprint; the message shows the difference.
    """
    plan = read_plan(location)
    if plan is None:
        if location.exists():
            raise StoreError(
                f"{str(location)!r} exists and is not a store of vitxr.extract: nothing was "
                "written. Choose another path."
            )
        return None
    if not resume:
        raise StoreError(
            f"the store {str(location)!r} exists and resume=False: nothing was written. Choose "
            "another path, delete the store, or pass resume=True to go on with it."
        )
    different = differences(plan["fingerprint"], fingerprint)
    if different:
        raise StoreError(
            f"the store {str(location)!r} was made with other settings, so this run cannot go on "
            "with it: nothing was written. Stored -> asked:\n  "
            + "\n  ".join(different)
            + "\nChoose another path, or pass the stored settings."
        )
    return plan


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
