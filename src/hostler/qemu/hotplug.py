"""Disks that come and go while the VM runs.

    absent --blockdev-add--> node without device --device_add--> attached
    attached --device_del, DEVICE_DELETED--> node without device --blockdev-del--> absent

Every function starts from any of the three: a daemon may have been killed between two commands.

What QEMU 7.2 does, as measured: a disk on virtio-scsi goes 1 to 50 ms after device_del, whether the guest runs, is
stopped, or has no operating system at all; the guest is told and cannot refuse. The waiting and GuestRefused are for
devices whose guest can (PCI, ACPI) and for a QEMU that cannot finish (a request that hangs on dead storage).
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

from hostler.model.disk import Bus, Disk, SourceKind
from hostler.model.errors import AlreadyExists, Busy, GuestRefused, HostlerError, QemuFailed, TimedOut, WrongState
from hostler.model.machine import MachineEvent
from hostler.qemu import blockdev, commands, drives
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio
from hostler.qemu.failures import image_error
from hostler.qemu.qmp import EVENTS_LOST, QmpSession

UNDO_TIMEOUT = 10.0
"""Seconds an attach that failed may take to remove what it had made."""

_RELEASE_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds between tries to delete a node: the device lets go of it a moment after DEVICE_DELETED."""


async def attach_disk(qmp: QmpSession, disk: Disk, export: str | None = None, aio: Aio = "threads") -> None:
    """Plug `disk` in; complete or nothing. Harmless when it is there already.

    WrongState for an IDE disk; AlreadyExists when another image is plugged in under this id or at this address; InUse,
    NotFound, NotPermitted, NoSpace or BadImage where the image is to blame, with `path`.
    """
    if disk.bus is not Bus.SCSI:
        raise WrongState(
            f"disk {disk.id}", f"{disk.bus} takes no disk while the VM runs", "turn the VM off, or attach it on SCSI"
        )
    if disk.source.kind is SourceKind.EMPTY:
        if blockdev.device_id(disk) not in await commands.peripherals(qmp):
            await _add_device(qmp, disk)
    else:
        await _attach_with_image(qmp, disk, export, aio)
    await _limit(qmp, disk)


async def _limit(qmp: QmpSession, disk: Disk) -> None:
    """A disk that cannot be limited as it should be is none."""
    if disk.limits.unlimited:
        return
    try:
        await drives.limit(qmp, disk.id, disk.limits)
    except BaseException:
        await _remove_quietly(qmp, disk)
        raise


async def _attach_with_image(qmp: QmpSession, disk: Disk, export: str | None, aio: Aio) -> None:
    async with AsyncExitStack() as undo:
        undo.push_async_callback(_drop_node, qmp, disk)
        if not await _both_at_once(qmp, disk, export, aio) and await _make_node(qmp, disk, export, aio):
            await _add_device(qmp, disk)
        undo.pop_all()


async def _both_at_once(qmp: QmpSession, disk: Disk, export: str | None, aio: Aio) -> bool:
    """The usual case, one round trip shorter: both commands are sent, and QEMU does them in order. False when the first
    was refused (then the second was, or was for a node that is there already): the careful way finds out why. An error
    of the second alone is final, as there."""
    node = asyncio.ensure_future(commands.blockdev_add(qmp, blockdev.blockdev_options(disk, export, aio)))
    device = asyncio.ensure_future(_add_device(qmp, disk))
    try:
        made, added = await asyncio.gather(node, device, return_exceptions=True)
    except asyncio.CancelledError:
        await asyncio.wait({node, device})
        raise
    if isinstance(made, QemuFailed) and not made.details.get("gone"):
        return False
    for outcome in (made, added):
        if isinstance(outcome, BaseException):
            raise outcome
    return True


async def _make_node(qmp: QmpSession, disk: Disk, export: str | None, aio: Aio) -> bool:
    """Make the node; False when the whole disk is there already. Tried without looking first: a look would cost a
    round trip each time, for what nearly never is."""
    options = blockdev.blockdev_options(disk, export, aio)
    try:
        await commands.blockdev_add(qmp, options)
    except QemuFailed as error:
        if "Duplicate nodes" not in error.cause:
            raise _explained(disk, error) from error
    else:
        return True
    if await _is_attached(qmp, disk, export):
        return False
    await commands.blockdev_del(qmp, blockdev.node_name(disk))
    try:
        await commands.blockdev_add(qmp, options)
    except QemuFailed as error:
        raise _explained(disk, error) from error
    return True


async def _add_device(qmp: QmpSession, disk: Disk) -> None:
    try:
        await commands.device_add(qmp, blockdev.device_options(disk))
    except QemuFailed as error:
        if "lun already used" in error.cause:
            raise AlreadyExists(
                f"disk {disk.id}",
                f"SCSI controller {disk.controller}, unit {disk.unit} is taken",
                "choose another unit",
            ) from error
        raise _explained(disk, error) from error
    except (TimedOut, asyncio.CancelledError):
        # Nobody knows whether the device is there; the node alone cannot be dropped then.
        await _remove_quietly(qmp, disk)
        raise


async def _is_attached(qmp: QmpSession, disk: Disk, export: str | None) -> bool:
    """Whether the disk is completely there. AlreadyExists if its device is there with another image."""
    if blockdev.device_id(disk) not in await commands.peripherals(qmp):
        return False
    file = (await commands.block_nodes(qmp)).get(blockdev.protocol_node_name(disk))
    if export is None and file != disk.source.path:
        raise AlreadyExists(f"disk {disk.id}", f"is attached with another image, {file}", "choose another id")
    return True


async def _drop_node(qmp: QmpSession, disk: Disk) -> None:
    """Undo of the node. QEMU refuses while a device uses it, so a disk that was there before is never hurt; what
    cannot be removed now, the next attach or detach of the same id removes."""
    with suppress(HostlerError, TimeoutError):
        async with asyncio.timeout(UNDO_TIMEOUT):
            await commands.blockdev_del(qmp, blockdev.node_name(disk))


async def _remove_quietly(qmp: QmpSession, disk: Disk) -> None:
    with suppress(HostlerError, TimeoutError):
        async with asyncio.timeout(UNDO_TIMEOUT):
            await detach_disk(qmp, disk.id, UNDO_TIMEOUT)


async def detach_disk(qmp: QmpSession, disk_id: str, timeout: float) -> None:
    """Pull a disk out: asks the guest, waits up to `timeout` seconds, then closes the image.

    GuestRefused when the guest does not let go, Busy when a job works on it; then the disk is still attached. Harmless
    when it is not there, and repeatable after any failure.
    """
    events = qmp.events()
    found, jobs = await asyncio.gather(commands.peripherals(qmp), block.query_jobs(qmp))
    if jobs:
        await _refuse_if_busy(qmp, disk_id)
    device = next((name for name in found if blockdev.disk_id(name) == disk_id), None)
    if device is not None:
        await _unplug(qmp, device)
        event = await events.wait_for(lambda e: _tells_of(e, device), timeout)
        if event is None or event.name != "DEVICE_DELETED":
            await _refuse_if_there(qmp, disk_id, device, timeout)
    await _release_all(qmp, disk_id)


async def _refuse_if_busy(qmp: QmpSession, disk_id: str) -> None:
    if any(blockdev.is_job_of(disk_id, node) for node in await commands.block_nodes(qmp)):
        raise Busy(f"disk {disk_id}", "a job works on it", "wait for it, or cancel it")


async def _release_all(qmp: QmpSession, disk_id: str) -> None:
    """Delete every node of a disk. Layers made while the VM ran are nodes of their own; what is nested in a node goes
    with it, and a node that another one builds on goes after that one."""
    for pause in (*_RELEASE_PAUSES, None):
        error: QemuFailed | None = None
        while left := [n for n in await commands.block_nodes(qmp) if blockdev.is_layer_of(disk_id, n)]:
            outcomes = [await _try_release(qmp, node) for node in left]
            error = next((e for e in outcomes if e is not None), None)
            if all(outcomes):
                break
        if error is None:
            return
        if pause is None:
            raise Busy(f"disk {disk_id}", f"its image is still used: {error.cause}", "end what uses it") from error
        await asyncio.sleep(pause)


async def _try_release(qmp: QmpSession, node: str) -> QemuFailed | None:
    """Delete a node; the refusal where it is still in use, or nested in another one."""
    try:
        await commands.blockdev_del(qmp, node)
    except QemuFailed as error:
        if "Failed to find node" in error.cause:
            return None
        if not any(words in error.cause for words in ("in use", "is busy", "not owned by the monitor")):
            raise
        return error
    return None


async def _unplug(qmp: QmpSession, device: str) -> None:
    try:
        await commands.device_del(qmp, device)
    except QemuFailed as error:
        # Gone between the look and now, or asked to go earlier: both end with the event, or with the look after it.
        if error.details.get("error_class") != "DeviceNotFound" and "in the process of unplug" not in error.cause:
            raise


def _tells_of(event: MachineEvent, device: str) -> bool:
    return event.name == EVENTS_LOST or (
        event.name in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") and event.data.get("device") == device
    )


async def _refuse_if_there(qmp: QmpSession, disk_id: str, device: str, timeout: float) -> None:
    """The event did not come or told of a refusal: the device list decides."""
    if device in await commands.peripherals(qmp):
        raise GuestRefused(
            f"disk {disk_id}",
            f"the guest did not let go of it within {timeout:g} s",
            "unmount it in the guest and try again; turning the VM off always works",
        )


async def attached_disks(qmp: QmpSession) -> frozenset[str]:
    """Ids of the disks that are plugged in."""
    found = (blockdev.disk_id(name) for name in await commands.peripherals(qmp))
    return frozenset(disk_id for disk_id in found if disk_id is not None)


async def io_failed(qmp: QmpSession) -> dict[str, str]:
    """Disk id to io-status for the disks whose last I/O failed."""
    found = ((blockdev.disk_id(device), status) for device, status in (await commands.io_statuses(qmp)).items())
    return {disk_id: status for disk_id, status in found if disk_id is not None and status != "ok"}


def _explained(disk: Disk, error: QemuFailed) -> HostlerError:
    """The error as one about the image, where QEMU's text says that it is."""
    if error.details.get("gone"):
        return error
    return image_error(f"disk {disk.id}", error.cause, disk.source.path) or error
