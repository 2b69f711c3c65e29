"""Disks: a volume or a block device of the host, attached to a VM at a stable address."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.base import Record


class ImageFormat(StrEnum):
    """Formats a volume can have. `vhd-fixed` and `vhd` are QEMU's `vpc`, with fixed and dynamic subformat."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VHD = "vhd"
    VHD_FIXED = "vhd-fixed"
    VHDX = "vhdx"


class Bus(StrEnum):
    """Where a disk is plugged in. SCSI (virtio-scsi) takes disks while the VM runs; IDE (AHCI) does not."""

    SCSI = "scsi"
    IDE = "ide"


class SourceKind(StrEnum):
    VOLUME = "volume"
    DEVICE = "device"
    """Pass-through: a whole block device of the host."""


class Media(StrEnum):
    DISK = "disk"
    CDROM = "cdrom"


class CacheMode(StrEnum):
    """QEMU's cache modes that keep guest flushes. `unsafe` is not offered: it loses data when the host dies."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"


class DiskSource(Record):
    """What is behind a disk. `path` is absolute on the host; `size` is what the guest sees, in bytes (a fixed VHD is
    one footer shorter than its file)."""

    kind: SourceKind = SourceKind.VOLUME
    path: str
    format: ImageFormat = ImageFormat.RAW
    size: int = Field(default=0, ge=0)


DeviceId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
"""Identifier of a device inside a VM; becomes QEMU's device id, which allows letters, digits and dashes."""


class Disk(Record):
    """A disk as a VM has it.

    `controller` and `unit` are its stable address: on SCSI, controller 0-3 and LUN 0-63; on IDE, unit 0-3 with
    controller 0. `serial` (at most 36 characters: QEMU's limit for scsi-hd) and `wwn` (64-bit NAA 5) stay the same
    across restart and migration.
    """

    id: DeviceId
    source: DiskSource
    bus: Bus = Bus.SCSI
    controller: int = Field(default=0, ge=0, le=3)
    unit: int = Field(default=0, ge=0, le=63)
    media: Media = Media.DISK
    read_only: bool = False
    cache: CacheMode = CacheMode.NONE
    discard: bool = True
    serial: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{0,36}$")] = ""
    wwn: int | None = Field(default=None, ge=0, lt=2**64)
    boot_index: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _address(self) -> Self:
        if self.bus is Bus.IDE and (self.controller != 0 or self.unit > 3):
            raise ValueError("an IDE disk has controller 0 and unit 0 to 3")
        return self

    @property
    def address(self) -> tuple[Bus, int, int]:
        """Where it is plugged in: unique within a VM."""
        return (self.bus, self.controller, self.unit)

    @property
    def writes(self) -> bool:
        """Whether the guest can change what is behind it."""
        return not self.read_only and self.media is Media.DISK
