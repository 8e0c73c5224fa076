"""A store while it is written: its shards, its record of finished units, its end.

The array ``_vitxr/record`` holds for each unit and each of its shards the size and a
checksum. The metadata of the root group is written last, so that a store that is not
finished cannot be opened as if it were whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import StoreError
from vitxr.store.local import aligned
from vitxr.store.location import Location
from vitxr.store.plans import GROUP, PLAN, ROOT, Cut, is_finished, read_plan, root_json
from vitxr.store.shards import Shards

__all__ = ["RECORD", "Ledger"]

RECORD = f"{GROUP}/record"


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
        self._scratch = np.empty(0, np.uint8)
        self.arrays: dict[str, Shards] = {}
        for name in plan["variables"]:
            metadata = location.read(f"{name}/zarr.json")
            if metadata is None:
                raise StoreError(
                    f"the store {str(location)!r} has lost {name}/zarr.json. The same extract, run "
                    "again, writes it anew."
                )
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
                    f"{name}/zarr.json of the store {str(location)!r} makes no sense: {error!r}. "
                    "The same extract, run again, writes it anew."
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
        self.location.write({ROOT: root_json(self.root)})

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
