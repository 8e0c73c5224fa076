"""The plan of a store: how it is cut, what decides its numbers, what its metadata are.

It is written first and never changed, as the attributes of the group ``_vitxr``. Here it is
read, checked, and compared: with the run that is asked for, and with the metadata found.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vitxr.errors import StoreError
from vitxr.names import is_name
from vitxr.store.location import Location
from vitxr.store.shards import crc32c

__all__ = [
    "GROUP",
    "PLAN",
    "ROOT",
    "Cut",
    "altered",
    "check_layout",
    "check_root",
    "differences",
    "differences_of_root",
    "find",
    "is_finished",
    "plan_json",
    "read_plan",
    "root_json",
    "signature",
]

GROUP = "_vitxr"
PLAN = f"{GROUP}/zarr.json"
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
        # The record is laid out after the plan: where it is alone, nothing would be checked.
        if location.read(f"{GROUP}/record/zarr.json") is not None:
            raise StoreError(_unreadable(location, "it is missing"))
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
    "variables": lambda v: isinstance(v, list) and bool(v) and all(map(is_name, v)),
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
    return not differences_of_root(location.read(ROOT), root)


def differences_of_root(raw: bytes | None, root: Mapping[str, Any]) -> list[str]:
    """List what the root metadata lack of the plan's attributes; others may be among them."""
    if raw is None:
        return ["missing"]
    try:
        found = dict(json.loads(raw)["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"cannot be read ({error!r})"]
    return differences(root, {key: found[key] for key in root if key in found})


def altered(location: Location, plan: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Compare coordinates and metadata, which are no unit's, with their recorded checksums.

    Returns
    -------
    dict of str to str
        What is not as it was written, and whether it is missing or altered, by key.
    dict of str to bytes
        Every object that was found, by key.
    """
    layout = plan["layout"]
    found = location.read_many(layout)
    bad = {key: "altered" if key in found else "missing" for key in layout}
    for key, data in found.items():
        if layout[key] == signature(data):
            del bad[key]
    return bad, found


def check_layout(location: Location, plan: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the coordinates and metadata of a store, by key; refuse any that were altered.

    Raises
    ------
    StoreError
        If one is missing or has another checksum.
    """
    bad, found = altered(location, plan)
    if bad:
        some = [f"{key}: {how}" for key, how in list(bad.items())[:5]]
        some += [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise StoreError(
            f"the store {str(location)!r} has coordinates or metadata that are not as they were "
            f"written: {'; '.join(some)}. The same extract, run again, writes them anew; or "
            "restore them from a copy."
        )
    return found


def check_root(location: Location, plan: Mapping[str, Any]) -> None:
    """Refuse a root whose attributes are not the plan's.

    Raises
    ------
    StoreError
        If they are missing, differ, or cannot be read.
    """
    different = differences_of_root(location.read(ROOT), plan["root"])
    if different:
        raise StoreError(
            f"all units of the store {str(location)!r} are written, and the attributes of its root "
            f"({ROOT}) are not as they were written. Written -> found:\n  "
            + "\n  ".join(different)
            + "\nThe same extract, run again, writes them anew. If it is refused, the plan was "
            f"altered ({PLAN}): restore that from a copy."
        )


def signature(data: bytes) -> list[int]:
    """Size and CRC-32C of an object, as the plan has them."""
    return [len(data), crc32c(np.frombuffer(data, np.uint8))]


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
                "layout": {key: signature(data) for key, data in layout.items()},
            },
        }
    )


def root_json(root: Mapping[str, Any]) -> bytes:
    """Write the root metadata of a whole store."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": root})


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


#: Parts of a fingerprint that follow from others.
_DERIVED = {"images_per_unit", "rows_per_unit"}
#: Characters of a value that a message shows.
_SHOWN = 80


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """List where two fingerprints differ, one readable line each.

    What follows from other parts is listed only where these are the same.

    Examples
    --------
    >>> differences({"layers": [0, 1], "rows_per_unit": 3}, {"layers": [0], "rows_per_unit": 5})
    ['layers: [0, 1] -> [0]']
    >>> differences({"coordinates": {"label": "3f2a", "layer": "77b0"}},
    ...             {"coordinates": {"label": "e01c", "layer": "77b0"}})
    ['coordinates: other values of label']
    """
    out = {}
    for key in sorted(set(stored) | set(asked)):
        # Through JSON: what was stored has no tuples or NumPy scalars any more.
        a, b = (json.loads(json.dumps(f.get(key, "absent"))) for f in (stored, asked))
        if a != b:
            out[key] = _difference(key, a, b)
    shown = set(out) - _DERIVED or set(out)
    return [line for key, lines in out.items() if key in shown for line in lines]


def _difference(key: str, a: Any, b: Any) -> list[str]:
    """Say where two values differ."""
    a, b = _opened(a), _opened(b)
    if isinstance(a, dict) and isinstance(b, dict):
        changed = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
        if key == "coordinates":  # of which there are hashes only
            return [f"coordinates: other values of {', '.join(changed)}"]
        return [
            line
            for k in changed
            for line in _difference(f"{key}.{k}", a.get(k, "absent"), b.get(k, "absent"))
        ]
    first, second = json.dumps(a), json.dumps(b)
    if max(len(first), len(second)) <= _SHOWN:
        return [f"{key}: {first} -> {second}"]
    if isinstance(a, list) and isinstance(b, list) and a and b:
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        count = "" if len(a) == len(b) else f"{len(a)} values -> {len(b)} values"
        if at is None:
            return [f"{key}: {count}, which begin alike"]
        (line,) = _difference(f"{key}[{at}]", a[at], b[at])[:1]
        return [f"{key}: {count}, the first that differ: {line}" if count else line]
    same = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), 0)
    return [f"{key}: {_short(first, same)} -> {_short(second, same)}"]


def _opened(value: Any) -> Any:
    """Give what JSON text holds, as that of the preprocessing's settings."""
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _short(text: str, same: int) -> str:
    """Show a long text from a little before the place where it differs from another."""
    if len(text) <= _SHOWN:
        return text
    start = max(same - 20, 0)
    part = text[start : start + _SHOWN - 20]
    dots = "..." if start + len(part) < len(text) else ""
    return f"{'...' * (start > 0)}{part}{dots} ({len(text)} characters)"
