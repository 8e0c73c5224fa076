"""Fill a store: find or lay it out, let an executor run what is missing, finish it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError
from vitxr.extract.cost import check_room, cost, probe
from vitxr.extract.plan import Plan
from vitxr.models.load import find_device
from vitxr.store.files import open_store
from vitxr.store.layout import create, is_laid_out, mend
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location
from vitxr.store.plans import find

__all__ = ["check", "into_store"]

Workers = int | Sequence[str]

#: Batches of a run that is told its time beforehand: trying two takes a hundredth of it.
_WORTH_A_PROBE = 200


def check(store: str | Path | None, client: Any, workers: Workers, model: Any) -> None:
    """Refuse what cannot be run, before anything is planned."""
    if store is None and client is not None:
        raise ArgumentError(
            "client= runs an extraction into a store, and store is None. Name a store; or leave "
            "client out: the lazy result is computed by whatever Dask scheduler is active."
        )
    if store is not None and not str(store).rstrip("/").endswith(".zarr"):
        raise ArgumentError(
            f"store={str(store)!r}: expected the name of a folder or URL ending in .zarr."
        )
    if store is not None:
        Location(store)
    if client is not None and (getattr(model, "spec", None) is None or model.hooks()):
        raise ArgumentError(
            "client= needs a model that each worker can load by itself, and this one was made from "
            "a module in memory, or has hooks. Save it, and load it with vitxr.load_model(folder)."
        )
    for device in devices(workers):
        if device is not None:
            find_device(device)
    if client is not None and not hasattr(client, "submit"):
        raise ArgumentError(
            f"client is a {type(client).__name__}; expected a dask.distributed.Client."
        )
    if workers != 1 and (store is None or client is not None):
        raise ArgumentError(
            f"workers={workers!r} are processes that fill a store by themselves: name a store, and "
            "leave client out."
        )
    if workers != 1 and str(store).startswith("memory://"):
        raise ArgumentError(
            f"workers={workers!r} are other processes, and {store!r} is in the memory of this one."
        )


def devices(workers: Workers) -> list[str | None]:
    """Return the device of each worker process; None where it is the model's own."""
    if isinstance(workers, int | np.integer) and not isinstance(workers, bool) and workers >= 1:
        return [None] * int(workers)
    listed = list(workers) if isinstance(workers, list | tuple) else []
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ArgumentError(
            f"workers={workers!r}: expected a number of processes, or a device for each, such as "
            "['cuda:0', 'cuda:1']."
        )
    return listed


def into_store(
    plan: Plan, store: str | Path, resume: bool, client: Any, workers: Workers, progress: bool
) -> xr.Dataset:
    """Compute what the store does not hold yet, finish it, and open it."""
    location = Location(store)
    if workers != 1:
        from vitxr.extract import processes

        processes.pack(plan)  # refused before anything is written
    _ = plan.arrays  # what no store can hold is refused before anything is written
    with location.alone():
        book = _open(plan, location, resume)
        todo = np.flatnonzero(~book.done()).tolist()
        if todo:
            location.check_writable()
            check_room(plan, location, todo)
            # Recorded, and damaged since: no executor may take them for done.
            recorded = np.flatnonzero(np.any(book.records(), axis=(1, 2))).tolist()
            damaged = sorted(set(todo) & set(recorded))
            if damaged or book.finished():
                book.forget(damaged)
            if progress:
                _announce(plan, location, todo, here=client is None and workers == 1)
            _watch(plan, todo, _executor(plan, book, todo, client, workers), progress)
        if not book.finished():
            book.finish()
    ds = open_store(store)
    assert isinstance(ds, xr.Dataset)
    return ds


def _open(plan: Plan, location: Location, resume: bool) -> Ledger:
    fingerprint = plan.fingerprint()
    known = find(location, fingerprint, resume)
    if known is None or not is_laid_out(location):
        location.sweep()
        check_room(plan, location, range(len(plan.cut)))
        return create(location, plan.coords, plan.arrays, plan.cut, fingerprint)
    location.sweep()
    mend(location, known, plan.coords, plan.arrays, plan.cut)
    return Ledger(location, known)


def _executor(
    plan: Plan, book: Ledger, todo: list[int], client: Any, workers: Workers
) -> Iterator[tuple[int, list[str]]]:
    if client is not None:
        from vitxr.extract import cluster

        return cluster.run(plan, book, todo, client)
    if workers != 1:
        from vitxr.extract import processes

        return processes.run(plan, book, todo, devices(workers))
    from vitxr.extract import pipeline

    return pipeline.run(plan, book, todo)


def _announce(plan: Plan, location: Location, todo: list[int], here: bool) -> None:
    """Say what the run costs; how long it takes too, if it is long and run by this process."""
    from tqdm.auto import tqdm

    known = cost(plan, location, todo)
    if here and known.batches >= _WORTH_A_PROBE:
        known = probe(plan, known)
    tqdm.write(f"extract: {known}", file=sys.stderr)


def _watch(
    plan: Plan,
    todo: list[int],
    executor: Iterator[tuple[int, list[str]]],
    progress: bool,
) -> None:
    """Drive an executor under a progress bar; pass on what it reports."""
    from tqdm.auto import tqdm

    total = sum(map(plan.frames, range(len(plan.cut))))
    left = sum(map(plan.frames, todo))
    with tqdm(
        total=total,
        initial=total - left,
        unit="frame",
        desc="extract",
        disable=not progress,
        smoothing=0.1,
    ) as bar:
        try:
            for unit, reports in executor:
                bar.update(plan.frames(unit))
                for report in reports:
                    warnings.warn(report, RuntimeWarning, stacklevel=4)
        finally:
            executor.close()  # type: ignore[attr-defined]
