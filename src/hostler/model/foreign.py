"""Machines described by others: what Hyper-V, an OVF or an exported folder says a VM is, before it becomes one here.

A description is read into a `ForeignMachine`, in the words of nobody in particular; what becomes of it here is told by
`Remark`s, and both, with what was found of its disks, are an `ImportReport`.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from hostler.model.base import Record
from hostler.model.disk import Bus, ImageFormat, Media
from hostler.model.vm import Firmware


class ForeignKind(StrEnum):
    """In what form a machine was described."""

    HYPER_V_XML = "hyper-v-xml"
    """Hyper-V 2008 to 2012 R2: the configuration file of a VM, alone or in an exported folder."""
    HYPER_V_EXP = "hyper-v-exp"
    """Hyper-V 2008 and 2008 R2: the description that an export writes, instances of WMI classes as XML."""
    HYPER_V_VMCX = "hyper-v-vmcx"
    """Hyper-V 2016 and later: the same keys as in the XML, in a binary store."""
    OVF = "ovf"
    OVA = "ova"
    HOSTLER = "hostler"
    """A folder that this program has exported."""
    IMAGE = "image"
    """A disk image alone; the machine around it is made up."""


class ForeignBus(StrEnum):
    """What a drive was plugged into there."""

    IDE = "ide"
    SCSI = "scsi"
    SATA = "sata"
    FLOPPY = "floppy"


class ForeignDisk(Record):
    """A drive. `name` is the path or name of its image as the description has it ("D:\\VM\\a.vhd"), empty where nothing
    is inserted; `physical` a disk of that host passed through. `size` in bytes, None where it is not said."""

    bus: ForeignBus
    controller: int = Field(ge=0)
    unit: int = Field(ge=0)
    media: Media = Media.DISK
    name: str = ""
    physical: bool = False
    size: int | None = Field(default=None, ge=0)
    format: ImageFormat | None = None
    """The format where the description says it for certain (only our own does)."""

    @property
    def place(self) -> str:
        """Where it was, for people."""
        return f"{self.bus} {self.controller}:{self.unit}"


class ForeignNic(Record):
    """An adapter. `mac` in lower case with colons, None where it has none yet. `network` is the name of what it was
    connected to, empty for nothing; `legacy` an emulated one, which needs no driver of the hypervisor's."""

    name: str = ""
    mac: str | None = None
    static: bool = True
    network: str = ""
    legacy: bool = False


class ForeignSnapshot(Record):
    """A past state. `parent` is another one's id. Its disks name the images as they were then."""

    id: str
    name: str
    parent: str | None = None
    notes: str = ""
    disks: tuple[ForeignDisk, ...] = ()
    saved_state: bool = False


class ForeignMachine(Record):
    """What a description says. Memory in bytes. `generation` is Hyper-V's (1: BIOS, 2: UEFI), None elsewhere.
    `boot_order` in that description's words; `not_understood` has what was read and means nothing to us, verbatim."""

    kind: ForeignKind
    version: str = ""
    name: str
    id: str = ""
    vcpus: int = Field(default=1, ge=1)
    memory: int = Field(default=1024**3, ge=0)
    memory_maximum: int | None = None
    """Set where the memory was dynamic; `memory` is what it started with."""
    generation: int | None = None
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    boot_order: tuple[str, ...] = ()
    notes: str = ""
    scsi_controllers: int = Field(default=0, ge=0)
    disks: tuple[ForeignDisk, ...] = ()
    nics: tuple[ForeignNic, ...] = ()
    com_ports: tuple[str, ...] = ()
    """What its serial ports were connected to, empty for nothing."""
    integration: tuple[str, ...] = ()
    """Services that the hypervisor offered to the guest."""
    starts_with_host: bool = False
    snapshots: tuple[ForeignSnapshot, ...] = ()
    saved_state: bool = False
    guest_system: str = ""
    """The operating system, where it is said."""
    not_understood: tuple[str, ...] = ()


class RemarkKind(StrEnum):
    """What a remark is about, in the order in which people want to read them."""

    BLOCKER = "blocker"
    """The import does not begin before this is settled."""
    GUEST = "guest"
    """The guest needs something."""
    LOST = "lost"
    """Something it had there, it has not here."""
    CHANGED = "changed"
    KEPT = "kept"


class Remark(Record):
    """One thing to know about an import. `subject` is what it is about ("network adapter 1"); `advice` what to do."""

    kind: RemarkKind
    subject: str
    text: str
    advice: str = ""


class DiskFate(StrEnum):
    """What an import does with a drive."""

    COPY = "copy"
    """Its image is copied, converted where the format asks for it."""
    REGISTER = "register"
    """Its image becomes a volume where it is."""
    FLATTEN = "flatten"
    """Its chain of differencing images becomes one new image."""
    ATTACH = "attach"
    """It is read-only media, attached where it is."""
    LEAVE = "leave"
    """It is left out."""


class ImportDisk(Record):
    """A drive of the report. `path`: the image that was found, None if none was. `size`, `allocated` in bytes.
    `chain`: the images below a differencing one, nearest first. `target_*`: where it is plugged in here."""

    name: str
    place: str
    media: Media = Media.DISK
    path: str | None = None
    format: ImageFormat | None = None
    source_format: str = ""
    """As `format`, in words, also for formats that only can be read ("vmdk")."""
    size: int = 0
    allocated: int = 0
    chain: tuple[str, ...] = ()
    fate: DiskFate = DiskFate.LEAVE
    volume: str = ""
    """Name of the volume it becomes."""
    target_format: ImageFormat | None = None
    target_bus: Bus | None = None
    target_controller: int = 0
    target_unit: int = 0
    offset: int = 0
    """Where it begins in `path`, in bytes: not 0 inside an OVA."""
    length: int = 0
    """How many bytes of the file it has (VMDK only)."""
    problem: str = ""


class ImportReport(Record):
    """Everything an import would do, before it does anything. `space_needed` and `space_free` in bytes, of the
    directory that new volumes go to (`space_needed` is an upper bound: what is written may be sparse)."""

    path: str
    description: str
    """The file that describes the machine."""
    machine: ForeignMachine
    name: str
    """What it would be called here."""
    disks: tuple[ImportDisk, ...] = ()
    remarks: tuple[Remark, ...] = ()
    space_needed: int = 0
    space_free: int = 0

    @property
    def possible(self) -> bool:
        """Whether nothing stands in the way."""
        return all(remark.kind is not RemarkKind.BLOCKER for remark in self.remarks)
