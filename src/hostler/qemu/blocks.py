"""The disks of one running QEMU: implements hostler.host.blocks.Blocks, whose docstrings hold here.

The work is in the modules beside this one: `layers`, `blockjobs`, `bitmaps`, `drives`. What changes the block graph
goes one after the other: what looks unused to one may be what another is about to use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from hostler.model.blockjob import BlockJob
from hostler.model.disk import Disk, DiskSource, IoLimits
from hostler.model.pool import Connection
from hostler.qemu import bitmaps, blockjobs, commands, drives, layers, network_disks
from hostler.qemu.blockdev import Aio
from hostler.qemu.fleecing import Fleecing
from hostler.qemu.guest_agent import GuestAgent
from hostler.qemu.jobfollow import BlockJobs
from hostler.qemu.qmp import QmpSession

OnBlockJob = Callable[[BlockJob], None]


class QemuBlocks:
    """`aio`: how new images are read."""

    def __init__(self, qmp: QmpSession, aio: Aio, agent: GuestAgent) -> None:
        self._qmp = qmp
        self._aio: Aio = aio
        self._agent = agent
        self._lock = asyncio.Lock()
        self._jobs = BlockJobs(qmp)
        self.moments = Fleecing(qmp)

    async def layers(self) -> dict[str, tuple[str, ...]]:
        """Nodes of each disk."""
        return await layers.chains(self._qmp)

    async def connect(self, connection: Connection) -> None:
        """Secrets as objects; those of the same pool are replaced (images that are open keep what they have)."""
        async with self._lock:
            for secret in network_disks.objects(connection):
                await commands.object_del(self._qmp, str(secret["id"]))
                await commands.object_add(self._qmp, secret)
            self._qmp.connections[connection.pool] = connection

    async def push(self, disks: Sequence[Disk], bitmaps: Mapping[str, Sequence[str]] = {}) -> None:
        """New top layers."""
        async with self._lock:
            await layers.push(self._qmp, self._aio, disks, bitmaps)

    async def reopen(self, disk: Disk, layer: DiskSource, writes: bool) -> None:
        """Change a layer's rights."""
        async with self._lock:
            await layers.reopen(self._qmp, self._aio, disk, layer, writes)

    async def flush(self, disk: Disk) -> None:
        """Write what is kept in memory."""
        async with self._lock:
            await layers.flush(self._qmp, self._aio, disk)

    async def mirror(self, job: str, disk: Disk, target: DiskSource, export: str | None = None, speed: int = 0) -> None:
        """Begin to copy."""
        async with self._lock:
            if await self._jobs.find(job) is None:
                await blockjobs.mirror(self._qmp, self._aio, job, disk, target, export, speed)

    async def commit(self, job: str, disk: Disk, top: DiskSource, base: DiskSource, speed: int = 0) -> None:
        """Begin to merge downwards."""
        async with self._lock:
            if await self._jobs.find(job) is None:
                await blockjobs.commit(self._qmp, self._aio, job, disk, top, base, speed)

    async def stream(self, job: str, disk: Disk, base: DiskSource | None = None, speed: int = 0) -> None:
        """Begin to merge upwards."""
        async with self._lock:
            if await self._jobs.find(job) is None:
                await blockjobs.stream(self._qmp, self._aio, job, disk, base, speed)

    async def job(self, job: str) -> BlockJob | None:
        """A job."""
        return await self._jobs.find(job)

    async def watch(self, job: str, on_progress: OnBlockJob | None = None, until_ready: bool = False) -> BlockJob:
        """Follow it."""
        return await self._jobs.watch(job, on_progress, until_ready)

    async def speed(self, job: str, speed: int) -> None:
        """Limit it."""
        await self._jobs.speed(job, speed)

    async def finish(self, job: str) -> None:
        """Let it switch."""
        await self._jobs.finish(job)

    async def cancel(self, job: str) -> None:
        """End it without."""
        await self._jobs.cancel(job)

    async def forget(self, job: str) -> None:
        """Drop it."""
        async with self._lock:
            await self._jobs.forget(job)
            await layers.close_unused(self._qmp)

    async def close(self, disk_id: str, layer: str) -> None:
        """Close a layer."""
        async with self._lock:
            await layers.close(self._qmp, disk_id, layer)

    async def resize(self, disk: Disk, size: int) -> None:
        """Grow."""
        await drives.resize(self._qmp, disk, size)

    async def limit(self, disk_id: str, limits: IoLimits) -> None:
        """Throttle."""
        await drives.limit(self._qmp, disk_id, limits)

    async def change_medium(self, disk: Disk, export: str | None = None, force: bool = False) -> None:
        """Another medium."""
        async with self._lock:
            await drives.change_medium(self._qmp, self._aio, disk, export, force)

    async def bitmaps(self, disk: Disk) -> dict[str, int]:
        """What is known of changes."""
        return await bitmaps.listed(self._qmp, disk)

    async def add_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Begin to note changes."""
        async with self._lock:
            await bitmaps.add(self._qmp, self._aio, disks, name)

    async def drop_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Stop that."""
        async with self._lock:
            await bitmaps.drop(self._qmp, self._aio, disks, name)

    async def keep_bitmaps(self, disk: Disk, target: DiskSource) -> None:
        """Give them to a copy."""
        async with self._lock:
            await bitmaps.keep(self._qmp, disk, target)

    async def freeze(self, deadline: float) -> int:
        """Freeze the guest's file systems."""
        return await self._agent.freeze(deadline)

    async def thaw(self) -> None:
        """Thaw them."""
        await self._agent.thaw()
