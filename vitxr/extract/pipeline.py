"""Units computed and written in this process: decoding, forward passes and writing overlap.

A pool of threads decodes the next unit's images, this thread runs the model, and
one thread writes. The queue between the last two is bounded: arrays of at most
``QUEUE + 1`` units exist, and they are used again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vitxr.errors import StoreError
from vitxr.extract.plan import Plan
from vitxr.extract.units import compute, prepare
from vitxr.store.ledger import Ledger

__all__ = ["run"]

#: Computed units that may wait for the writer.
QUEUE = 1

Arrays = dict[str, np.ndarray]


def run(plan: Plan, book: Ledger, todo: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """Compute and write units; yield each when it is recorded, with what is not finite in it."""
    waiting: deque[tuple[int, list[str], Arrays, Future[None]]] = deque()
    free: list[Arrays] = []
    stop = threading.Event()
    decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="vitxr-decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="vitxr-write")

    def written() -> tuple[int, list[str]]:
        unit, reports, arrays, future = waiting.popleft()
        try:
            future.result()
        except Exception as error:
            raise StoreError(
                f"writing {book.describe(unit)} to {str(book.location)!r} failed: {error} What is "
                "recorded as done is safe; mend the cause and run extract again with the same "
                "arguments to go on."
            ) from error
        free.append(arrays)
        return unit, reports

    try:
        coming = _decoded(plan, todo, decoders)
        # The first unit is the longest: its arrays do for all.
        longest = max(plan.frames(unit) for unit in todo)
        for unit in todo:
            images = next(coming)
            # A writer that has failed ends the run before the next pass, not after it.
            while waiting and (len(waiting) > QUEUE or waiting[0][3].done()):
                yield written()
            arrays = free.pop() if free else _arrays(plan, longest)
            shaped, reports = compute(plan.task(unit), images, arrays)
            waiting.append((unit, reports, arrays, writer.submit(book.write, unit, shaped, stop)))
        while waiting:
            yield written()
    finally:
        # The shard that is being written is waited for, and nothing else.
        stop.set()
        writer.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


def _arrays(plan: Plan, frames: int) -> Arrays:
    return {
        name: np.empty((frames, *shape), plan.storage.dtype) for name, shape in plan.frame.items()
    }


def _decoded(
    plan: Plan, todo: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[list[np.ndarray]]:
    """Give each unit's images as the model takes them, decoded one unit ahead."""
    model = plan.model.model()
    ahead: deque[tuple[slice, list[Future[Any]]]] = deque()
    last: tuple[slice, list[Future[Any]]] | None = None
    for unit in [*todo, None]:
        if unit is not None:
            images = plan.cut.region(unit)["image"]
            if last is None or last[0] != images:
                last = (
                    images,
                    [
                        pool.submit(prepare, plan.stim, i, model, plan.preprocess)
                        for i in range(images.start, images.stop)
                    ],
                )
            ahead.append(last)
        if len(ahead) > 1 or (unit is None and ahead):
            yield [future.result() for future in ahead.popleft()[1]]
