"""Change the medium of a CD or floppy drive, or take it out: while the VM runs, or is off.

take: claim the new medium, let QEMU reach it --> change: the guest sees it --> record, give the old one back
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.disk_edit import change_disk, claim_exactly, source_of
from hostler.host.operations.disks import CHANGEABLE, require_disk
from hostler.host.operations.launching import claim
from hostler.host.steps import JobContext, Step
from hostler.model.disk import Disk, SourceKind
from hostler.model.errors import HostlerError
from hostler.model.job import Job
from hostler.qemu.blockdev import layer_node

log = structlog.get_logger()


class Change:
    """One change. `params`: `disk_id`; `source` and `medium` (DiskSource), what is in it before and after; `force`."""

    def __init__(self, host: Host, actor: VmActor, params: Params) -> None:
        self._host = host
        self._actor = actor
        self.disk_id = str(params["disk_id"])
        self._old = source_of(params["source"])
        self._new = source_of(params["medium"])
        self._force = bool(params["force"])

    @property
    def drive(self) -> Disk:
        """The drive as it is on record."""
        return require_disk(self._actor.record, self.disk_id)

    @property
    def old(self) -> Disk:
        """The drive with the old medium."""
        return self.drive.model_copy(update={"source": self._old})

    @property
    def new(self) -> Disk:
        """The drive with the new medium."""
        return self.drive.model_copy(update={"source": self._new})

    @property
    def recorded(self) -> bool:
        """Whether the record has the new one."""
        return self.drive.source == self._new

    async def take(self, _context: JobContext) -> None:
        """Claim the new medium and let QEMU reach it."""
        if self._actor.machine is not None:
            await claim(self._host, self._actor, (self.new,))
            await self._host.resources.grant(self._actor.record.config, self.new)

    async def give_back(self, _context: JobContext) -> None:
        """The new medium is not used, unless QEMU may still have it: then it goes when the VM stops."""
        if self.recorded:
            return
        if await self._may_have():
            log.warning("vm.medium-kept", vm=self._actor.record.id, disk=self.disk_id, path=self._new.path)
            return
        await self._drop(self.new)

    async def _may_have(self) -> bool:
        machine = self._actor.machine
        if machine is None or self._new.kind is SourceKind.EMPTY:
            return False
        try:
            return layer_node(self.new, self._new) in (await machine.blocks.layers()).get(self.disk_id, ())
        except HostlerError as error:
            log.info("vm.medium-unknown", vm=self._actor.record.id, disk=self.disk_id, why=str(error))
            return self._actor.machine is not None

    async def _drop(self, medium: Disk) -> None:
        """End the VM's rights to a medium that is not in the drive."""
        if medium.source.path != self.drive.source.path:
            await self._host.resources.revoke(self._actor.record.config, medium)
        if self._actor.machine is not None:
            await claim_exactly(self._host, self._actor, (self.drive,))

    async def change(self, _context: JobContext) -> None:
        """Put the new medium in."""
        await self._insert(self.new)

    async def change_back(self, _context: JobContext) -> None:
        """Put the old medium in."""
        if not self.recorded:
            await self._insert(self.old)

    async def _insert(self, drive: Disk) -> None:
        machine = self._actor.machine
        if machine is None:
            return
        export = self._host.resources.export_of(self._actor.record.config, drive)
        await machine.blocks.change_medium(drive, export, force=self._force)
        if drive.source.kind is not SourceKind.EMPTY and not drive.limits.unlimited:
            await machine.blocks.limit(drive.id, drive.limits)

    async def record(self, context: JobContext) -> None:
        """Record it, and give the old medium back."""
        context.no_return()
        await change_disk(self._actor, self.disk_id, source=self._new)
        await self._drop(self.old)

    def no_way_back(self) -> bool:
        """Once it is recorded."""
        return self.recorded


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    change = Change(host, actor, params)
    return (
        Step("take", change.take, change.give_back),
        Step("change", change.change, change.change_back),
        Step("record", change.record, insist=change.no_way_back),
    )


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """Once it is recorded it is done but for what is given back."""
    return "record" if Change(host, actor, job.params).recorded else None


OPERATION = Operation("disk.media", "change a medium", CHANGEABLE, steps, resume_at)
