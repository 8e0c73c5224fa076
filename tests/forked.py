"""What the tests of faults share, and extractions that are killed.

For these a process has everything loaded and forks a child for each: starting Python, torch
and transformers takes seconds, a fork takes milliseconds. The process that forks has run no
extraction, so that its children find no threads missing.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Arguments, the step of the shifts, and about how many bytes a shard has.
#:
#: "aligned": one row of 3 x 5 shifts is a unit, 48 feature maps lie in chunks of 16. "unaligned":
#: three rows of 5 x 7, then two; 23 feature maps lie in chunks of 12.
GEOMETRIES = {
    "aligned": ({"layers": [0, 2], "variables": ["activation", "logits"], "batch_size": 4}, 11, 1),
    "unaligned": ({"layers": [0, 2], "feature_maps": 23, "batch_size": 4}, 7, 70_000),
}
#: Generous: the machine may be busy.
PATIENCE = 120


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, by path."""
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def records(store: Path) -> list[int]:
    """Units that are recorded."""
    found = Path(store).glob("_vitxr/record/c.*.0.0")
    return sorted(int(p.name.split(".")[1]) for p in found)


def until(condition: Callable[[], Any]) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.02)


def guarded(run: Callable, *args: Any, **options: Any) -> Any:
    """Run something in a thread, so that a deadlock fails a test and does not stop them all."""
    out: list[Any] = []

    def body() -> None:
        try:
            out.append(run(*args, **options))
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"no end within {PATIENCE} s"
    if isinstance(out[0], BaseException):
        raise out[0]
    return out[0]


def arguments(geometry: str) -> dict:
    """Arguments of an extraction of three images."""
    import vitxr

    options, step, _ = GEOMETRIES[geometry]
    shifts = vitxr.ShiftGrid(step)
    return {"shifts": shifts, "preprocess": "raw", "progress": False, **options}


class Forks:
    """The process, seen from the tests."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def run(self, store: Path, geometry: str = "aligned", **how) -> dict:
        """Run an extraction into a store.

        ``after``: kill it after so many seconds. ``at``: let it send itself ``signal``
        (9 if not given; 19 stops it) right before one of its file operations under the
        store: the number of that operation, or a part of its path, with ``nth`` (0) of those.
        ``half``: kill it when it has written half of the file that has this in its path.

        Returns ``how`` it ended ("done", "killed", "stopped"), ``pid``, ``seconds``, and
        of one that is done ``frames`` that were run, ``operations`` and ``error``.
        """
        return self._ask({"store": str(store), "geometry": geometry, **how})

    def kill(self, pid: int) -> None:
        """End one that has stopped itself, with the signal that none can catch."""
        self._ask({"kill": pid})

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has died"
        answer = json.loads(line)
        assert answer.get("how") != "hung", f"no end within {PATIENCE} s: {request}"
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()


def _serve() -> None:
    import numpy as np
    import zarr  # noqa: F401
    from conftest import make_vit

    import vitxr
    from vitxr.extract import cost, lazy, pipeline, run  # noqa: F401

    warnings.simplefilter("error")
    model = vitxr.load_model(make_vit())
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    stim = vitxr.open_images({"noise": images[:2], "other": images[2:]})
    for line in sys.stdin:
        request = json.loads(line)
        if "kill" in request:
            os.kill(request["kill"], signal.SIGKILL)
            os.waitpid(request["kill"], 0)
            answer = {}
        else:
            answer = _fork(request, stim, model)
        print(json.dumps(answer), flush=True)


def _fork(request: dict, stim, model) -> dict:
    theirs, ours = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            answer = _extract(request, stim, model)
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(ours, json.dumps(answer).encode())
        os._exit(0)
    os.close(ours)
    status = 0
    try:
        if "after" in request:
            # Returns early if it ends by itself before.
            select.select([theirs], [], [], request["after"])
            os.kill(pid, signal.SIGKILL)
        while time.monotonic() < start + PATIENCE:
            found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
            if found:
                break
            time.sleep(0.002)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"how": "hung"}
        seconds = time.monotonic() - start
        if os.WIFSTOPPED(status):
            return {"how": "stopped", "pid": pid, "seconds": seconds}
        sent = os.read(theirs, 2**16)
        if not sent:
            return {"how": "killed", "pid": pid, "seconds": seconds}
        return {"how": "done", "pid": pid, "seconds": seconds, **json.loads(sent)}
    finally:
        os.close(theirs)


def _extract(request: dict, stim, model) -> dict:
    import vitxr
    from vitxr.extract import plan, units

    plan._SHARD_BYTES = GEOMETRIES[request["geometry"]][2]
    frames, true = [], units.capture

    def capture(model, batch, *rest):
        frames.append(len(batch))
        return true(model, batch, *rest)

    operations: list[str] = []
    at, left = request.get("at"), request.get("nth", 0)

    def watch(event: str, values: tuple) -> None:
        nonlocal left
        # Opening for reading changes nothing; renaming tells where from and where to.
        if event == "open":
            path = values[0] if values[1] and set(values[1]) & set("wax+") else None
        else:
            path = values[0] if event in CHANGES else None
        if not isinstance(path, str | Path) or not str(path).startswith(request["store"]):
            return
        here = f"{event} {str(path)[len(request['store']) :]}"
        if at == len(operations) or (isinstance(at, str) and at in here):
            if left == 0:
                os.kill(os.getpid(), request.get("signal", signal.SIGKILL))
                time.sleep(PATIENCE)  # it may take effect a moment later
            left -= 1
        operations.append(here)

    half, write = request.get("half"), Path.write_bytes

    def write_bytes(path: Path, data: Any) -> int:
        if half is not None and half in str(path):
            write(path, bytes(data)[: len(bytes(data)) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(PATIENCE)
        return write(path, data)

    units.capture = capture
    Path.write_bytes = write_bytes
    sys.addaudithook(watch)
    vitxr.extract(stim, model, store=request["store"], **arguments(request["geometry"]))
    # The ranking's frame is no unit's.
    ranking = "feature_maps" in arguments(request["geometry"])
    return {"frames": sum(frames) - ranking, "operations": operations}


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

if __name__ == "__main__":
    _serve()
