"""What this machine has: logical processors, NUMA nodes, memory, processor name and features, kernel, identity.

Everything is read below a root directory, so that a saved copy of /proc and /sys stands for another machine.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from hostler.hardware.memory import total_memory
from hostler.model.base import Record
from hostler.model.host import NumaNode


class MachineFacts(Record):
    """See `hostler.model.host.HostFacts`, of which these are the machine's part."""

    logical_processors: int
    cpu_name: str
    cpu_flags: tuple[str, ...]
    memory: int
    numa: tuple[NumaNode, ...]
    machine_id: str
    boot_id: str
    kernel: str


def read_facts(root: Path = Path("/")) -> MachineFacts:
    """The facts of the machine whose /proc and /sys are below `root`."""
    online = parse_cpu_list(_text(root / "sys/devices/system/cpu/online"))
    cpuinfo = _text(root / "proc/cpuinfo")
    return MachineFacts(
        logical_processors=len(online) or cpuinfo.count("processor\t") or 1,
        cpu_name=_first(cpuinfo, "model name") or "unknown",
        cpu_flags=tuple(sorted(set(_first(cpuinfo, "flags").split()))),
        memory=total_memory(root),
        numa=_numa(root),
        machine_id=_text(root / "etc/machine-id"),
        boot_id=_text(root / "proc/sys/kernel/random/boot_id"),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format "0-3,8" (cpuset(7), "List format") as numbers; () for an empty text."""
    numbers: list[int] = []
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def _numa(root: Path) -> tuple[NumaNode, ...]:
    nodes = []
    for directory in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        match = re.search(r"MemTotal:\s+(\d+) kB", _text(directory / "meminfo"))
        memory = int(match.group(1)) * 1024 if match else 0
        cpus = parse_cpu_list(_text(directory / "cpulist"))
        nodes.append(NumaNode(id=int(directory.name.removeprefix("node")), cpus=cpus, memory=memory))
    return tuple(sorted(nodes, key=lambda n: n.id))


def _first(cpuinfo: str, key: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""
