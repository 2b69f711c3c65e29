"""What backups need of a machine: its disks as they were at one moment, copied while the guest goes on.
`hostler.qemu.fleecing` is the real one, `hostler.testing.simulated_moments` a simulated one.

Errors and deadlines as for `hostler.host.hypervisor.Machine`: every method may be called again after its outcome was
unknown, and by another daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hostler.model.blockjob import BlockJob
from hostler.model.disk import Disk

OnBlockJob = Callable[[BlockJob], None]


class Moments(Protocol):
    """The moments of one machine's disks."""

    async def begin(self, disks: Sequence[Disk], scratch: Mapping[str, str]) -> None:
        """The one moment of all of them: what these disks are is kept from now on, in the scratch files (empty qcow2
        images of the same size, by disk id). The guest stands still for some milliseconds; a daemon that dies meanwhile
        leaves it paused. Harmless when it was begun."""

    async def copy(
        self,
        disks: Sequence[Disk],
        since: Mapping[str, str],
        path: str,
        speed: int,
        on_progress: OnBlockJob | None = None,
    ) -> None:
        """Copy each, as it was, to the NBD export of its id on that unix socket, from front to back; returns when all
        of it is there. `since`: by disk id, the bitmap that tells what is wanted of it (everything without one).
        `speed`: bytes/s for each disk, 0: unlimited. May be begun again. QemuFailed when that failed."""

    async def end(self, disks: Sequence[Disk]) -> None:
        """Keep and copy nothing any more. Harmless when nothing was."""
