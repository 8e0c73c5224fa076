"""Units in several processes of this machine: one a share of the cores, or one a GPU."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from vitxr.errors import ArgumentError, StoreError, VitxrError
from vitxr.extract.plan import Plan
from vitxr.store.ledger import Ledger
from vitxr.store.location import Location

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["pack", "run"]


def pack(plan: Plan) -> bytes:
    """Pickle a plan for other processes, the module itself inside where it has no name.

    Raises
    ------
    ArgumentError
        If it cannot be, as with a hook that is a local function.
    """
    try:
        return pickle.dumps(plan)
    except Exception as error:
        raise ArgumentError(
            f"workers= needs a model that can be sent to other processes, and this one cannot "
            f"({error}). Remove its hooks, or make them of functions of a module."
        ) from error


def run(
    plan: Plan, book: Ledger, todo: Sequence[int], devices: Sequence[str | None]
) -> Iterator[tuple[int, list[str]]]:
    """Start a process a device, each with every n-th unit; yield units as they are recorded."""
    import multiprocessing
    from multiprocessing.connection import wait

    # Spawned, not forked: the thread pools of torch and zarr do not survive a fork.
    context = multiprocessing.get_context("spawn")
    count = min(len(devices), len(todo))
    threads = max(1, (os.cpu_count() or 1) // count)
    sent = pack(plan)
    running = {}
    try:
        for i in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main,
                args=(theirs, sent, book.location, list(todo[i::count]), devices[i], threads),
                name=f"vitxr-{i}",
                daemon=True,
            )
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for pipe in cast("list[Connection]", wait(list(running))):
                try:
                    message = pipe.recv()
                except EOFError:
                    process = running.pop(pipe)
                    process.join()
                    raise StoreError(
                        f"the worker process {process.name} died (exit status {process.exitcode}). "
                        "If it was killed for memory, pass fewer workers. "
                        "A script that calls extract with workers= must do it under "
                        "`if __name__ == '__main__':`. What is recorded as done is safe: run "
                        "extract again to go on."
                    ) from None
                if message is None:
                    running.pop(pipe).join()
                elif isinstance(message, BaseException):
                    raise message
                else:
                    yield message
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _main(
    pipe: Any, sent: bytes, location: Location, todo: list[int], device: str | None, threads: int
) -> None:
    """Run a share of the units, and say so unit by unit; None ends it."""
    import signal

    import torch

    from vitxr.extract import pipeline

    # Ctrl-C goes to every process of a terminal; the parent ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        plan = pickle.loads(sent)  # noqa: S301 (our own, from the parent process)
        if device is not None:
            object.__setattr__(plan, "model", plan.model.on(device))
        for done in pipeline.run(plan, Ledger(location), todo):
            pipe.send(done)
        pipe.send(None)
    except VitxrError as error:
        pipe.send(error)
    except Exception as error:
        import traceback

        pipe.send(
            StoreError(
                f"a worker process failed with {type(error).__name__}: {error}\n"
                f"{traceback.format_exc()}"
            )
        )
