"""How much memory there is."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["available"]


def available() -> int | None:
    """Bytes of memory that are available to this process; None where nobody can tell."""
    found = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(known["MemAvailable"].split()[0]) * 1024)
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found, default=None)
