"""OVF descriptors (DMTF DSP0243, versions 0.9 to 2.1): read into a machine, and written for one.

What is read is what other products write: VMware, VirtualBox and oVirt disagree in namespaces and in little else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from hostler.foreign.errors import bad_description
from hostler.foreign.hyperv_config import clean_mac
from hostler.foreign.xml import Element, attribute, child, children, local, read_xml, text_of
from hostler.model.disk import Media
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignNic
from hostler.model.units import GiB, KiB, MiB, TiB
from hostler.model.vm import Firmware

_IDE, _SCSI, _ETHERNET, _FLOPPY, _CD, _DVD, _DISK, _SATA = "5", "6", "10", "14", "15", "16", "17", "20"
"""rasd:ResourceType (CIM_ResourceAllocationSettingData, DMTF). 20 is "other storage device": how VMware and
VirtualBox write a SATA controller."""
_PROCESSOR, _MEMORY = "3", "4"
_SILENT = frozenset({"23", "24", "35", "1", "32768"})
"""USB, graphics, sound, and "other" (VMware's own VMCI and the like)."""
_BUSES = {_IDE: ForeignBus.IDE, _SCSI: ForeignBus.SCSI, _SATA: ForeignBus.SATA}
_UNITS = {"kilobytes": KiB, "kb": KiB, "megabytes": MiB, "mb": MiB, "gigabytes": GiB, "gb": GiB, "tb": TiB}
_POWER = re.compile(r"byte\s*\*\s*(?:2\s*\^\s*(\d{1,2})|(\d{1,15}))")
MOST_DISKS = 1024


@dataclass(frozen=True, slots=True)
class OvfFile:
    """A file that the descriptor refers to. `size` in bytes, None where it is not said."""

    name: str
    size: int | None
    compressed: bool


@dataclass(frozen=True, slots=True)
class Ovf:
    """A machine, and the files it refers to: the disks' names are names of files."""

    machine: ForeignMachine
    files: tuple[OvfFile, ...]


def read_ovf(data: bytes, path: str, kind: ForeignKind = ForeignKind.OVF, fallback_name: str = "imported") -> Ovf:
    """The first machine of an envelope. InvalidInput when it is none, or has several machines."""
    root = read_xml(data, path)
    if local(root) != "Envelope":
        raise bad_description(path, f"is XML, but <{local(root)}> instead of an OVF's <Envelope>")
    systems = [e for e in root.iter() if local(e) == "VirtualSystem"]
    if len(systems) != 1:
        raise bad_description(
            path, f"describes {len(systems)} machines, where one is expected", "split it, for example with ovftool"
        )
    files = {f_id: file for f_id, file in _files(root)}
    capacities = dict(_capacities(root))
    return Ovf(_machine(systems[0], kind, files, capacities, fallback_name, path), tuple(files.values()))


def _files(root: Element) -> Iterator[tuple[str, OvfFile]]:
    for file in children(child(root, "References"), "File") if child(root, "References") is not None else []:
        size = attribute(file, "size") or ""
        compression = (attribute(file, "compression") or "").lower()
        yield (
            attribute(file, "id") or "",
            OvfFile(
                name=unquote(attribute(file, "href") or ""),
                size=int(size) if size.isdecimal() else None,
                compressed=compression not in ("", "identity"),
            ),
        )


def _capacities(root: Element) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """By disk id: the id of its file, and its size."""
    section = child(root, "DiskSection") if child(root, "DiskSection") is not None else child(root, "Section")
    for disk in children(section, "Disk") if section is not None else []:
        units = attribute(disk, "capacityAllocationUnits") or "byte"
        capacity = attribute(disk, "capacity") or ""
        size = int(capacity) * unit_of(units, 1) if capacity.isdecimal() else None
        yield attribute(disk, "diskId") or "", (attribute(disk, "fileRef") or "", size)


def unit_of(text: str, default: int) -> int:
    """Bytes of a unit as OVF writes it: "byte * 2^20", "MegaBytes"."""
    lower = text.strip().lower()
    if lower in _UNITS:
        return _UNITS[lower]
    found = _POWER.fullmatch(lower)
    if found is None:
        return 1 if lower in ("byte", "bytes") else default
    return 2 ** min(60, int(found[1])) if found[1] else int(found[2])


@dataclass(frozen=True, slots=True)
class _Item:
    """`<Item>`, `<StorageItem>` or `<EthernetPortItem>`: its fields by name."""

    fields: dict[str, str]
    hosts: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.fields.get("ResourceType", "")

    def number(self, name: str, default: int) -> int:
        text = self.fields.get(name, "")
        return int(text) if text.isdecimal() and len(text) < 16 else default


def _items(system: Element) -> list[_Item]:
    found = []
    for section in system:
        if local(section) not in ("VirtualHardwareSection", "Section"):
            continue
        for item in section:
            if local(item) in ("Item", "StorageItem", "EthernetPortItem"):
                fields = {local(field): text_of(field) for field in item}
                hosts = tuple(text_of(field) for field in children(item, "HostResource"))
                found.append(_Item(fields, hosts))
    return found


def _machine(
    system: Element,
    kind: ForeignKind,
    files: dict[str, OvfFile],
    disks: dict[str, tuple[str, int | None]],
    fallback_name: str,
    path: str,
) -> ForeignMachine:
    items = _items(system)
    controllers = {i.fields.get("InstanceID", ""): i for i in items if i.type in _BUSES}
    memory = next((i for i in items if i.type == _MEMORY), None)
    unit = unit_of(memory.fields.get("AllocationUnits", ""), MiB) if memory else MiB
    drives = [i for i in items if i.type in (_DISK, _CD, _DVD, _FLOPPY)]
    if len(drives) > MOST_DISKS:
        raise bad_description(path, f"has {len(drives)} drives; more than {MOST_DISKS} are not read")
    product = child(child(system, "ProductSection"), "Product")
    guest = child(child(system, "OperatingSystemSection"), "Description")
    firmware, secure = _firmware(system)
    return ForeignMachine(
        kind=kind,
        name=text_of(child(system, "Name")) or text_of(product) or attribute(system, "id") or fallback_name,
        id=attribute(system, "id") or "",
        vcpus=max(1, sum(i.number("VirtualQuantity", 0) for i in items if i.type == _PROCESSOR)),
        memory=memory.number("VirtualQuantity", 0) * unit if memory else 0,
        firmware=firmware,
        secure_boot=secure,
        notes=text_of(child(child(system, "AnnotationSection"), "Annotation"))[:16_384],
        scsi_controllers=sum(i.type == _SCSI for i in items),
        disks=tuple(_drive(d, controllers, files, disks) for d in drives),
        nics=tuple(_nic(i) for i in items if i.type == _ETHERNET),
        guest_system=text_of(guest),
        not_understood=tuple(_strange(items)),
    )


def _firmware(system: Element) -> tuple[Firmware, bool]:
    """VMware's `<vmw:Config vmw:key="firmware" vmw:value="efi"/>`; the standard has no word for it before 2.1, whose
    own is ours too: hostler writes it as VMware does."""
    config = {
        (attribute(e, "key") or "").lower(): (attribute(e, "value") or "").lower()
        for e in system.iter()
        if local(e) == "Config"
    }
    uefi = config.get("firmware") == "efi"
    return (Firmware.UEFI if uefi else Firmware.BIOS), uefi and config.get("bootoptions.efisecurebootenabled") == "true"


def _drive(
    item: _Item,
    controllers: dict[str, _Item],
    files: dict[str, OvfFile],
    disks: dict[str, tuple[str, int | None]],
) -> ForeignDisk:
    parent = controllers.get(item.fields.get("Parent", ""))
    bus = _BUSES[parent.type] if parent else ForeignBus.FLOPPY if item.type == _FLOPPY else ForeignBus.IDE
    same = [c for c in controllers.values() if parent is not None and c.type == parent.type]
    order = sorted(same, key=lambda c: (c.number("Address", 0), c.number("InstanceID", 0)))
    name, size = _backing(item.hosts[0] if item.hosts else "", files, disks)
    return ForeignDisk(
        bus=bus,
        controller=order.index(parent) if parent is not None else 0,
        unit=item.number("AddressOnParent", 0),
        media={_CD: Media.CDROM, _DVD: Media.CDROM, _FLOPPY: Media.FLOPPY}.get(item.type, Media.DISK),
        name=name,
        size=size,
    )


def _backing(host: str, files: dict[str, OvfFile], disks: dict[str, tuple[str, int | None]]) -> tuple[str, int | None]:
    """Name and size behind "ovf:/disk/ID" or "ovf:/file/ID"."""
    _, _, rest = host.partition(":")
    kind, _, ref = rest.strip("/").partition("/")
    size = None
    if kind == "disk":
        ref, size = disks.get(ref, ("", None))
    file = files.get(ref)
    return (file.name if file else ""), size


def _nic(item: _Item) -> ForeignNic:
    mac = clean_mac(item.fields.get("Address", "") or item.fields.get("MACAddress", ""))
    return ForeignNic(
        name=item.fields.get("ElementName", ""),
        mac=mac,
        static=mac is not None,
        network=item.fields.get("Connection", ""),
        legacy=item.fields.get("ResourceSubType", "").lower() in ("e1000", "e1000e", "pcnet32", "rtl8139"),
    )


def _strange(items: Sequence[_Item]) -> Iterator[str]:
    known = {_PROCESSOR, _MEMORY, _DISK, _CD, _DVD, _FLOPPY, _ETHERNET, *_BUSES, *_SILENT}
    for item in items:
        if item.type not in known:
            name = item.fields.get("ElementName", "") or item.fields.get("Description", "")
            yield f"item of resource type {item.type or '(none)'}: {name}"[:200]
