"""Attach and detach disks, while the VM runs or is off.

Attach: claim the volume, give QEMU access, plug it in, record it. Detach: ask the guest to let go, record it, give
access and claim back. The record changes last on attach and right after the unplug on detach; a daemon that dies in
between unwinds the attach (QEMU forgets the disk) and, for a detach, believes QEMU's own list.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import claim, unclaim
from hostler.host.steps import JobContext, Step
from hostler.host.volumes.overlays import Overlay
from hostler.model.disk import BUS_NAMES, Bus, Disk
from hostler.model.errors import Busy, HostlerError, NotFound, WrongState
from hostler.model.job import Job
from hostler.model.vm import VmConfig, VmRecord, VmState

log = structlog.get_logger()

CHANGEABLE = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.OFF})


def with_disk(config: VmConfig, disk: Disk) -> VmConfig:
    """The configuration with that disk (replacing one of the same id)."""
    others = tuple(d for d in config.disks if d.id != disk.id)
    return config.but(disks=(*others, disk))


def without_disk(config: VmConfig, disk_id: str) -> VmConfig:
    """The configuration without that disk."""
    return config.but(disks=tuple(d for d in config.disks if d.id != disk_id))


def attach_steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    disk = Disk.model_validate(params["disk"])

    async def plug(_context: JobContext) -> None:
        if actor.machine is not None:
            await actor.machine.attach_disk(disk, host.resources.export_of(actor.record.config, disk))

    async def unplug(_context: JobContext) -> None:
        if actor.machine is not None and actor.record.config.disk(disk.id) is None:
            await actor.machine.detach_disk(disk.id, 5.0)

    async def record(context: JobContext) -> None:
        context.no_return()

        def edit(now: VmRecord) -> VmRecord:
            waiting = with_disk(now.next_config, disk) if now.next_config else None
            return now.but(config=with_disk(now.config, disk), next_config=waiting)

        await actor.change(edit)

    making = _make(host, actor, disk, params)
    return (*making, _take(host, actor, disk), Step("plug", plug, unplug), Step("record", record))


def _make(host: Host, actor: VmActor, disk: Disk, params: Params) -> Sequence[Step]:
    """Make the overlay that the disk is, if it is to be one. Undone, it goes, unless QEMU may still have it."""
    if "overlay" not in params:
        return ()
    overlay = Overlay(host, disk, str(params["overlay"]))

    async def undo(context: JobContext) -> None:
        if actor.record.config.disk(disk.id) is None and not await _may_have(actor, disk):
            await overlay.remove(context.job.id)

    return (Step("overlay", overlay.make, undo),)


def _take(host: Host, actor: VmActor, disk: Disk) -> Step:
    """Claim the volume and let QEMU reach it. Undone, both are given back, unless QEMU may still have the disk: then
    they go when the VM stops."""

    async def do(_context: JobContext) -> None:
        if actor.machine is not None:  # the image was looked at just now, when the request was resolved
            await claim(host, actor, (disk,))
            await host.resources.grant(actor.record.config, disk)

    async def undo(_context: JobContext) -> None:
        if actor.record.config.disk(disk.id) is not None:
            return
        if await _may_have(actor, disk):
            log.warning("vm.disk-kept", vm=actor.record.id, disk=disk.id, path=disk.source.path)
            return
        await host.resources.revoke(actor.record.config, disk)
        await unclaim(host, actor, (disk,))

    return Step("take", do, undo)


async def _may_have(actor: VmActor, disk: Disk) -> bool:
    """Whether QEMU has the disk, or may have it yet: one that does not answer may finish an attach later. One that does
    has finished it, and is made to close an image that no device uses, which is not among the attached disks."""
    if actor.machine is None:
        return False
    try:
        if disk.id in await actor.machine.attached_disks():
            return True
        await actor.machine.detach_disk(disk.id, 5.0)
    except HostlerError as error:
        log.info("vm.disk-unknown", vm=actor.record.id, disk=disk.id, why=str(error))
        return actor.machine is not None
    return False


def detach_steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    disk_id = str(params["disk_id"])
    timeout = float(str(params.get("timeout", 30)))

    async def unplug(_context: JobContext) -> None:
        disk = actor.record.config.disk(disk_id)
        if disk is None or actor.machine is None:
            return
        if disk.bus is not Bus.SCSI:
            raise WrongState(
                f"disk {disk_id} of {actor.subject}",
                f"is on the {BUS_NAMES[disk.bus]}, which takes no changes while the VM runs",
                "shut the VM down first; use SCSI for disks that shall come and go",
            )
        await actor.machine.detach_disk(disk_id, timeout)

    async def plug_again(_context: JobContext) -> None:
        """Only a record that could not be written leads here. A failed unplug has left it plugged in."""
        disk = actor.record.config.disk(disk_id)
        if disk is None or actor.machine is None or disk_id in await actor.machine.attached_disks():
            return
        await host.resources.grant(actor.record.config, disk)
        await actor.machine.attach_disk(disk, host.resources.export_of(actor.record.config, disk))

    async def record(context: JobContext) -> None:
        context.no_return()
        disk = actor.record.config.disk(disk_id)
        if disk is None:
            return
        await host.resources.revoke(actor.record.config, disk)

        def edit(now: VmRecord) -> VmRecord:
            waiting = without_disk(now.next_config, disk_id) if now.next_config else None
            return now.but(config=without_disk(now.config, disk_id), next_config=waiting)

        await unclaim(host, actor, (disk,), edit)

    return (Step("unplug", unplug, plug_again), Step("record", record))


def require_disk(record: VmRecord, disk_id: str) -> Disk:
    """That disk of the VM. NotFound naming the ones there are."""
    disk = record.config.disk(disk_id)
    if disk is None:
        have = ", ".join(d.id for d in record.config.disks) or "none"
        raise NotFound(f"disk {disk_id} of vm {record.name}", f"there is no such disk; it has: {have}")
    return disk


def require_free_place(record: VmRecord, disk: Disk) -> None:
    """Busy when another disk has taken the id or the address that was planned for this one."""
    everything = [*record.config.disks, *(record.next_config.disks if record.next_config else ())]
    if any(d.id == disk.id or d.address == disk.address for d in everything):
        raise Busy(f"vm {record.name}", "was given another disk at the same moment", "try again")


async def _resume_detach(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    return "unplug"


async def _resume_attach(_host: Host, actor: VmActor, job: Job) -> str | None:
    """Once it is recorded it is attached; before that, QEMU forgets it."""
    disk = Disk.model_validate(job.params["disk"])
    return "record" if actor.record.config.disk(disk.id) is not None else None


ATTACH = Operation("disk.attach", "attach a disk", CHANGEABLE, attach_steps, _resume_attach)
DETACH = Operation("disk.detach", "detach a disk", CHANGEABLE, detach_steps, _resume_detach)
