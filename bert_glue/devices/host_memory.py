"""The memory of the host: how much there is, and how much of it a process can still take. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30


def total_and_available() -> tuple[int | None, int | None]:
    """Bytes within a container's limit; None where the system does not say. Swap is not counted."""
    total, available = _physical()
    limit = _container_limit()
    if limit is not None and total is not None:
        total, available = min(total, limit), min(available or limit, limit)
    return total, available


def _physical() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        return kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):  # a sandbox without /proc
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def _container_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="ascii"))
        except (OSError, ValueError):  # missing, or "max"
            continue
    return None
