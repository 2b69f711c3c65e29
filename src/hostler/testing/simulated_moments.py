"""The moments of a simulated QEMU's disks: it keeps their content, and really copies it;
see hostler.host.backups.moments.

What its images contain is what the files on the disk contain. Everything is copied, whatever a bitmap says: the
simulated bitmaps know names only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hostler.model.backup import BLOCK
from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.disk import Disk
from hostler.model.errors import QemuFailed
from hostler.testing.faults import Faults
from hostler.testing.nbd_client import writing
from hostler.testing.simulated_world import SimulatedQemu

OnBlockJob = Callable[[BlockJob], None]


class SimulatedMoments:
    """The moments of one simulated QEMU. Its methods fail on request under their own names (`faults`)."""

    def __init__(self, qemu: SimulatedQemu, faults: Faults) -> None:
        self._qemu = qemu
        self._faults = faults

    async def begin(self, disks: Sequence[Disk], scratch: Mapping[str, str]) -> None:
        """Keep the content."""
        await self._enter("begin_moment")
        for disk in disks:
            if not Path(scratch[disk.id]).exists():
                raise QemuFailed(self._qemu.name, f"Could not open '{scratch[disk.id]}': No such file or directory")
            self._qemu.moments.setdefault(disk.id, Path(disk.source.path).read_bytes())

    async def copy(
        self,
        disks: Sequence[Disk],
        since: Mapping[str, str],
        path: str,
        speed: int,
        on_progress: OnBlockJob | None = None,
    ) -> None:
        """Write it to the server."""
        await self._enter("copy_moment")
        for disk in disks:
            content = self._qemu.moments.get(disk.id)
            if content is None:
                raise QemuFailed(self._qemu.name, f"nothing is kept of disk {disk.id}")
            await self._write(path, disk, content)
            if on_progress is not None:
                size = len(content)
                on_progress(
                    BlockJob(id=disk.id, kind="backup", state=BlockJobState.DONE, done=size, total=size),
                )

    async def _write(self, path: str, disk: Disk, content: bytes) -> None:
        try:
            async with writing(path, disk.id) as client:
                for at in range(0, len(content), BLOCK):
                    await self._enter("copy_moment_block")
                    if code := await client.write(at, content[at : at + BLOCK]):
                        raise QemuFailed(self._qemu.name, f"the copy of disk {disk.id} failed: error {code}")
        except (OSError, EOFError, LookupError) as error:
            raise QemuFailed(self._qemu.name, f"the copy of disk {disk.id} failed: {error!r}") from error

    async def end(self, disks: Sequence[Disk]) -> None:
        """Keep nothing."""
        await self._enter("end_moment")
        for disk in disks:
            self._qemu.moments.pop(disk.id, None)

    async def _enter(self, method: str) -> None:
        await self._faults.enter(method)
        if not self._qemu.alive:
            raise QemuFailed(self._qemu.name, f"QEMU is gone, {method} was not answered", gone=True)
