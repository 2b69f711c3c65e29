"""Disks: a volume or a block device of the host, attached to a VM at a stable address.

What is behind a disk is a chain of layers: the top one is written, each holds what differs from the one below it
(`backing`). The chain stands in our record; what an image itself says about a backing file is never followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Self

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
    """Where a disk is plugged in. SCSI (virtio-scsi) takes disks while the VM runs; IDE (AHCI) and the floppy
    controller do not, but the medium of a drive may be changed there too."""

    SCSI = "scsi"
    IDE = "ide"
    FLOPPY = "floppy"


BUS_NAMES: dict[Bus, str] = {Bus.SCSI: "SCSI bus", Bus.IDE: "IDE bus", Bus.FLOPPY: "floppy controller"}
"""What people call them."""


class SourceKind(StrEnum):
    VOLUME = "volume"
    DEVICE = "device"
    """Pass-through: a whole block device of the host."""
    ISCSI = "iscsi"
    """A LUN, reached by QEMU's own initiator; `path` is iscsi://HOST:PORT/TARGET-IQN/LUN."""
    NBD = "nbd"
    """An NBD export of another machine; `path` is nbd://HOST:PORT/NAME."""
    CHAIN = "chain"
    """A differencing chain of VHD or VHDX files, served read-only by a process of ours; `path` is its topmost file."""
    EMPTY = "empty"
    """No medium: a drive for removable media without one. `path` is empty."""


class Media(StrEnum):
    DISK = "disk"
    CDROM = "cdrom"
    FLOPPY = "floppy"


class CacheMode(StrEnum):
    """QEMU's cache modes that keep guest flushes. `unsafe` is not offered: it loses data when the host dies."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"


MAX_LAYERS = 128
"""Layers of one chain. QEMU opens each; beyond some dozens every read of an old cluster gets slow."""


class DiskSource(Record):
    """What is behind a disk: the top layer, and by `backing` the layers below it.

    `path` is absolute on the host, or the address of a network source (see SourceKind); `size` is what the guest sees,
    in bytes (a fixed VHD is one footer shorter than its file). `node` tells the layers of one disk apart: "" for the
    image a disk was attached with, a short random token for each layer and each copy made later; it never changes and
    is never used twice for one disk. `pool` is the pool that knows how to reach a network source; `identity` is what a
    LUN calls itself, whichever way it is reached (its designator, "naa.6001405..."): claims are kept by it, and another
    LUN at the same address is refused.
    """

    kind: SourceKind = SourceKind.VOLUME
    path: str
    format: ImageFormat = ImageFormat.RAW
    size: int = Field(default=0, ge=0)
    node: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{0,8}$")] = ""
    pool: str = ""
    identity: str = ""
    fixed: bool = False
    """Somebody else's image below an overlay: never written, merged into, or deleted with the VM."""
    backing: DiskSource | None = None

    @model_validator(mode="after")
    def _chain(self) -> Self:
        layers = list(self.layers())
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"a disk has at most {MAX_LAYERS} layers")
        if len({layer.node for layer in layers}) != len(layers):
            raise ValueError("two layers of a disk have the same node name")
        if any(layer.format is not ImageFormat.QCOW2 for layer in layers[:-1]):
            raise ValueError("only a qcow2 layer can build on another one")
        return self

    def layers(self) -> Iterator[DiskSource]:
        """Every layer, from the top one, which is written, down to the base."""
        layer: DiskSource | None = self
        while layer is not None:
            yield layer
            layer = layer.backing

    @property
    def exported(self) -> bool:
        """Whether another process serves this layer to QEMU as an NBD export: QEMU's drivers for dynamic VHD and VHDX
        block migration and saving (decision 0005), and differencing chains it cannot open at all."""
        return self.kind is SourceKind.CHAIN or (
            self.kind is SourceKind.VOLUME and self.format in (ImageFormat.VHD, ImageFormat.VHDX)
        )

    @property
    def local(self) -> bool:
        """Whether `path` names something in this host's file system."""
        return self.kind in (SourceKind.VOLUME, SourceKind.DEVICE, SourceKind.CHAIN)

    @property
    def networked(self) -> bool:
        """Whether QEMU reaches it over the network, by what its pool knows."""
        return self.kind in (SourceKind.ISCSI, SourceKind.NBD)

    @property
    def base(self) -> DiskSource:
        """The lowest layer."""
        return list(self.layers())[-1]


DeviceId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
"""Identifier of a device inside a VM; becomes QEMU's device id, which allows letters, digits and dashes."""


class IoLimits(Record):
    """What a disk may do at most, 0: unlimited. Operations and bytes per second; a `..._burst` may be used for short
    peaks above the rate (QEMU's `*_max`, for one second)."""

    iops: int = Field(default=0, ge=0)
    iops_read: int = Field(default=0, ge=0)
    iops_write: int = Field(default=0, ge=0)
    iops_burst: int = Field(default=0, ge=0)
    bandwidth: int = Field(default=0, ge=0)
    bandwidth_read: int = Field(default=0, ge=0)
    bandwidth_write: int = Field(default=0, ge=0)
    bandwidth_burst: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.iops and (self.iops_read or self.iops_write):
            raise ValueError("give 'iops' for both directions together, or 'iops_read' and 'iops_write'")
        if self.bandwidth and (self.bandwidth_read or self.bandwidth_write):
            raise ValueError("give 'bandwidth' for both directions together, or one for each")
        if (self.iops_burst and self.iops_burst < self.iops) or (
            self.bandwidth_burst and self.bandwidth_burst < self.bandwidth
        ):
            raise ValueError("a burst is above the rate it exceeds")
        if (self.iops_burst and not self.iops) or (self.bandwidth_burst and not self.bandwidth):
            raise ValueError("a burst needs the rate for both directions that it exceeds")
        return self

    @property
    def unlimited(self) -> bool:
        """Whether nothing is limited."""
        return self == IoLimits()


class Disk(Record):
    """A disk as a VM has it.

    `controller` and `unit` are its stable address: on SCSI, controller 0-3 and LUN 0-63; on IDE, unit 0-3 with
    controller 0; on the floppy controller, unit 0-1. `serial` (at most 36 characters: QEMU's limit for scsi-hd) and
    `wwn` (64-bit NAA 5) stay the same across restart and migration. `reservations`: the guest talks to the device
    itself, so that SCSI-3 persistent reservations reach it (pass-through and iSCSI on SCSI only).
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
    limits: IoLimits = IoLimits()
    reservations: bool = False

    @model_validator(mode="before")
    @classmethod
    def _floppy(cls, data: Any) -> Any:
        """A floppy drive can be on one bus only, which needs not be said."""
        if isinstance(data, dict) and data.get("media") == Media.FLOPPY:
            return {"bus": Bus.FLOPPY, **data}
        return data

    @model_validator(mode="after")
    def _address(self) -> Self:
        if self.bus is Bus.IDE and (self.controller != 0 or self.unit > 3):
            raise ValueError("an IDE disk has controller 0 and unit 0 to 3")
        if self.bus is Bus.FLOPPY and (self.controller != 0 or self.unit > 1):
            raise ValueError("a floppy drive has controller 0 and unit 0 or 1")
        if (self.bus is Bus.FLOPPY) is not (self.media is Media.FLOPPY):
            raise ValueError("floppy drives, and nothing else, are on the floppy controller")
        return self

    @model_validator(mode="after")
    def _medium(self) -> Self:
        if self.source.kind is SourceKind.EMPTY and self.media is Media.DISK:
            raise ValueError("only a drive for removable media can be empty")
        if self.reservations and self.source.kind not in (SourceKind.DEVICE, SourceKind.ISCSI):
            raise ValueError("persistent reservations need a passed-through device or an iSCSI LUN")
        return self

    @property
    def address(self) -> tuple[Bus, int, int]:
        """Where it is plugged in: unique within a VM."""
        return (self.bus, self.controller, self.unit)

    @property
    def removable(self) -> bool:
        """Whether it is a drive whose medium can be changed."""
        return self.media is not Media.DISK

    @property
    def writes(self) -> bool:
        """Whether the guest can change what is behind it."""
        return not self.read_only and self.media is not Media.CDROM

    def layer_name(self, layer: DiskSource) -> str:
        """What identifies a layer of this disk on its host: in QEMU's node names and in the names of exports."""
        return f"{self.id}.{layer.node}" if layer.node else self.id

    def at(self, layer: DiskSource) -> Disk:
        """This disk as it would be with `layer` alone behind it; its cache mode and rights stay."""
        return self.model_copy(update={"source": layer.model_copy(update={"backing": None})})
