"""Memory of this host, from /proc/meminfo (proc(5)); bytes."""

from __future__ import annotations

from pathlib import Path


def _field(name: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    return 0


def total_memory(root: Path = Path("/")) -> int:
    """What the kernel manages. `root`: a directory that has a copy of /proc and /sys, to look at another machine."""
    return _field("MemTotal", root)


def free_memory(root: Path = Path("/")) -> int:
    """What programs can still get without swapping (MemAvailable)."""
    return _field("MemAvailable", root)
