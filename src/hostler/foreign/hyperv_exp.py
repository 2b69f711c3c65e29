"""What an export of Hyper-V 2008 and 2008 R2 writes (`Virtual Machines/GUID.exp`): instances of WMI classes as XML.

The form is the DMTF's CIM-XML: `<INSTANCE CLASSNAME=...>` with `<PROPERTY>`, `<PROPERTY.ARRAY>` and `<VALUE>`. The
classes and numbers of `root\\virtualization` are those of Microsoft's documentation of that namespace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hostler.foreign.errors import bad_description
from hostler.foreign.hyperv_config import clean_mac
from hostler.foreign.xml import Element, attribute, child, children, local, read_xml, text_of
from hostler.model.disk import Media
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignNic, ForeignSnapshot
from hostler.model.units import MiB

_ROLES = (
    ("synthetic disk drive", "disk"),
    ("physical disk drive", "disk"),
    ("dvd drive", "cd"),
    ("diskette drive", "floppy"),
    ("virtual hard disk", "image"),
    ("virtual cd/dvd disk", "image"),
    ("virtual floppy disk", "image"),
    ("ide controller", "ide"),
    ("scsi controller", "scsi"),
    ("ethernet port", "nic"),
    ("serial port", "serial"),
)
"""By a part of the ResourceSubType ("Microsoft Synthetic Disk Drive")."""
_BY_NUMBER = {5: "ide", 6: "scsi", 10: "nic", 14: "floppy", 15: "cd", 16: "cd", 17: "serial", 21: "image", 22: "disk"}
"""By CIM_ResourceAllocationSettingData.ResourceType (DMTF), where there is no subtype we know."""
_COMMON = frozenset({3, 4, 13, 20, 24})
"""Processor, memory, input devices, graphics: part of every machine."""
_BOOT = {"0": "Floppy", "1": "CD", "2": "IDE", "3": "PXE"}
"""Msvm_VirtualSystemSettingData.BootOrder."""
_GUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
MOST_NOT_UNDERSTOOD = 500


@dataclass(frozen=True, slots=True)
class _Instance:
    """`values` by name of property in lower case."""

    kind: str
    values: dict[str, tuple[str, ...]]

    def one(self, name: str) -> str:
        """The first value, "" where there is none."""
        found = self.values.get(name.lower(), ())
        return found[0] if found else ""

    def number(self, name: str, default: int = 0) -> int:
        """The same as a whole number."""
        text = self.one(name)
        return int(text) if text.isdecimal() else default

    @property
    def id(self) -> str:
        """The InstanceID without the machine's part, in lower case: what a Parent refers to."""
        return self.one("InstanceID").lower()


def is_exp(data: bytes) -> bool:
    """Whether this is the beginning of such a file."""
    head = data[:65_536].replace(b"\0", b"")
    return b"<INSTANCE" in head or b"<DECLARATION" in head or b"<CIM " in head


def read_exp(data: bytes, path: str, fallback_name: str) -> ForeignMachine:
    """The machine. InvalidInput when it is no such file or names no machine."""
    root = read_xml(data, path, bare_doctype=True)
    instances = [_instance(element) for element in root.iter() if local(element) == "INSTANCE"]
    settings = [i for i in instances if i.kind == "Msvm_VirtualSystemSettingData"]
    if not settings:
        raise bad_description(path, "has no instance of Msvm_VirtualSystemSettingData, so it describes no VM")
    snapshots = [s for s in settings if s.number("SettingType", 3) == 5]
    now = next((s for s in settings if s not in snapshots), settings[0])
    owner = _owner(now)
    mine = [i for i in instances if _owner(i) == owner]
    memory = next((i for i in mine if i.kind == "Msvm_MemorySettingData"), None)
    processor = next((i for i in mine if i.kind == "Msvm_ProcessorSettingData"), None)
    whole = next((i for i in instances if i.kind == "Msvm_VirtualSystemGlobalSettingData"), None)
    return ForeignMachine(
        kind=ForeignKind.HYPER_V_EXP,
        name=(whole and whole.one("ElementName")) or now.one("ElementName") or fallback_name,
        id=owner,
        vcpus=max(1, processor.number("VirtualQuantity", 1) if processor else 1),
        memory=(memory.number("VirtualQuantity") if memory else 0) * MiB,
        generation=1,
        boot_order=tuple(_BOOT.get(word, word) for word in now.values.get("bootorder", ())),
        notes=now.one("Notes")[:16_384],
        scsi_controllers=len(_controllers(mine, "scsi")),
        disks=tuple(_disks(mine)),
        nics=tuple(_nics(instances, mine)),
        com_ports=tuple(i.one("Connection") for i in mine if _role(i) == "serial"),
        integration=tuple(_integration(mine)),
        starts_with_host=whole is not None and whole.number("AutomaticStartupAction") == 2,
        snapshots=tuple(_snapshots(instances, snapshots)),
        not_understood=tuple(_strange(mine))[:MOST_NOT_UNDERSTOOD],
    )


def _instance(element: Element) -> _Instance:
    values: dict[str, tuple[str, ...]] = {}
    for item in element:
        name = (attribute(item, "NAME") or "").lower()
        if local(item) == "PROPERTY.ARRAY":
            array = child(item, "VALUE.ARRAY")
            values[name] = tuple(text_of(v) for v in children(array, "VALUE")) if array is not None else ()
        elif local(item) in ("PROPERTY", "PROPERTY.REFERENCE"):
            found = next((v for v in item.iter() if local(v) == "VALUE" and v.text), None)
            values[name] = (text_of(found),) if found is not None else ()
    return _Instance(attribute(element, "CLASSNAME") or "", values)


def _owner(instance: _Instance) -> str:
    """The GUID of the VM or snapshot it belongs to: the first one of "Microsoft:GUID\\..."."""
    found = _GUID.search(instance.one("InstanceID"))
    return found[0].lower() if found else ""


def _role(instance: _Instance) -> str:
    """What a resource is: "disk", "nic", ...; "" for what we have no word for."""
    subtype = instance.one("ResourceSubType").lower()
    found = next((role for part, role in _ROLES if part in subtype), None)
    return found or _BY_NUMBER.get(instance.number("ResourceType", -1), "")


def _controllers(mine: Sequence[_Instance], role: str) -> list[_Instance]:
    found = [i for i in mine if _role(i) == role]
    return sorted(found, key=lambda i: (i.number("Address", 99), i.id))


def _reference(text: str) -> str:
    """The InstanceID inside a path like \\\\HOST\\root\\virtualization:Class.InstanceID="Microsoft:...\\\\0"."""
    _, _, rest = text.partition('InstanceID="')
    return (rest.rstrip('"') if rest else text).replace("\\\\", "\\").lower()


def _disks(mine: Sequence[_Instance]) -> Iterator[ForeignDisk]:
    """Controller, drive and image are instances of their own; each names its parent."""
    places: dict[str, tuple[ForeignBus, int]] = {}
    for bus in (ForeignBus.IDE, ForeignBus.SCSI):
        for index, controller in enumerate(_controllers(mine, str(bus))):
            places[_reference(controller.id)] = (bus, index)
    images = {_reference(i.one("Parent")): i for i in mine if _role(i) == "image"}
    for drive in mine:
        role = _role(drive)
        if role in ("disk", "cd") or (role == "floppy" and _reference(drive.id) in images):
            yield _disk(drive, role, images.get(_reference(drive.id)), places.get(_reference(drive.one("Parent"))))


def _disk(drive: _Instance, role: str, image: _Instance | None, place: tuple[ForeignBus, int] | None) -> ForeignDisk:
    bus, controller = place or (ForeignBus.FLOPPY if role == "floppy" else ForeignBus.IDE, 0)
    name = image.one("Connection") if image is not None else drive.one("HostResource")
    return ForeignDisk(
        bus=bus,
        controller=controller,
        unit=drive.number("Address"),
        media={"cd": Media.CDROM, "floppy": Media.FLOPPY}.get(role, Media.DISK),
        name=name,
        physical=image is None and bool(name),
    )


def _nics(instances: Sequence[_Instance], mine: Sequence[_Instance]) -> Iterator[ForeignNic]:
    """In the order of the file. The port of a switch that an adapter is connected to is named by its Connection."""
    names = {i.one("Name").lower(): i.one("ElementName") for i in instances if i.kind == "Msvm_VirtualSwitch"}
    for nic in mine:
        if _role(nic) != "nic":
            continue
        connection = nic.one("Connection")
        switch = next((name for guid, name in names.items() if guid and guid in connection.lower()), "")
        yield ForeignNic(
            name=nic.one("ElementName"),
            mac=clean_mac(nic.one("Address")),
            static=nic.one("StaticMacAddress").lower() == "true",
            network=switch or connection,
            legacy=nic.kind == "Msvm_EmulatedEthernetPortSettingData",
        )


def _integration(mine: Sequence[_Instance]) -> Iterator[str]:
    known = {
        "Msvm_HeartbeatComponentSettingData": "heartbeat",
        "Msvm_ShutdownComponentSettingData": "shutdown",
        "Msvm_KvpExchangeComponentSettingData": "key-value exchange",
        "Msvm_TimeSyncComponentSettingData": "time synchronization",
        "Msvm_VssComponentSettingData": "backup (VSS)",
    }
    for instance in mine:
        if instance.kind in known and instance.number("EnabledState", 2) == 2:
            yield known[instance.kind]


def _snapshots(instances: Sequence[_Instance], settings: Sequence[_Instance]) -> Iterator[ForeignSnapshot]:
    ids = {_owner(s) for s in settings}
    for setting in settings:
        owner = _owner(setting)
        parent = _GUID.search(setting.one("Parent").partition("InstanceID")[2] or setting.one("Parent"))
        above = parent[0].lower() if parent else ""
        yield ForeignSnapshot(
            id=owner,
            name=setting.one("ElementName") or owner,
            parent=above if above in ids and above != owner else None,
            notes=setting.one("Notes")[:16_384],
            disks=tuple(_disks([i for i in instances if _owner(i) == owner])),
        )


def _strange(mine: Sequence[_Instance]) -> Iterator[str]:
    for instance in mine:
        kind = instance.number("ResourceType", -1)
        if kind >= 0 and not _role(instance) and kind not in _COMMON and "Component" not in instance.kind:
            what = instance.one("ResourceSubType") or instance.one("ElementName")
            yield f"{instance.kind} (resource type {kind}): {what}"
