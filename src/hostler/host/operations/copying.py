"""A copy of a running VM's disk that QEMU keeps up to date, until it may take the disk's place."""

from __future__ import annotations

import asyncio
import time

import structlog

from hostler.host.actor import VmActor
from hostler.host.blocks import Blocks
from hostler.host.convergence import Convergence, Verdict
from hostler.host.operations.disks import require_disk
from hostler.host.progress import CopyProgress
from hostler.host.steps import JobContext
from hostler.model.blockjob import BlockJob
from hostler.model.disk import Disk, DiskSource, IoLimits
from hostler.model.errors import HostlerError

log = structlog.get_logger()


class Copying:
    """The copying of one disk."""

    def __init__(self, actor: VmActor, disk_id: str) -> None:
        self._actor = actor
        self.disk_id = disk_id

    @property
    def disk(self) -> Disk:
        """The disk as it is on record."""
        return require_disk(self._actor.record, self.disk_id)

    @property
    def blocks(self) -> Blocks:
        """QEMU's block work. QemuFailed when QEMU is gone."""
        return self._actor.present().blocks

    async def keep_up(self, context: JobContext, job: str) -> None:
        """Until the copy is ready, or near enough that the guest may be stopped for the rest of it. A guest that writes
        faster than is copied is slowed down."""
        show, near = CopyProgress(context), Convergence()
        verdicts: asyncio.Queue[Verdict] = asyncio.Queue()

        def look(now: BlockJob) -> None:
            show.block_job(now)
            verdict = near.look(time.monotonic(), now.done, now.total)
            if verdict is not Verdict.GO_ON:
                verdicts.put_nowait(verdict)

        watching = asyncio.ensure_future(self.blocks.watch(job, look, until_ready=True))
        watching.add_done_callback(lambda _: verdicts.put_nowait(Verdict.SWITCH))
        try:
            while await verdicts.get() is Verdict.BRAKE:
                await self._brake(context, near.allowed)
            if watching.done():
                watching.result()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _brake(self, context: JobContext, allowed: int) -> None:
        log.info("disk.braked", vm=self._actor.record.id, disk=self.disk_id, allowed=allowed)
        await context.remember(braked=True)
        await self.blocks.limit(self.disk_id, braked(self.disk.limits, allowed))

    async def release_brake(self, context: JobContext) -> None:
        """The guest may write as before."""
        if context.job.data.get("braked"):
            await self.blocks.limit(self.disk_id, self.disk.limits)

    async def ready_to_stop(self, job: str) -> bool:
        """The rest is copied at full speed. Whether what the guest changes is noted for backups."""
        await self.blocks.speed(job, 0)
        return bool(await self.blocks.bitmaps(self.disk))

    async def keep_bitmaps(self, disk: Disk, target: DiskSource) -> None:
        """What cannot be kept makes the next backup a full one, and no move fail."""
        try:
            await self.blocks.keep_bitmaps(disk, target)
        except HostlerError as error:
            log.warning("disk.bitmaps-lost", vm=self._actor.record.id, disk=self.disk_id, why=str(error))


def braked(limits: IoLimits, allowed: int) -> IoLimits:
    """Those limits, with at most `allowed` bytes/s of writing as well."""
    whole = limits.bandwidth
    write = min(allowed, whole or limits.bandwidth_write or allowed)
    read = whole or limits.bandwidth_read
    return limits.but(bandwidth=0, bandwidth_burst=0, bandwidth_read=read, bandwidth_write=write)
