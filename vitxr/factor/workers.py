"""Rows that stay on the workers of a dask.distributed cluster: small sums come and go."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitxr.errors import ArgumentError, DataError
from vitxr.factor.blocks import block_rows, own_threads
from vitxr.factor.rows import LocalRows, Pass, Sums

__all__ = ["WorkerRows", "check_client", "on_workers"]

Array = npt.NDArray[Any]

#: Seconds between looks at whether all workers are still there.
LOOK = 1.0
#: Seconds after an error in which a worker may turn out to be gone.
PATIENCE = 5.0


@dataclass
class _Held:
    """What one worker keeps between passes."""

    data: Array
    factor: Array


#: In a worker's process: what it holds for each fit.
_HELD: dict[str, _Held] = {}


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
    """The holder of rows whose rows are with workers: see :class:`vitxr.factor.rows.Holder`."""

    def __init__(self, x: Any, client: Any):
        self._client, self._token = client, uuid.uuid4().hex
        threads = _addresses(client)
        ranges = _ranges(x.chunks[0], list(threads.values()))
        pairs = zip(threads, ranges, strict=True)
        self._where = {worker: rows for worker, rows in pairs if rows.stop > rows.start}

    def load(self, x: Any) -> None:
        """Have each worker compute its rows, and keep them."""
        pinned = {"allow_other_workers": False}
        parts = {
            worker: (self._client.compute(x[rows], workers=[worker], **pinned),)
            for worker, rows in self._where.items()
        }
        self._each(_load, parts)

    def take(self, factor: Array) -> None:
        """Take over first factors."""
        parts = {w: (np.ascontiguousarray(factor[:, r]),) for w, r in self._where.items()}
        self._each(_take, parts)

    def run(self, task: Pass) -> Sums:
        """Make one pass over the tensor."""
        total, *others = self._each(_run, dict.fromkeys(self._where, (task,)), shared=True)
        for part in others:
            total += part
        return total

    def give(self, columns: slice) -> Array:
        """Return first factors, a copy."""
        parts = self._each(_give, dict.fromkeys(self._where, (columns,)))
        return np.concatenate(parts, axis=1)

    def keep(self, columns: Array) -> None:
        """Go on with some of the columns, a mask."""
        self._each(_keep, dict.fromkeys(self._where, (columns,)))

    def close(self) -> None:
        """Free what the workers hold, of those that are left."""
        there = _addresses(self._client)
        self._where = {w: rows for w, rows in self._where.items() if w in there}
        self._each(_free, dict.fromkeys(self._where, ()))

    def _each(
        self, task: Callable[..., Any], given: dict[str, tuple[Any, ...]], shared: bool = False
    ) -> list[Any]:
        """Call a function on every worker, and return what they return, in order of rows.

        A worker that is gone has taken its rows along: nobody else has them.
        """
        from distributed import wait

        self._check(0)
        client, workers, futures = self._client, list(given), []
        try:
            if shared:  # the same for all, and large: sent to one, from whom the others have it
                # (not to all: distributed's broadcast waits without end for a worker that died)
                given = dict.fromkeys(workers, tuple(client.scatter(given[workers[0]], hash=False)))
            for worker, arguments in given.items():
                pinned = {"workers": [worker], "allow_other_workers": False, "pure": False}
                futures.append(client.submit(task, self._token, *arguments, **pinned))
            waiting = futures
            while waiting:
                try:
                    waiting = list(wait(waiting, timeout=LOOK).not_done)
                except TimeoutError:
                    self._check(0)
            return list(client.gather(futures))
        except DataError:
            client.cancel(futures)
            raise
        except Exception:
            self._check(PATIENCE)  # is it that? the scheduler may hear of it later than we do
            raise

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


def _load(token: str, data: Array) -> None:
    _HELD[token] = _Held(np.ascontiguousarray(data), np.empty((0, len(data)), data.dtype))


def _take(token: str, factor: Array) -> None:
    _HELD[token].factor = np.array(factor)  # what a task was given may not be written to


def _run(token: str, task: Pass) -> Sums:
    from distributed import get_worker

    held = _HELD[token]
    with own_threads(get_worker().state.nthreads) as pool:
        rows = LocalRows(held.data, block_rows(held.data.shape, held.data.dtype.itemsize), pool)
        rows.take(held.factor)
        return rows.run(task)


def _give(token: str, columns: slice) -> Array:
    return _HELD[token].factor[columns].copy()


def _keep(token: str, columns: Array) -> None:
    _HELD[token].factor = _HELD[token].factor[columns]


def _free(token: str) -> None:
    _HELD.pop(token, None)
