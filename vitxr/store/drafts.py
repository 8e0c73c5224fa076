"""Results while they are written: beside their place, whole before they are there."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; what is there becomes ``path`` when all is written.

    It lies in a folder ``.<name>.unfinished-<number>`` beside ``path``, which is locked as long as
    this process lives. If writing fails, nothing is left behind. What killed processes have left
    of earlier writing to ``path`` is deleted first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.unfinished-"
    for left in path.parent.glob(f"{_literal(prefix)}*"):
        _sweep(left)
    folder, lock = _new(path.parent, prefix)
    try:
        yield folder / path.name
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _literal(text: str) -> str:
    """Text in which a pattern's characters stand for themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _new(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Make a folder and lock it, where there are locks."""
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        # Another process may take it for one that was left before it is locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            return folder, _locked(folder)


def _sweep(folder: Path) -> None:
    """Delete a folder, unless a process holds it or nobody can tell."""
    with contextlib.suppress(OSError):  # held, gone, or of another user
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None without locks.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    FileNotFoundError
        If it is gone.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise
    except OSError:  # a file system without locks
        os.close(lock)
        return None
    return lock
