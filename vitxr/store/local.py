"""Files of a local store: each written whole or not at all, large ones past the page cache."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PART", "aligned", "clear", "replace"]

Bytes = npt.NDArray[np.uint8]

#: Ending of a local file that is being written.
PART = ".part"

#: A local file of as many bytes is written past the page cache: a copy into memory that was not
#: in use takes longer than the writing itself, and what is cached of other files stays so.
_DIRECT = 1 << 20
#: Of memory, places and sizes of what goes past it.
_PAGE = 4096


def replace(target: Path, data: Any) -> None:
    """Write a file under another name, of this writer alone, and give it its own."""
    draft = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}{PART}")
    try:
        try:
            _write(draft, data)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(draft, data)
        try:
            draft.replace(target)
        except OSError:
            if not target.is_dir():
                raise
            target.rmdir()  # a folder that holds something is not ours to delete
            draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def clear(path: Path) -> None:
    """Delete a file, or a folder that somebody has put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def aligned(size: int) -> Bytes:
    """Make an array of bytes that begins where direct writing wants it to."""
    room = np.empty(size + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + size]


def _write(path: Path, data: Any) -> None:
    """Write a new file; a large array from :func:`aligned` directly, where the system can."""
    if not (
        hasattr(os, "O_DIRECT")
        and isinstance(data, np.ndarray)
        and data.nbytes >= _DIRECT
        and data.ctypes.data % _PAGE == 0
    ):
        path.write_bytes(data)
        return
    try:
        _write_directly(path, data)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.write_bytes(data.data)  # a file system that has no such writing


def _write_directly(path: Path, data: Bytes) -> None:
    import fcntl

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
    try:
        at, pages = 0, len(data) - len(data) % _PAGE
        while at < pages and at % _PAGE == 0:
            at += os.pwrite(file, data[at:pages].data, at)
        # What is left does not begin at a page, or is not a whole one.
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
        while at < len(data):
            at += os.pwrite(file, data[at:].data, at)
    finally:
        os.close(file)
