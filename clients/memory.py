"""How much memory this process holds, and how much it may."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def limit(root: Path = ROOT) -> int:
    """Bytes of RAM that this process may use: the machine's, or less where a control group (v1 or v2) says so."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_groups(root)])


def resident(root: Path = ROOT) -> int:
    """Bytes of RAM that this process holds; where the system does not tell, the most that it ever held."""
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _groups(root: Path) -> list[int]:
    """What the process's group and those above it allow; in a container its group may be the root of what it sees."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            below = top / group.strip("/")
            for folder in (below, *below.parents):
                if folder.is_relative_to(top):
                    found += [folder / "memory.max", folder / "memory.limit_in_bytes"]
    texts = [path.read_text().strip() for path in found if path.exists()]
    return [int(text) for text in texts if text.isdigit() and int(text)]


def hold() -> None:
    """Keep what is freed for what comes next, where the C library can: training allocates the same again and again.

    For a process that trains all the time: without it every large tensor is fetched from the system, page by page.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(setting, 2**30)
