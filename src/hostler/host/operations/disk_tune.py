"""Make a disk larger, and limit what it may do: while the VM runs, or is off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.disk_edit import change_disk
from hostler.host.operations.disks import CHANGEABLE, require_disk
from hostler.host.operations.launching import claim
from hostler.host.steps import JobContext, Step
from hostler.model.disk import IoLimits, SourceKind
from hostler.model.job import Job
from hostler.storage.resizing import resize


def grow_steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    """There is no way back from a larger image: the guest may use it already. So it is recorded, however long that
    takes; a size that was not recorded would be refused by nobody and seen by nobody."""
    disk_id, size = str(params["disk_id"]), int(cast(int, params["size"]))
    changes = host.volumes.work.tools.changes
    grown = False

    async def grow(context: JobContext) -> None:
        nonlocal grown
        disk = require_disk(actor.record, disk_id)
        context.no_return()
        old = disk.source
        if not grown:
            if actor.machine is not None:
                await actor.machine.blocks.resize(disk, size)
            else:
                await claim(host, actor, (disk,))
                await resize(changes.image, old.path, old.format, old.size, size)
            grown = True
        await change_disk(actor, disk_id, source=old.model_copy(update={"size": size}))
        if old.kind is SourceKind.VOLUME:
            await changes.grown(old.path, size)
        await let_go(context)

    async def let_go(_context: JobContext) -> None:
        """A VM that is off holds nothing."""
        if actor.machine is None:
            await host.claims.release(actor.record.id)

    return (Step("grow", grow, let_go, insist=lambda: grown),)


def limit_steps(_host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    disk_id = str(params["disk_id"])
    wanted = IoLimits.model_validate(params["limits"])

    async def apply(_context: JobContext) -> None:
        await _apply(actor, disk_id, wanted)

    async def undo(_context: JobContext) -> None:
        await _apply(actor, disk_id, require_disk(actor.record, disk_id).limits)

    async def record(context: JobContext) -> None:
        context.no_return()
        await change_disk(actor, disk_id, limits=wanted)

    return (Step("apply", apply, undo), Step("record", record))


async def _apply(actor: VmActor, disk_id: str, limits: IoLimits) -> None:
    """An empty drive is given its limits with its next medium."""
    disk = require_disk(actor.record, disk_id)
    if actor.machine is not None and disk.source.kind is not SourceKind.EMPTY:
        await actor.machine.blocks.limit(disk_id, limits)


async def _grow_again(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    return "grow"


async def _limit_again(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    return "apply"


GROW = Operation("disk.grow", "make a disk larger", CHANGEABLE, grow_steps, _grow_again)
LIMIT = Operation("disk.limit", "limit a disk", CHANGEABLE, limit_steps, _limit_again)
