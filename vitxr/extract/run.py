"""Run the units of a plan: into a store, on a cluster, or as a Dask graph."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitxr.errors import ArgumentError, StoreError
from vitxr.extract.plan import Plan, Task, Unit
from vitxr.extract.units import compute, prepare
from vitxr.names import VARIABLES
from vitxr.store import ledger
from vitxr.store.files import open_store

__all__ = ["check", "into_store", "lazy"]

#: Finished units that may wait for the disk.
_QUEUE = 2


def check(store: str | Path | None, client: Any, model: Any) -> None:
    """Refuse what cannot be run, before anything is planned."""
    if store is None and client is not None:
        raise ArgumentError(
            "client= runs an extraction into a store, and store is None. Name a store; or leave "
            "client out: the lazy result is computed by whatever Dask scheduler is active."
        )
    if store is not None and Path(store).suffix != ".zarr":
        raise ArgumentError(f"store={str(store)!r}: expected a folder name ending in .zarr.")
    if client is not None and (getattr(model, "spec", None) is None or model.hooks()):
        raise ArgumentError(
            "client= needs a model that each worker can load by itself, and this one was made from "
            "a module in memory, or has hooks. Save it, and load it with vitxr.load_model(folder)."
        )


def lazy(plan: Plan) -> xr.Dataset:
    """Build the result as Dask blocks that run the model when they are computed."""
    import dask
    import dask.array as da
    from dask.base import tokenize

    token = tokenize(plan.fingerprint())
    bands = len(plan.units) // plan.stim.sizes["image"]
    pieces = [
        dask.delayed(compute, pure=True, traverse=False)(
            plan.task(unit), dask_key_name=f"vitxr-unit-{token}-{unit.index}"
        )
        for unit in plan.units
    ]
    ds = plan.coords.copy()
    for name, (dims, shape) in plan.forms.items():
        blocks = [
            da.from_delayed(
                piece[name],
                shape=(1, unit.rows.stop - unit.rows.start, *shape[2:]),
                dtype=plan.dtype,
                name=f"vitxr-{name}-{token}-{unit.index}",
            )
            for piece, unit in zip(pieces, plan.units, strict=True)
        ]
        images = [
            da.concatenate(blocks[i : i + bands], axis=1) for i in range(0, len(blocks), bands)
        ]
        ds[name] = (dims, da.concatenate(images, axis=0), VARIABLES[name].attrs)
    ds.attrs = plan.attrs
    return ds


def into_store(
    plan: Plan, store: str | Path, resume: bool, client: Any, progress: bool
) -> xr.Dataset:
    """Compute what the store does not hold yet, finish it, and open it."""
    path = Path(store)
    fingerprint = plan.fingerprint()
    book = ledger.find(path, fingerprint, resume)
    if book is None:
        template, layout = plan.template()
        book = ledger.create(path, template, layout, len(plan.units), fingerprint)
    done = book.done()
    todo = [unit for unit in plan.units if not done[unit.index]]
    if todo:
        columns = plan.coords.sizes["shift_x"]
        frames = sum((u.rows.stop - u.rows.start) * columns for u in plan.units)
        left = sum((u.rows.stop - u.rows.start) * columns for u in todo)
        with _bar(frames, frames - left, progress) as bar:
            finished = _on_client(plan, path, todo, client) if client else _here(plan, book, todo)
            for unit in finished:
                bar.update((unit.rows.stop - unit.rows.start) * columns)
    book.finish()
    ds = open_store(path)
    assert isinstance(ds, xr.Dataset)
    return ds


@contextmanager
def _bar(total: int, initial: int, show: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(
        total=total, initial=initial, unit="frame", desc="extract", disable=not show, smoothing=0.1
    ) as bar:
        yield bar


def _here(plan: Plan, book: ledger.Ledger, todo: list[Unit]) -> Iterator[Unit]:
    """Compute in this process; one thread writes beside the forward pass."""
    waiting: list[tuple[Unit, Future[None]]] = []
    image, pixels = -1, np.empty(0)
    with ThreadPoolExecutor(1, thread_name_prefix="vitxr-write") as writer:
        try:
            for unit in todo:
                if unit.image != image:
                    image = unit.image
                    pixels = prepare(plan.stim, image, plan.model, plan.preprocess)
                arrays = compute(plan.task(unit), pixels)
                while len(waiting) >= _QUEUE:
                    yield _written(waiting)
                future = writer.submit(book.write, unit.index, unit.region, arrays)
                waiting.append((unit, future))
            while waiting:
                yield _written(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _written(waiting: list[tuple[Unit, Future[None]]]) -> Unit:
    unit, future = waiting.pop(0)
    try:
        future.result()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"writing failed: {error}. What is recorded as done is safe; mend the cause and run "
            "extract again with the same arguments to go on."
        ) from error
    return unit


def _on_client(plan: Plan, path: Path, todo: list[Unit], client: Any) -> Iterator[Unit]:
    """Let the workers of a dask.distributed cluster compute and write the units."""
    from distributed import as_completed

    path = path.absolute()
    futures = {
        client.submit(
            _compute_and_write,
            plan.task(unit),
            unit,
            path,
            pure=False,
        ): unit
        for unit in todo
    }
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        client.cancel([f for f in futures if not f.done()])


def _compute_and_write(task: Task, unit: Unit, path: Path) -> None:
    arrays = compute(task)
    ledger.Ledger(path).write(unit.index, unit.region, arrays)
