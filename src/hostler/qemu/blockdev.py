"""How a disk of the model looks to QEMU: the block graph behind it and the device in front of it. Pure.

The same two dictionaries serve the command line (`-blockdev JSON`, `-device JSON`) and QMP (`blockdev-add`,
`device_add`), so that a disk that was hot added and a disk that was there at the start are the same disk.

    guest  --  device  disk-<id>         scsi-hd, scsi-cd, ide-hd or ide-cd
                 |
               node    <id>              format layer: raw, qcow2, vpc, vhdx
                 |
               node    <id>.file         protocol layer: file, host_device or nbd

- The protocol node is nested in the format node: one command makes both, and deleting the format node deletes both.
- Identifiers of people have no dots (model.disk.DeviceId), so `<id>.file` never meets another disk's name; node names
  have at most 31 characters in QEMU (`BlockDriverState.node_name[32]`), longer ones are shortened with a checksum.
- `backing: null`: a backing path inside a qcow2 is never followed, whoever wrote it.
- Fixed VHD: data first, a 512-byte footer last. It is opened as raw with a fixed size, because QEMU's vpc driver (as
  vhdx and dynamic vpc) registers a migration blocker; the footer stays untouched.
- Dynamic VHD and VHDX are served by another process as an NBD export for the same reason; without an export they are
  opened directly, and then the VM cannot migrate.
- LUNs: all disks of a controller are LUNs of target 0. Linux and Windows find them by REPORT LUNS, also when LUN 0 is
  missing. Firmware looks less far: OVMF boots from LUN 0 to 7 only (PcdVirtioScsiMaxLunLimit).
"""

from __future__ import annotations

import zlib
from typing import Final, Literal

from pydantic import JsonValue

from hostler.model.disk import Bus, CacheMode, Disk, ImageFormat, Media, SourceKind
from hostler.model.errors import InvalidInput

Options = dict[str, JsonValue]
Aio = Literal["threads", "native", "io_uring"]

NODE_NAME_MAX: Final = 31
RECONNECT_DELAY: Final = 30
"""Seconds during which I/O waits for a lost export to come back before it fails (and stops the guest)."""

_DEVICE_PREFIX: Final = "disk-"
_DRIVER: Final[dict[ImageFormat, str]] = {
    ImageFormat.RAW: "raw",
    ImageFormat.QCOW2: "qcow2",
    ImageFormat.VHD: "vpc",
    ImageFormat.VHD_FIXED: "raw",
    ImageFormat.VHDX: "vhdx",
}


def node_name(disk: Disk) -> str:
    """The node the device uses, and the one to name in blockdev-del, block jobs and BLOCK_IO_ERROR: the disk's id."""
    return disk.id


def protocol_node_name(disk: Disk) -> str:
    """The node below it, at most 31 characters."""
    return _short(f"{disk.id}.file")


def device_id(disk: Disk) -> str:
    """The QEMU device id, to name in device_del and found in DEVICE_DELETED."""
    return _DEVICE_PREFIX + disk.id


def disk_id(device: str) -> str | None:
    """The disk a QEMU device id belongs to; None for other devices."""
    return device.removeprefix(_DEVICE_PREFIX) if device.startswith(_DEVICE_PREFIX) else None


def export_name(disk: Disk) -> str:
    """The name under which an NBD export serves this disk."""
    return disk.id


def needs_export(disk: Disk) -> bool:
    """Whether QEMU cannot migrate this format itself, so that a live-migratable VM needs it served over NBD."""
    return disk.source.format in (ImageFormat.VHD, ImageFormat.VHDX)


def blockdev_options(disk: Disk, export: str | None = None, aio: Aio = "threads") -> Options:
    """The block graph of `disk`, for `-blockdev` and blockdev-add.

    `export`: unix socket of the NBD export that serves it; then the image itself is not touched. `aio`: how files
    and devices are read; "native" falls back to "threads" where the cache mode goes through the page cache, which
    Linux AIO cannot do. InvalidInput for a fixed VHD of unknown size.
    """
    protocol = _nbd_options(disk, export) if export is not None else _file_options(disk, aio)
    options: Options = {
        "driver": "raw" if export is not None else _DRIVER[disk.source.format],
        "node-name": node_name(disk),
        **_common_options(disk),
        "file": protocol,
    }
    if export is None and disk.source.format is ImageFormat.QCOW2:
        options["backing"] = None
    if export is None and disk.source.format is ImageFormat.VHD_FIXED:
        options["size"] = _fixed_size(disk)
    return options


def device_options(disk: Disk) -> Options:
    """The device of `disk`, for `-device` and device_add. InvalidInput for a read-only IDE hard disk, which QEMU and
    real IDE do not have."""
    cdrom = disk.media is Media.CDROM
    if disk.bus is Bus.IDE and disk.read_only and not cdrom:
        raise InvalidInput(
            f"disk {disk.id}",
            "an IDE hard disk cannot be read-only",
            "put it on a SCSI controller, or let it be written",
        )
    place = _scsi_place(disk) if disk.bus is Bus.SCSI else _ide_place(disk)
    kind = f"{'scsi' if disk.bus is Bus.SCSI else 'ide'}-{'cd' if cdrom else 'hd'}"
    options: Options = {"driver": kind, "id": device_id(disk), **place, "drive": node_name(disk)}
    if disk.serial:
        options["serial"] = disk.serial
    if disk.wwn is not None:
        options["wwn"] = disk.wwn
    if disk.boot_index is not None:
        options["bootindex"] = disk.boot_index
    return options | ({} if cdrom else _hard_disk(disk))


def _hard_disk(disk: Disk) -> Options:
    """A failing disk stops the guest instead of failing its file system: the VM becomes critical and can go on when
    the cause is gone. Rotation rate 1 means "does not rotate" (SBC-3, ATA8-ACS): guests then trim and do not
    defragment."""
    return {
        "write-cache": "off" if disk.cache is CacheMode.WRITETHROUGH else "on",
        "werror": "stop",
        "rerror": "stop",
        "rotation_rate": 1,
    }


def _scsi_place(disk: Disk) -> Options:
    return {
        "bus": f"scsi{disk.controller}.0",
        "channel": 0,
        "scsi-id": 0,
        "lun": disk.unit,
        # Without it the identifier in VPD page 0x83 would come from names that differ from start to hot add.
        "device_id": (disk.serial or disk.id)[:20],
    }


def _ide_place(disk: Disk) -> Options:
    """The q35 AHCI controller has one bus, with one unit, for each port."""
    return {"bus": f"ide.{disk.unit}", "unit": 0}


def _common_options(disk: Disk) -> Options:
    """What is said on both layers. `detect-zeroes` stays off: it reads every written byte, and guests that care send
    discards themselves."""
    return {
        "read-only": not disk.writes,
        "auto-read-only": False,
        "discard": "unmap" if disk.discard and disk.writes else "ignore",
        "cache": {"direct": disk.cache is CacheMode.NONE, "no-flush": False},
    }


def _file_options(disk: Disk, aio: Aio) -> Options:
    """`locking: on` instead of QEMU's default `auto`, which silently goes without locks where the host has none."""
    possible = aio if aio != "native" or disk.cache is CacheMode.NONE else "threads"
    return {
        "driver": "host_device" if disk.source.kind is SourceKind.DEVICE else "file",
        "node-name": protocol_node_name(disk),
        "filename": disk.source.path,
        "locking": "on",
        "aio": possible,
        **_common_options(disk),
    }


def _nbd_options(disk: Disk, export: str) -> Options:
    return {
        "driver": "nbd",
        "node-name": protocol_node_name(disk),
        "server": {"type": "unix", "path": export},
        "export": export_name(disk),
        "reconnect-delay": RECONNECT_DELAY,
        **_common_options(disk),
    }


def _fixed_size(disk: Disk) -> int:
    if disk.source.size == 0 or disk.source.size % 512:
        raise InvalidInput(
            f"disk {disk.id}",
            f"the fixed VHD {disk.source.path} has {disk.source.size} bytes on record, which is not a multiple of 512",
            "register the volume again, so that its size is read from its footer",
        )
    return disk.source.size


def _short(name: str) -> str:
    if len(name) <= NODE_NAME_MAX:
        return name
    return f"{name[:17]}.{zlib.crc32(name.encode()):08x}.file"
