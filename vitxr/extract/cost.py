"""What an extraction costs: forward passes, bytes, files, time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitxr.errors import StoreError
from vitxr.extract.plan import Plan
from vitxr.extract.units import compute
from vitxr.store.layout import Array, count_objects, is_laid_out
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import find

__all__ = ["Cost", "check_room", "cost", "cost_of_store", "probe"]

#: Share of the bytes that metadata, indices and folders may add.
_MARGIN = 0.02


@dataclass(frozen=True)
class Cost:
    """What an extraction into a store costs.

    Attributes
    ----------
    frames
        Images times shifts that are to be run: forward passes of one frame.
    batches
        Passes they are run in.
    bytes
        Bytes of activations to be written. Of values that are rounded and compressed, bytes
        before it.
    files
        Files, or objects, to be written, those of coordinates and metadata among them.
    free
        Bytes free where the store will be; None where nobody can tell.
    seconds
        Estimated time; None if no pass was tried.
    compressed
        Whether ``bytes`` will be less.
    written
        Frames that an earlier run has written.
    """

    frames: int
    batches: int
    bytes: int
    files: int
    free: int | None
    seconds: float | None = None
    compressed: bool = False
    written: int = 0

    def __str__(self) -> str:
        text = (
            f"{_count(self.frames, 'forward pass', 'es')} in "
            f"{_count(self.batches, 'batch', 'es')}, "
            f"{_bytes(self.bytes)}{' before compression' * self.compressed} in "
            f"{_count(self.files, 'file', 's')}"
        )
        if self.free is not None:
            text += f" ({_bytes(self.free)} free)"
        if self.seconds is not None:
            text += f", about {_time(self.seconds)}"
        return text + (f"; {self.written:,} are written already" if self.written else "")


def _count(number: int, what: str, several: str) -> str:
    return f"{number:,} {what}{several * (number != 1)}"


def cost(plan: Plan, location: Location | None, todo: Sequence[int], others: int = 1) -> Cost:
    """Count what units cost, without running any; ``others`` are files that are no unit's."""
    frames = [plan.frames(unit) for unit in todo]
    layered = sum("layer" in plan.form(name)[0] for name in plan.frame)
    shards = layered * len(plan.layers) + len(plan.frame) - layered
    every = sum(map(plan.frames, range(len(plan.cut))))
    return Cost(
        frames=sum(frames),
        batches=sum(math.ceil(n / plan.batch) for n in frames),
        bytes=len(todo) * sum(_unit_bytes(plan.array(name)) for name in plan.frame),
        files=len(todo) * (shards + 1) + others,
        free=None if location is None else location.free(),
        compressed=plan.storage.keepbits is not None,
        written=every - sum(frames),
    )


def cost_of_store(plan: Plan, location: Location) -> Cost:
    """Count what is missing of a store, which is not changed.

    Raises
    ------
    StoreError
        If something else is there, the store is of another run, or cannot be written.
    """
    known = find(location, plan.fingerprint(), resume=True)
    if known is None or not is_laid_out(location):
        location.check_writable()
        others = count_objects(plan.coords, plan.arrays, plan.cut)
        return cost(plan, location, range(len(plan.cut)), others)
    book = Ledger(location, known)
    todo = np.flatnonzero(~book.done()).tolist()
    unmade = not book.finished()
    if todo or unmade:
        location.check_writable()
    # A store that is damaged loses its root until it is mended.
    return cost(plan, location, todo, int(bool(todo) or unmade))


def _unit_bytes(array: Array) -> int:
    """Bytes that a unit writes of a variable; shards at the end of the array are padded."""
    sizes = dict(zip(array.dims, array.shape, strict=True))
    shards = math.ceil(sizes.get("layer", 1))
    return shards * math.prod(array.shard) * np.dtype(array.dtype).itemsize


def probe(plan: Plan, known: Cost) -> Cost:
    """Add the time, from one batch that is run three times and thrown away."""
    if not known.frames:
        return replace(known, seconds=0.0)
    task = plan.task(0)
    few = task.offsets[: plan.batch]
    images = math.ceil(plan.batch / len(few))
    task = replace(task, stim=task.stim.isel(image=slice(images)), offsets=few, columns=len(few))
    frames = task.stim.sizes["image"] * len(few)
    compute(task)  # the first one warms up
    tries = []
    for _ in range(2):
        start = time.perf_counter()
        compute(task)
        tries.append(time.perf_counter() - start)
    seconds = min(tries)
    return replace(known, seconds=seconds / frames * known.frames)


def check_room(plan: Plan, location: Location, todo: Sequence[int]) -> None:
    """Refuse a run that the disk has no room for."""
    needed = cost(plan, location, todo)
    # What compresses may turn out small; only what does not can be known to be too large.
    if needed.free is None or plan.storage.keepbits is not None:
        return
    if needed.bytes * (1 + _MARGIN) > needed.free:
        raise StoreError(
            f"{str(location)!r}: the disk has {_bytes(needed.free)} free, and the run would write "
            f"{needed}. Nothing was written. Keep fewer layers, feature maps or shifts, use "
            "storage_dtype='float16' or 'bitround7', or another disk."
        )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:,.1f} h"
