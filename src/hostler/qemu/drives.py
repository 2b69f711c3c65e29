"""What changes on a disk while the VM runs, beside its layers: size, limits, the medium in a drive.

A drive's tray: closed, with or without medium --open--> open --remove, insert--> open --close--> closed. Where the
guest has locked it (Linux does while a medium is mounted), QEMU only tells the guest that somebody pressed the button.
"""

from __future__ import annotations

from contextlib import suppress

from hostler.model.disk import Disk, IoLimits, Media, SourceKind
from hostler.model.errors import GuestRefused, HostlerError, InvalidInput, NotFound, QemuFailed
from hostler.qemu import blockdev, commands, layers
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio, Options
from hostler.qemu.blockjobs import can_grow
from hostler.qemu.qmp import QmpSession

TRAY_WAIT = 3.0
"""Seconds a guest has to open a tray it has locked, once the button was pressed."""


async def resize(qmp: QmpSession, disk: Disk, size: int) -> None:
    """See `Blocks.resize`. QEMU tells the guest (virtio-scsi: a capacity change is a unit attention)."""
    top = disk.source
    if not can_grow(top) and top.kind is not SourceKind.DEVICE:
        raise InvalidInput(
            f"disk {disk.id}",
            f"QEMU cannot grow {top.format.value} ({top.kind.value}) while the VM runs",
            "turn the VM off, or move the disk to a qcow2 or raw volume",
        )
    try:
        await block.block_resize(qmp, blockdev.node_name(disk), size)
    except QemuFailed as error:
        raise layers.explained(disk, top, error) from error


async def limit(qmp: QmpSession, disk_id: str, limits: IoLimits) -> None:
    """See `Blocks.limit`."""
    try:
        await block.block_set_io_throttle(qmp, throttle_options(blockdev.DEVICE_PREFIX + disk_id, limits))
    except QemuFailed as error:
        if error.details.get("error_class") == "DeviceNotFound" or "not found" in error.cause:
            raise NotFound(f"disk {disk_id}", "the VM has no such disk", "attach it first") from error
        raise


def throttle_options(device: str, limits: IoLimits) -> Options:
    """QEMU's names; 0 is unlimited there too. A burst lasts a second."""
    options: Options = {
        "id": device,
        "iops": limits.iops,
        "iops_rd": limits.iops_read,
        "iops_wr": limits.iops_write,
        "bps": limits.bandwidth,
        "bps_rd": limits.bandwidth_read,
        "bps_wr": limits.bandwidth_write,
    }
    if limits.iops_burst:
        options["iops_max"] = limits.iops_burst
    if limits.bandwidth_burst:
        options["bps_max"] = limits.bandwidth_burst
    return options


async def change_medium(qmp: QmpSession, aio: Aio, disk: Disk, export: str | None, force: bool) -> None:
    """See `Blocks.change_medium`. When the new image cannot be opened, the old medium stays in: it is tried out, under
    another name, before."""
    device = blockdev.device_id(disk)
    drive = await block.drive(qmp, device)
    if drive is None or disk.media is Media.DISK:
        raise NotFound(f"disk {disk.id}", "the VM has no such drive for removable media", "attach it first")
    empty = disk.source.kind is SourceKind.EMPTY
    wanted = None if empty else blockdev.node_name(disk)
    nodes = await block.block_nodes(qmp)
    if drive.node == wanted and (empty or nodes[drive.node or ""].file == disk.source.path):
        await _close(qmp, device, drive)
        return
    options = None if empty else blockdev.blockdev_options(disk, export, aio)
    if options is not None:
        await _try_out(qmp, disk, options)
    if drive.node is not None:
        await _take_out(qmp, disk, force)
    await _drop(qmp, disk, keep=None)
    if options is not None:
        await layers.add_node(qmp, disk, options)
        if not (await _look(qmp, device)).tray_open:
            await _open(qmp, disk, device, force)
        await block.insert_medium(qmp, device, blockdev.node_name(disk))
    await _close(qmp, device, await _look(qmp, device))


async def _try_out(qmp: QmpSession, disk: Disk, options: Options) -> None:
    """Open the image once, so that a bad one is refused while the old medium is in."""
    name = f"{blockdev.node_name(disk)[:20]}.probe"
    with suppress(QemuFailed):
        await commands.blockdev_del(qmp, name)
    probe = {key: value for key, value in options.items() if key != "node-name"} | {"node-name": name}
    for child in ("file", "backing"):
        inner = probe.get(child)
        if isinstance(inner, dict):
            probe[child] = {key: value for key, value in inner.items() if key != "node-name"}
    try:
        await commands.blockdev_add(qmp, {**probe, "read-only": True})
    except QemuFailed as error:
        raise layers.explained(disk, disk.source, error) from error
    await commands.blockdev_del(qmp, name)


async def _take_out(qmp: QmpSession, disk: Disk, force: bool) -> None:
    device = blockdev.device_id(disk)
    await _open(qmp, disk, device, force)
    await block.remove_medium(qmp, device)


async def _open(qmp: QmpSession, disk: Disk, device: str, force: bool) -> None:
    """GuestRefused when the guest holds the tray shut. A floppy drive has no tray."""
    events = qmp.events()
    with suppress(QemuFailed):
        await block.open_tray(qmp, device, force)
    if disk.media is Media.FLOPPY or (await _look(qmp, device)).tray_open:
        return
    await events.wait_for(
        lambda event: event.name == "DEVICE_TRAY_MOVED" and event.data.get("tray-open") is True, TRAY_WAIT
    )
    if not (await _look(qmp, device)).tray_open:
        raise GuestRefused(
            f"disk {disk.id}",
            f"the guest has locked its drive and did not open it within {TRAY_WAIT:g} s",
            "unmount the medium in the guest, or use force",
        )


async def _look(qmp: QmpSession, device: str) -> block.Drive:
    drive = await block.drive(qmp, device)
    if drive is None:
        raise NotFound(qmp.name, f"the drive {device} is gone", "attach it again")
    return drive


async def _close(qmp: QmpSession, device: str, drive: block.Drive) -> None:
    if drive.tray_open:
        await block.close_tray(qmp, device)


async def _drop(qmp: QmpSession, disk: Disk, keep: str | None) -> None:
    """Close what was in the drive."""
    for node in await block.block_nodes(qmp):
        if blockdev.is_layer_of(disk.id, node) and node != keep:
            with suppress(HostlerError):
                await commands.blockdev_del(qmp, node)
