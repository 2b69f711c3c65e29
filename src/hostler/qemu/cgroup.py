"""A control group (cgroup v2) for each VM: it takes QEMU out of the daemon's own group, so that stopping the daemon's
service never stops a VM, and it is where a VM's use of processor and memory is accounted.

Best effort by design: a host without a writable cgroup v2 hierarchy runs VMs all the same.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

_ROOTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""The unified hierarchy, and where it is mounted beside the old one (hybrid)."""


def root() -> str | None:
    """Where VMs' groups can be made; None when this host or our rights do not allow it."""
    found = (path for path in _ROOTS if os.path.exists(f"{path}/cgroup.controllers") and os.access(path, os.W_OK))
    return next(found, None)


def join(vm_id: str, pid: int) -> str | None:
    """Put a process, with all its threads, into its VM's group; its path, or None where that was not possible."""
    top = root()
    if top is None:
        return None
    path = f"{top}/hostler/{vm_id}"
    try:
        os.makedirs(path, exist_ok=True)
        with open(f"{path}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(pid))
    except OSError:
        return None
    return path


def remove(vm_id: str) -> None:
    """Remove the VM's group once its processes are gone. Harmless when it is not there or not empty."""
    top = root()
    if top is not None:
        with suppress(OSError):
            os.rmdir(f"{top}/hostler/{vm_id}")
