"""Rows that stay on the workers of a dask.distributed cluster: small sums come and go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import block_rows, own_threads
from vitxr.factor.kernels import contract, khatri_rao
from vitxr.factor.rows import LocalRows, Pass, Sums

__all__ = ["WorkerRows", "check_client", "on_workers"]

Array = npt.NDArray[Any]

#: Seconds between looks at whether all workers are still there.
LOOK = 1.0
#: Seconds after an error in which a worker may turn out to be gone.
PATIENCE = 5.0


def check_client(client: Any, x: Any, mask: Any) -> None:
    """Refuse what is no client, has no workers, or is given with a mask or an eager tensor."""
    if not hasattr(client, "submit") or not hasattr(client, "nthreads"):
        raise ArgumentError(
            f"client is {client!r} ({type(client).__name__}); expected a "
            "dask.distributed.Client, such as distributed.Client(address)."
        )
    if not _addresses(client):
        raise ArgumentError("the client has no workers: start some, cluster.scale(2), or wait.")
    if not hasattr(x, "chunks"):
        raise ArgumentError(
            "client is given and the tensor is in this process: chunk it, so that its workers can "
            "read it themselves, or leave client out."
        )
    if mask is not None:
        raise ArgumentError("client is given and a mask, which workers do not take: leave one out.")


@contextmanager
def on_workers(x: Any, client: Any) -> Iterator[WorkerRows]:
    """Load a tensor into the workers, each a range of rows, and free it at the end.

    Parameters
    ----------
    x
        Dask array, the mode to walk over in front. Whole chunks of that mode go to a worker, in
        proportion to its threads.
    client
        Its workers have room for the tensor together.
    """
    rows = WorkerRows(x, client)
    try:
        rows.load(x)
        yield rows
    finally:
        rows.close()


class WorkerRows:
    """The holder of rows whose rows are with workers: see :class:`vitxr.factor.rows.Keeper`.

    Small factors go to the workers, small sums come back: Khatri-Rao products and Y are as large
    as a row of the tensor for every column, and stay there. Each worker has an actor, which it is
    reached by without the scheduler's round of a task.
    """

    keeps = True

    def __init__(self, x: Any, client: Any):
        self._client = client
        self._threads = _addresses(client)
        ranges = _ranges(x.chunks[0], list(self._threads.values()))
        pairs = zip(self._threads, ranges, strict=True)
        self._where = {worker: rows for worker, rows in pairs if rows.stop > rows.start}
        self._futures: list[Any] = []
        self._actors: dict[str, Any] = {}

    def load(self, x: Any) -> None:
        """Have each worker compute its rows, and keep them."""
        for worker, rows in self._where.items():
            pinned = {"workers": [worker], "allow_other_workers": False}
            data = self._client.compute(x[rows], **pinned)
            self._futures.append(
                self._client.submit(
                    _Rows, data, self._threads[worker], actor=True, pure=False, **pinned
                )
            )
        self._actors = dict(zip(self._where, self._come(self._futures), strict=True))

    def take(self, factor: Array) -> None:
        """Take over first factors."""
        self._each("take", {w: (factor[:, rows],) for w, rows in self._where.items()})

    def run(self, task: Pass) -> Sums:
        """Make one pass over the tensor."""
        total, *others = self._each("run", dict.fromkeys(self._where, (task,)))
        for part in others:
            total += part
        return total

    def contract(self, sides: Sequence[Array], keep: int) -> Array:
        """Multiply Y of the last pass by the factors of all other modes but one."""
        return np.asarray(sum(self._each("contract", dict.fromkeys(self._where, (sides, keep)))))

    def give(self, columns: slice) -> Array:
        """Return first factors, a copy."""
        parts = self._each("give", dict.fromkeys(self._where, (columns,)))
        return np.concatenate(parts, axis=1)

    def keep(self, columns: Array) -> None:
        """Go on with some of the columns, a mask."""
        self._each("keep", dict.fromkeys(self._where, (columns,)))

    def close(self) -> None:
        """Free what the workers hold: what is left of calls would keep an actor for a while."""
        self._client.cancel(self._futures)
        self._futures, self._actors = [], {}

    def _each(self, method: str, given: dict[str, tuple[Any, ...]]) -> list[Any]:
        """Call a method on every worker, and return what comes back, in order of rows."""
        return self._come([getattr(self._actors[w], method)(*args) for w, args in given.items()])

    def _come(self, futures: Sequence[Any]) -> list[Any]:
        """Wait for futures.

        A worker that is gone has taken its rows along: nobody else has them.
        """
        out = []
        try:
            for future in futures:
                while True:
                    try:
                        out.append(future.result(timeout=LOOK))
                        break
                    except TimeoutError:
                        self._check(0)
        except DataError:
            raise
        except Exception:
            self._check(PATIENCE)  # is it that? the scheduler may hear of it later than we do
            raise
        return out

    def _check(self, patience: float) -> None:
        """Raise if a worker is gone."""
        until = time.monotonic() + patience
        while True:
            there = _addresses(self._client)
            lost = [w for w in self._where if w not in there]
            if lost:
                raise DataError(
                    f"the worker {lost[0]} died, and with it its rows of the tensor and of the "
                    "factors (often for memory: all workers together hold the tensor). Start "
                    "workers with more memory, or more of them, and fit again."
                )
            if time.monotonic() >= until:
                return
            time.sleep(LOOK)


def _addresses(client: Any) -> dict[str, int]:
    """Workers by their addresses, with the number of their threads."""
    return {str(k): int(v) for k, v in sorted(client.nthreads().items())}


def _ranges(chunks: Sequence[int], threads: Sequence[int]) -> list[slice]:
    """Divide chunks among workers, contiguous, in proportion to their threads."""
    edges = np.cumsum([0, *chunks])
    wanted = np.cumsum([0, *threads]) / sum(threads) * edges[-1]
    cuts = edges[abs(edges[:, None] - wanted).argmin(axis=0)].tolist()
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


class _Rows:
    """In a worker's process: its rows, the same rows of the first factors, and Y."""

    def __init__(self, data: Array, threads: int):
        self._data, self._threads = np.ascontiguousarray(data), threads
        self._factor = self._y = np.empty((0, len(data)), data.dtype)
        self._libraries = ThreadpoolController()  # to look for them takes as long as a small pass

    def take(self, factor: Array) -> None:
        self._factor = np.array(factor)  # what was sent may not be written to
        self._y = self._y[:0]

    def run(self, task: Pass) -> Sums:
        dtype = self._data.dtype
        with own_threads(self._threads, self._libraries) as pool:
            rows = LocalRows(self._data, block_rows(self._data.shape, dtype.itemsize), pool)
            rows.take(self._factor)
            sums = rows.run(replace(task, lead=khatri_rao(task.sides, dtype)))
        self._y, sums.y = sums.y, np.empty((len(task.lead), 0))
        return sums

    def contract(self, sides: Sequence[Array], keep: int) -> Array:
        with self._libraries.limit(limits=1, user_api="blas"):  # threads would spin on after it
            return contract(self._y, sides, keep)

    def give(self, columns: slice) -> Array:
        return self._factor[columns].copy()

    def keep(self, columns: Array) -> None:
        self._factor, self._y = self._factor[columns], self._y[columns]
