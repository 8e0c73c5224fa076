"""Units on the workers of a dask.distributed cluster, each written by who computed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vitxr.errors import ArgumentError, StoreError
from vitxr.extract.plan import Plan
from vitxr.extract.units import Task, compute
from vitxr.models.capture import exclusive
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import PLAN

__all__ = ["run"]


def run(
    plan: Plan, book: Ledger, todo: Sequence[int], client: Any
) -> Iterator[tuple[int, list[str]]]:
    """Submit units; yield each when it is recorded, with what is not finite in it."""
    from distributed import KilledWorker, as_completed

    location = book.location
    _check_shared(location, client)
    futures = {
        client.submit(_unit, plan.task(unit), unit, location, pure=False): unit for unit in todo
    }
    try:
        for future in as_completed(futures):
            unit = futures[future]
            try:
                reports = future.result()
            except KilledWorker as error:
                raise StoreError(
                    f"the unit {book.describe(unit)} was given up after several workers died with "
                    f"it (often for memory: give each more of it, or fewer threads): "
                    f"{error} What is recorded as done is safe: run extract again to go on."
                ) from error
            except OSError as error:
                raise StoreError(
                    f"a worker failed to write {book.describe(unit)}: {error}. What is recorded "
                    "as done is safe; mend the cause and run extract again to go on."
                ) from error
            yield unit, reports
            future.release()
    finally:
        client.cancel([f for f in futures if not f.done()])


def _check_shared(location: Location, client: Any) -> None:
    """Refuse a store that some worker cannot see."""
    if location.path.startswith("memory://"):
        raise ArgumentError(f"client= needs a store that its workers share; {location} is memory.")
    plan = location.read(PLAN)
    unseen = [w for w, seen in client.run(_seen, location).items() if seen != plan]
    if unseen:
        raise ArgumentError(
            f"the workers {unseen[:3]} of the client do not see the store {str(location)!r}, which "
            "was just laid out. Use a folder on a file system that all of them share, or a URL "
            "such as s3://bucket/run.zarr."
        )


def _seen(location: Location) -> bytes | None:
    return location.read(PLAN)


def _unit(task: Task, unit: int, location: Location) -> list[str]:
    """Compute and write one unit on a worker; one already written is not done again."""
    book = Ledger(location)
    if book.records([unit])[0, :, 0].all():
        return []  # the scheduler asks twice if it has lost sight of a worker
    with exclusive():
        _use_threads()
        arrays, reports = compute(task)
    book.write(unit, arrays)
    return reports


def _use_threads() -> None:
    """Give a forward pass the worker's threads: one pass runs at a time, and has them all."""
    import torch
    from distributed import get_worker

    torch.set_num_threads(get_worker().state.nthreads)
