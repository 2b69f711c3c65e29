"""What people and programs ask for: the bodies of the REST API, used as they are by the client and the CLI.

Unknown fields are refused. Sizes in bytes. Everything optional that the host can choose is optional here.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.base import Input
from hostler.model.disk import Bus, CacheMode, ImageFormat, Media
from hostler.model.image import Preallocation
from hostler.model.migration import MigrationMode
from hostler.model.nic import BridgeName, Mac, Network
from hostler.model.pool import PoolName
from hostler.model.principal import Role
from hostler.model.vm import AbsolutePath, Autostart, Firmware, KernelBoot, Shutdown, StopAction

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Notes = Annotated[str, StringConstraints(max_length=16_384)]
Path = Annotated[AbsolutePath, StringConstraints(max_length=4096)]


class DiskAdd(Input):
    """A disk to attach: exactly one of `volume` (the name of a volume, or the absolute path of an image) and `device`
    (a block device to pass through); neither for a drive without a medium. Floppy drives have a controller of their
    own, whatever `bus` says. Without `controller`/`unit` the first free address is taken. A path that is not
    a known volume is recognised by its content; `format` must be given for raw images that are not known volumes."""

    volume: Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")] | None = None
    device: Path | None = None
    format: ImageFormat | None = None
    bus: Bus = Bus.SCSI
    controller: int | None = Field(default=None, ge=0, le=3)
    unit: int | None = Field(default=None, ge=0, le=63)
    media: Media = Media.DISK
    read_only: bool = False
    cache: CacheMode = CacheMode.NONE
    discard: bool = True
    serial: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,36}$")] | None = None
    reservations: bool = False
    """The guest talks to the device or LUN itself, with SCSI-3 persistent reservations; a LUN may then be a disk of
    several VMs that all do so (a cluster)."""
    overlay: bool = False
    """What the guest writes goes into a new volume on top of the image, which itself is only read."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.volume is not None and self.device is not None:
            raise ValueError("give exactly one of 'volume' and 'device'")
        if self.volume is None and self.device is None and self.media is Media.DISK:
            raise ValueError("give exactly one of 'volume' and 'device'; only a CD or floppy drive can be empty")
        if self.bus is Bus.FLOPPY and self.media is not Media.FLOPPY:
            raise ValueError("the floppy controller has floppy drives only: give 'media' as well")
        if self.device is not None and self.format not in (None, ImageFormat.RAW):
            raise ValueError("a passed-through device has no format")
        return self

    @model_validator(mode="after")
    def _overlay(self) -> Self:
        if self.overlay and (self.volume is None or self.media is not Media.DISK):
            raise ValueError("an overlay is a disk on top of a 'volume'")
        if self.overlay and (self.read_only or self.reservations):
            raise ValueError("an overlay is there to be written: without 'read_only' and 'reservations'")
        return self


class NicAdd(Input):
    """A network adapter. Without `mac` one is made."""

    network: Network = Network.USER
    bridge: BridgeName | None = None
    mac: Mac | None = None
    queues: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def _bridge(self) -> Self:
        if (self.network is Network.BRIDGE) != (self.bridge is not None):
            raise ValueError("give 'bridge' exactly when the network is 'bridge'")
        return self


class VmCreate(Input):
    name: Name
    vcpus: int = Field(default=1, ge=1)
    memory: int = Field(default=1024**3, ge=1024**2)
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    kernel: KernelBoot | None = None
    disks: tuple[DiskAdd, ...] = Field(default=(), max_length=260)
    nics: tuple[NicAdd, ...] = Field(default=(), max_length=64)
    scsi_controllers: int = Field(default=1, ge=0, le=4)
    machine: str | None = None
    cpu_model: str | None = None
    autostart: Autostart = Autostart()
    shutdown: Shutdown = Shutdown()
    notes: Notes = ""

    @model_validator(mode="after")
    def _secure_boot(self) -> Self:
        if self.secure_boot and self.firmware is not Firmware.UEFI:
            raise ValueError("secure boot needs the firmware 'uefi'")
        return self


class VmChange(Input):
    """Fields left out stay as they are. Name, notes, autostart and shutdown change at once; the others need the VM to
    be off, unless `when_off` asks to keep the change for the next start."""

    name: Name | None = None
    notes: Notes | None = None
    autostart: Autostart | None = None
    shutdown: Shutdown | None = None
    vcpus: int | None = Field(default=None, ge=1)
    memory: int | None = Field(default=None, ge=1024**2)
    firmware: Firmware | None = None
    tpm: bool | None = None
    kernel: KernelBoot | None = None
    scsi_controllers: int | None = Field(default=None, ge=0, le=4)


class ShutdownRequest(Input):
    """Overrides of the VM's own shutdown settings for this one time; `timeout` in seconds."""

    timeout: int | None = Field(default=None, ge=1, le=86_400)
    then: StopAction | None = None


class MigrateRequest(Input):
    """`host`: name or id of the target. `bandwidth` bytes/s (0: unlimited); `downtime_limit` ms."""

    host: Name
    mode: MigrationMode = MigrationMode.LIVE
    bandwidth: int = Field(default=0, ge=0)
    downtime_limit: int = Field(default=50, ge=1, le=60_000)
    streams: int = Field(default=1, ge=1, le=64)


class VolumeCreate(Input):
    """A new volume. `pool`: in which pool (default: the pool `default`, the host's volume directory), or `path`: at
    which place; in a pool of LUNs the smallest free one of at least `size` is taken. `source`: absolute path of an
    image to copy, converting to `format`; then `size` may be left out or larger than the source's. `preallocate`: take
    space now (metadata: qcow2; full: raw, qcow2, vhd-fixed)."""

    name: Name
    size: int | None = Field(default=None, ge=512)
    format: ImageFormat = ImageFormat.QCOW2
    path: Path | None = None
    pool: PoolName | None = None
    source: Path | None = None
    source_format: ImageFormat | None = None
    preallocate: Preallocation = Preallocation.OFF

    @model_validator(mode="after")
    def _preallocation(self) -> Self:
        if self.source is not None and self.preallocate is not Preallocation.OFF:
            raise ValueError("only an empty volume can take its space when it is made, not a copy of a 'source'")
        return self

    @model_validator(mode="after")
    def _place(self) -> Self:
        if self.path is not None and self.pool is not None:
            raise ValueError("give 'pool' or 'path', not both")
        return self

    @model_validator(mode="after")
    def _size(self) -> Self:
        if self.size is None and self.source is None:
            raise ValueError("give 'size', or a 'source' to copy")
        return self


class VolumeRegister(Input):
    """An image that exists already becomes a volume, in place. `format` must be given for raw images."""

    name: Name
    path: Path
    format: ImageFormat | None = None


class InspectRequest(Input):
    path: Path


class TokenCreate(Input):
    name: Name
    role: Role = Role.VIEWER


class JoinRequest(Input):
    """`invitation` is the text that `hostler host invite` printed on the other host."""

    invitation: Annotated[str, StringConstraints(min_length=1, max_length=2048)]
