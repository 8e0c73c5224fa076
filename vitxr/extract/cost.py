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
from vitxr.store.layout import Array
from vitxr.store.location import Location

__all__ = ["Cost", "check_room", "cost", "probe"]

#: Share of the bytes that metadata, indices and folders may add.
_MARGIN = 0.02


@dataclass(frozen=True)
class Cost:
    """What an extraction into a store costs.

    Attributes
    ----------
    frames
        Images times shifts: forward passes of one frame.
    batches
        Passes they are run in.
    bytes
        Bytes to be written. Of values that are rounded and compressed, bytes before it.
    files
        Files, or objects, to be written.
    free
        Bytes free where the store will be; None where nobody can tell.
    seconds
        Estimated time; None if no pass was tried.
    """

    frames: int
    batches: int
    bytes: int
    files: int
    free: int | None
    seconds: float | None = None

    def __str__(self) -> str:
        text = (
            f"{self.frames:,} forward passes in {self.batches:,} batches, "
            f"{_bytes(self.bytes)} in {self.files:,} files"
        )
        if self.free is not None:
            text += f" ({_bytes(self.free)} free)"
        return text if self.seconds is None else f"{text}, about {_time(self.seconds)}"


def cost(plan: Plan, location: Location | None, todo: Sequence[int]) -> Cost:
    """Count what units cost, without running any."""
    frames = [plan.frames(unit) for unit in todo]
    layers = {"activation", "prefix", "attention"} & set(plan.frame)
    shards = len(layers) * len(plan.layers) + len(set(plan.frame) - layers)
    return Cost(
        frames=sum(frames),
        batches=sum(math.ceil(n / plan.batch) for n in frames),
        bytes=len(todo) * sum(_unit_bytes(plan.array(name)) for name in plan.frame),
        files=len(todo) * (shards + 1),
        free=None if location is None else location.free(),
    )


def _unit_bytes(array: Array) -> int:
    """Bytes that a unit writes of a variable; shards at the end of the array are padded."""
    sizes = dict(zip(array.dims, array.shape, strict=True))
    shards = math.ceil(sizes.get("layer", 1))
    return shards * math.prod(array.shard) * np.dtype(array.dtype).itemsize


def probe(plan: Plan, known: Cost) -> Cost:
    """Add the time, from one batch that is run three times and thrown away."""
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
