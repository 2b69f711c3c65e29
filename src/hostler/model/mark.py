"""The mark of a VM's processes: a supplementary group that says in whose run directory they work. Pure.

A VM's processes have a user of their own, but a guest that broke out of QEMU owns everything else by which they could
be known: command line, pid file, sockets. The kernel alone keeps the groups: without rights (and the processes of VMs
have none) they can be neither left nor entered, and every child has them. The mark is of the run directory and not of
the VM, since two daemons on one machine (a laboratory of several hosts) have the same VM, with the same user, on both
sides of a move. No file belongs to these groups, so that they open nothing.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Final


class Part(IntEnum):
    """What a process does for its VM; the value is the first group of its range, which lie above the VMs' users."""

    MACHINE = 1_901_000_000
    """QEMU itself, and its TPM."""
    EXPORT = 1_902_000_000
    """A storage daemon, which may outlive a QEMU."""


SPAN: Final = 1_000_000


def mark(run_dir: str, part: Part) -> int:
    """The group of the processes that do this for the VM of a run directory."""
    digest = hashlib.sha256(run_dir.encode("utf-8", "surrogateescape")).digest()
    return part + int.from_bytes(digest[:8], "big") % SPAN


def is_mark(group: int) -> bool:
    """Whether a group is the mark of any VM's process."""
    return Part.MACHINE <= group < Part.EXPORT + SPAN
