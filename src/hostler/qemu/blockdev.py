"""How a disk of the model looks to QEMU: the block graph behind it and the device in front of it. Pure.

The same two dictionaries serve the command line (`-blockdev JSON`, `-device JSON`) and QMP (`blockdev-add`,
`device_add`), so that a disk that was hot added and a disk that was there at the start are the same disk.

    guest  --  device  disk-<id>         scsi-hd, scsi-cd, ide-hd, ide-cd or floppy
                 |
               node    <id>              format layer: raw, qcow2, vpc, vhdx
                 |
               node    <id>.file         protocol layer: file, host_device or nbd

- The protocol node is nested in the format node: one command makes both, and deleting the format node deletes both.
- Identifiers of people have no dots (model.disk.DeviceId), so `<id>.file` never meets another disk's name; node names
  have at most 31 characters in QEMU (`BlockDriverState.node_name[32]`), longer ones are shortened with a checksum.
- A disk with several layers is a chain of format nodes, each nested in the one above as its `backing`; a layer's node
  is `<id>`, or `<id>.<node>` where the layer has a token (model.disk.DiskSource.node). Long ids are shortened for it.
- The node that a job puts into a disk's chain while it works is `<id>.<checksum of the job's id>.job`: so jobs are
  found by disk, also by a daemon that did not start them.
- `backing: null` below the last layer: a backing path inside a qcow2 is never followed, whoever wrote it.
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

from hostler.model.disk import Bus, CacheMode, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import InvalidInput
from hostler.qemu.network_disks import protocol_options

Options = dict[str, JsonValue]
Aio = Literal["threads", "native", "io_uring"]

NODE_NAME_MAX: Final = 31
RECONNECT_DELAY: Final = 30
"""Seconds during which I/O waits for a lost export to come back before it fails (and stops the guest)."""

FLOPPY_CONTROLLER: Final = "floppies"
"""QEMU's id of the controller, which a VM has exactly when it has a floppy drive. Disks' ids begin with "disk-"."""

DEVICE_PREFIX: Final = "disk-"
_JOB: Final = ".job"
_DRIVER: Final[dict[ImageFormat, str]] = {
    ImageFormat.RAW: "raw",
    ImageFormat.QCOW2: "qcow2",
    ImageFormat.VHD: "vpc",
    ImageFormat.VHD_FIXED: "raw",
    ImageFormat.VHDX: "vhdx",
}


def node_name(disk: Disk) -> str:
    """The node the device uses, and the one to name in blockdev-del, block jobs and BLOCK_IO_ERROR: the top layer's,
    which is the disk's id unless the layer was made later."""
    return layer_node(disk, disk.source)


def layer_node(disk: Disk, layer: DiskSource) -> str:
    """The format node of one of its layers, at most 31 characters."""
    return f"{_stem(disk.id)}.{layer.node}" if layer.node else disk.id


def layer_nodes(disk: Disk, layer: DiskSource) -> tuple[str, str]:
    """Both nodes of a layer: format and protocol."""
    return layer_node(disk, layer), _protocol(disk, layer)


def job_node(disk: Disk, job: str) -> str:
    """The node of a job that works on that disk."""
    return f"{_stem(disk.id)}.{zlib.crc32(job.encode()):08x}{_JOB}"


def is_job_of(disk_id: str, node: str) -> bool:
    """Whether a node is that of a job that works on the disk."""
    return node.endswith(_JOB) and node.startswith(f"{_stem(disk_id)}.")


def is_layer_of(disk_id: str, node: str) -> bool:
    """Whether a format node is one of that disk's layers, or a copy of it under way."""
    if node.endswith((".file", _JOB)):
        return False
    return node == disk_id or node.startswith(f"{_stem(disk_id)}.")


def protocol_node_name(disk: Disk) -> str:
    """The protocol node below the top layer, at most 31 characters."""
    return _protocol(disk, disk.source)


def _protocol(disk: Disk, layer: DiskSource) -> str:
    return _short(f"{layer_node(disk, layer)}.file")


def _stem(disk_id: str) -> str:
    """What the names of a disk's later nodes begin with, at most 17 characters: a token and ".file" follow."""
    return disk_id if len(disk_id) <= 17 else f"{disk_id[:8]}-{zlib.crc32(disk_id.encode()):08x}"


def device_id(disk: Disk) -> str:
    """The QEMU device id, to name in device_del and found in DEVICE_DELETED."""
    return DEVICE_PREFIX + disk.id


def disk_id(device: str) -> str | None:
    """The disk a QEMU device id belongs to; None for other devices."""
    return device.removeprefix(DEVICE_PREFIX) if device.startswith(DEVICE_PREFIX) else None


def export_name(disk: Disk) -> str:
    """The name under which an NBD export serves the base of this disk."""
    return disk.layer_name(disk.source.base)


def needs_export(disk: Disk) -> bool:
    """Whether QEMU cannot migrate its base's format itself, so that a live-migratable VM needs it served over NBD."""
    return disk.source.base.exported


def blockdev_options(disk: Disk, export: str | None = None, aio: Aio = "threads") -> Options:
    """The block graph of `disk`, for `-blockdev` and blockdev-add.

    `export`: unix socket of the NBD export that serves its base; then that image itself is not touched. `aio`: how
    files and devices are read; "native" falls back to "threads" where the cache mode goes through the page cache, which
    Linux AIO cannot do. InvalidInput for a fixed VHD of unknown size. Not for an empty drive, which has no graph.
    """
    options: Options | None = None
    for layer in reversed(list(disk.source.layers())):
        options = _layer_options(disk, layer, export if layer.backing is None else None, aio, options)
    assert options is not None
    return options


def overlay_options(disk: Disk, aio: Aio = "threads") -> Options:
    """The top layer alone, with nothing below it: as blockdev-snapshot wants it."""
    return _layer_options(disk, disk.source, None, aio, None)


def reopen_options(disk: Disk, layer: DiskSource, writes: bool, export: str | None, aio: Aio) -> list[Options]:
    """Both nodes of a layer as blockdev-reopen wants them: everything said again, children by their names."""
    common = _common_options(disk, writes)
    protocol = _protocol_options(disk, layer, export, aio, common)
    node = _layer_options(disk, layer, export, aio, None) | common | {"file": _protocol(disk, layer)}
    if "backing" in node and layer.backing is not None:
        node["backing"] = layer_node(disk, layer.backing)
    return [protocol, node]


def _layer_options(disk: Disk, layer: DiskSource, export: str | None, aio: Aio, backing: Options | None) -> Options:
    """One layer on top of `backing`. Layers below the top one are only read."""
    common = _common_options(disk, writes=disk.writes and layer is disk.source)
    protocol = _protocol_options(disk, layer, export, aio, common)
    options: Options = {
        "driver": "raw" if export is not None else _DRIVER[layer.format],
        "node-name": layer_node(disk, layer),
        **common,
        "file": protocol,
    }
    if export is None and layer.format is ImageFormat.QCOW2:
        options["backing"] = backing
    if export is None and layer.format is ImageFormat.VHD_FIXED:
        options["size"] = _fixed_size(disk, layer)
    return options


def device_options(disk: Disk) -> Options:
    """The device of `disk`, for `-device` and device_add. InvalidInput for a read-only IDE hard disk, which QEMU and
    real IDE do not have."""
    cdrom, medium = disk.media is Media.CDROM, disk.source.kind is not SourceKind.EMPTY
    if disk.media is Media.FLOPPY:
        return {
            "driver": "floppy",
            "id": device_id(disk),
            "bus": f"{FLOPPY_CONTROLLER}.0",
            "unit": disk.unit,
            **({"drive": node_name(disk)} if medium else {}),
        }
    if disk.bus is Bus.IDE and disk.read_only and not cdrom:
        raise InvalidInput(
            f"disk {disk.id}",
            "an IDE hard disk cannot be read-only",
            "put it on a SCSI controller, or let it be written",
        )
    if disk.reservations:
        return _passed_through(disk)
    place = _scsi_place(disk) if disk.bus is Bus.SCSI else _ide_place(disk)
    kind = f"{'scsi' if disk.bus is Bus.SCSI else 'ide'}-{'cd' if cdrom else 'hd'}"
    options: Options = {"driver": kind, "id": device_id(disk), **place}
    if medium:
        options["drive"] = node_name(disk)
    if disk.serial:
        options["serial"] = disk.serial
    if disk.wwn is not None:
        options["wwn"] = disk.wwn
    if disk.boot_index is not None:
        options["bootindex"] = disk.boot_index
    return options | ({} if cdrom else _hard_disk(disk))


def _passed_through(disk: Disk) -> Options:
    """The device itself: its commands, its names, its reservations. What the guest writes does not pass QEMU's block
    layer: no job, no bitmap and no limit sees it."""
    place = {key: value for key, value in _scsi_place(disk).items() if key != "device_id"}
    boot = {} if disk.boot_index is None else {"bootindex": disk.boot_index}
    # A reservation conflict is news for the guest; QEMU 7.2 would stop it, as for a failing disk.
    errors: Options = {"werror": "report", "rerror": "report"}
    return {"driver": "scsi-block", "id": device_id(disk), **place, "drive": node_name(disk), **boot, **errors}


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


def _common_options(disk: Disk, writes: bool) -> Options:
    """What is said on both layers. `detect-zeroes` stays off: it reads every written byte, and guests that care send
    discards themselves."""
    return {
        "read-only": not writes,
        "auto-read-only": False,
        "discard": "unmap" if disk.discard and writes else "ignore",
        "cache": {"direct": disk.cache is CacheMode.NONE, "no-flush": False},
    }


def _protocol_options(disk: Disk, layer: DiskSource, export: str | None, aio: Aio, common: Options) -> Options:
    if export:
        return _nbd_options(disk, layer, export, common)
    if layer.networked:
        return {"node-name": _protocol(disk, layer), **protocol_options(layer), **common}
    return _file_options(disk, layer, aio, common)


def _file_options(disk: Disk, layer: DiskSource, aio: Aio, common: Options) -> Options:
    """`locking: on` instead of QEMU's default `auto`, which silently goes without locks where the host has none."""
    possible = aio if aio != "native" or disk.cache is CacheMode.NONE else "threads"
    return {
        "driver": "host_device" if layer.kind is SourceKind.DEVICE else "file",
        "node-name": _protocol(disk, layer),
        "filename": layer.path,
        "locking": "on",
        "aio": possible,
        **common,
    }


def _nbd_options(disk: Disk, layer: DiskSource, export: str, common: Options) -> Options:
    return {
        "driver": "nbd",
        "node-name": _protocol(disk, layer),
        "server": {"type": "unix", "path": export},
        "export": export_name(disk),
        "reconnect-delay": RECONNECT_DELAY,
        **common,
    }


def _fixed_size(disk: Disk, layer: DiskSource) -> int:
    if layer.size == 0 or layer.size % 512:
        raise InvalidInput(
            f"disk {disk.id}",
            f"the fixed VHD {layer.path} has {layer.size} bytes on record, which is not a multiple of 512",
            "register the volume again, so that its size is read from its footer",
        )
    return layer.size


def _short(name: str) -> str:
    if len(name) <= NODE_NAME_MAX:
        return name
    ending = ".file" if name.endswith(".file") else ""
    return f"{name[:17]}.{zlib.crc32(name.encode()):08x}{ending}"
