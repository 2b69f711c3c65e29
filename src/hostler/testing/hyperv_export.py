"""Exports of Hyper-V as the real ones look, made for tests: the configuration as XML (UTF-16, typed leaves, sections
named by GUIDs), the same as a binary .vmcx, and the .exp of 2008.

The trees follow what configurations of 2012 R2 and 2019 have; everything a test needs to vary is a parameter.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from hostler.foreign.hyperv_config import BIOS, FLOPPY, IDE, INTEGRATION, SCSI, SERIAL, SYNTHETIC_NIC

Leaf = str | int | bool | bytes
Tree = list[tuple[str, "Leaf | Tree"]]

VM_ID = "0aa394fa-7c4a-4070-ba32-773d43b28a68"
LEGACY_NIC = "4b6be9c7-2ae8-4a0c-93a6-1f4b6b7f0f2b"
KEYBOARD = "197f74e3-b84b-46de-8ae6-82f1cd181cdc"


@dataclass(frozen=True)
class Drive:
    """A drive of Hyper-V. `kind`: VHD, ISO, VFD, NONE, or something of another version."""

    path: str = ""
    kind: str = "VHD"


@dataclass(frozen=True)
class Adapter:
    """A network adapter; its MAC as Hyper-V writes it."""

    mac: str = "00-15-5D-01-07-DC"
    switch: str = "Virtual External Switch"
    static: bool = False
    legacy: bool = False


@dataclass(frozen=True)
class Machine:
    """What a configuration says. `ide`: by (controller, unit); `scsi`: for each controller the drives by number."""

    name: str = "web01"
    memory: int = 512
    """MiB."""
    processors: int = 2
    generation: int = 1
    ide: dict[tuple[int, int], Drive] = field(default_factory=dict)
    scsi: Sequence[dict[int, Drive]] = ({},)
    floppy: str = ""
    nics: Sequence[Adapter] = (Adapter(),)
    notes: str = ""
    com1: str = ""
    dynamic: bool = False
    autostart: bool = False
    saved: bool = False
    parent: str = ""
    extra: Tree = field(default_factory=list)


def _drive(drive: Drive | None) -> Tree:
    return [("pathname", drive.path if drive else ""), ("type", drive.kind if drive else "NONE")]


def tree(machine: Machine) -> Tree:
    """The configuration's sections and leaves."""
    devices: Tree = []
    manifest: list[tuple[str, str, str]] = [(KEYBOARD, KEYBOARD, "Microsoft Synthetic Keyboard")]
    for guid, name in INTEGRATION.items():
        devices.append((f"_{guid}_", [("VDEVVersion", 256)]))
        manifest.append((guid, guid, f"Microsoft {name}"))
    devices.append((f"_{IDE}_", [("VDEVVersion", 1280), *_ide(machine)]))
    floppy = _drive(Drive(machine.floppy, "VFD"))
    devices.append((f"_{FLOPPY}_", [("VDEVVersion", 256), ("controller0", [("drive0", floppy)])]))
    ports: Tree = [(f"port{n}", [("connection", machine.com1 if n == 0 else "")]) for n in (0, 1)]
    devices.append((f"_{SERIAL}_", [("VDEVVersion", 512), *ports]))
    devices.append((f"_{BIOS}_", _bios(machine)))
    for number, adapter in enumerate(machine.nics):
        guid = f"55225880-49c0-4438-9ce2-5a01402fd8{number:02x}"
        devices.append((f"_{guid}_", _adapter(adapter)))
        kind = LEGACY_NIC if adapter.legacy else SYNTHETIC_NIC
        manifest.append((kind, guid, "Emulated Ethernet Port" if adapter.legacy else "Synthetic Ethernet Port"))
    for number, drives in enumerate(machine.scsi):
        guid = f"d7a36e9b-9256-4f0d-be2c-3a13887f7b{number:02x}"
        body: Tree = [(f"drive{n}", _drive(d)) for n, d in drives.items()]
        devices.append((f"_{guid}_", [("VDEVVersion", 256), *([("controller0", body)] if body else [])]))
        manifest.append((SCSI, guid, "Synthetic SCSI Controller"))
    return [*devices, *_settings(machine, manifest), *machine.extra]


def _ide(machine: Machine) -> Tree:
    drives = machine.ide
    return [(f"controller{c}", [(f"drive{u}", _drive(drives.get((c, u)))) for u in (0, 1)]) for c in (0, 1)]


def _bios(machine: Machine) -> Tree:
    order = ("Optical", "HardDrive", "Network", "Floppy")
    boot: Tree = [(f"device{n}", word) for n, word in enumerate(order)]
    return [
        ("VDEVVersion", 512),
        ("bios_guid", "{7FFEE066-9755-4950-9A16-4C94AC67AD00}"),
        ("boot", boot),
        ("num_lock", False),
        ("secure_boot_enabled", machine.generation == 2),
    ]


def _adapter(adapter: Adapter) -> Tree:
    return [
        ("ChannelInstanceGuid", "{b57a8519-55d4-47aa-be66-018ecb6260ff}"),
        ("Connection", [("AltPortName", "Dynamic Ethernet Switch Port"), ("AltSwitchName", adapter.switch)]),
        ("FriendlyName", "Network Adapter"),
        ("IsConnected", bool(adapter.switch)),
        ("MacAddress", adapter.mac),
        ("MacAddressIsStatic", adapter.static),
        ("SwitchName", "438B7B13-6180-4155-B7BF-08709CCF234D"),
        ("VDEVVersion", 256),
    ]


def _settings(machine: Machine, manifest: Sequence[tuple[str, str, str]]) -> Tree:
    entries: Tree = [
        (f"vdev{n:03}", [("device", device), ("flags", 1), ("instance", instance.upper()), ("name", name)])
        for n, (device, instance, name) in enumerate(manifest, 1)
    ]
    start: Tree = [("host_startup", [("action", 2 if machine.autostart else 1)]), ("host_shutdown", [("action", 1)])]
    properties: Tree = [
        ("creation_time", struct.pack(">Q", 130_599_959_406_707_888)),
        ("global_id", VM_ID.upper()),
        ("name", machine.name),
        ("notes", machine.notes),
        ("subtype", machine.generation - 1),
        ("type_id", "Virtual Machines"),
        ("version", 1280),
    ]
    properties += [("parent_snapshot", machine.parent)] if machine.parent else []
    bank: Tree = [("dynamic_memory_enabled", machine.dynamic), ("limit", 1_048_576), ("size", machine.memory)]
    saved: Tree = [("savedstate", [("memlocation", "D:\\VM\\a.bin"), ("type", 1)])] if machine.saved else []
    return [
        ("global_settings", [("power", start), ("snapshots", [("list", [("size", 0)])])]),
        ("manifest", [("size", len(entries)), *entries, ("version", 260)]),
        ("properties", properties),
        *saved,
        (
            "settings",
            [("memory", [("bank", bank)]), ("processors", [("count", machine.processors), ("limit", 100_000)])],
        ),
    ]


# as XML


def xml(machine: Machine) -> bytes:
    """The configuration as Hyper-V writes it: UTF-16 with a byte order mark, DOS line ends."""
    lines = ['<?xml version="1.0" encoding="UTF-16" standalone="yes"?>', "<configuration>"]
    _lines(tree(machine), 1, lines)
    return ("\r\n".join([*lines, "</configuration>", ""])).encode("utf-16")


def _lines(branch: Tree, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for name, value in branch:
        if isinstance(value, list):
            lines.append(f"{pad}<{name}>")
            _lines(value, depth + 1, lines)
            lines.append(f"{pad}</{name}>")
        else:
            kind, text = _typed(value)
            lines.append(f'{pad}<{name} type="{kind}">{escape(text)}</{name}>')


def _typed(value: Leaf) -> tuple[str, str]:
    if isinstance(value, bool):
        return "bool", "True" if value else "False"
    if isinstance(value, int):
        return "integer", str(value)
    if isinstance(value, bytes):
        return "bytes", base64.b64encode(value).decode()
    return "string", value


# as .vmcx

_ALIGN = 0x1000
_KEYS_AT = 0x4000
_BIG = 0x800
"""Bytes from which on a value is kept outside its table."""


class _Vmcx:
    """Key tables of at most 64 KiB; sections in table 1, so that parents and children are in different tables."""

    def __init__(self) -> None:
        self.tables: dict[int, bytearray] = {1: bytearray(struct.pack("<HHHI", 2, 1, 3, 0))}
        self.tables[2] = bytearray(struct.pack("<HHHI", 2, 2, 1, 0))
        self.objects: list[bytes] = []
        self._order = 0

    def add(self, branch: Tree, parent: tuple[int, int]) -> None:
        for name, value in branch:
            if isinstance(value, list):
                self.add(value, self._entry(1, 9, name, bytes(12), parent))
            else:
                self._leaf(name, value, parent)

    def _leaf(self, name: str, value: Leaf, parent: tuple[int, int]) -> None:
        if isinstance(value, bool):
            self._entry(2, 8, name, struct.pack("<I", value), parent)
        elif isinstance(value, int):
            self._entry(2, 3, name, struct.pack("<q", value), parent)
        else:
            kind, data = (7, value) if isinstance(value, bytes) else (6, value.encode("utf-16-le"))
            if len(data) >= _BIG:
                self.objects.append(data)
                self._entry(2, kind | 0x100, name, struct.pack("<IQ", len(data), len(self.objects) - 1), parent)
            else:
                self._entry(2, kind, name, struct.pack("<I", len(data)) + data, parent)

    def _entry(self, table: int, kind: int, name: str, data: bytes, parent: tuple[int, int]) -> tuple[int, int]:
        self._order += 1
        label = name.encode() + b"\0"
        content = self.tables[table]
        at = len(content)
        size = 21 + len(label) + len(data)
        content += struct.pack("<HIHIIIB", kind, size, *parent, 0, self._order, len(label)) + label + data
        return table, at


def vmcx(machine: Machine, dirty: bool = False) -> bytes:
    """The same configuration in the binary store. `dirty`: with a log that was not written into the tables."""
    store = _Vmcx()
    store.add([("configuration", tree(machine))], (0, 0))
    ends = {index: bytes(content) + bytes(21) for index, content in store.tables.items()}
    at = _KEYS_AT
    rows: list[tuple[int, int, int]] = []
    places: list[tuple[int, bytes]] = []
    offsets: list[int] = []
    for kind, made in [*((3, o) for o in store.objects), *((2, c) for c in ends.values())]:
        content = _point(made, offsets) if kind == 2 else made
        rows.append((kind, at, len(content)))
        offsets += [at] if kind == 3 else []
        places.append((at, content))
        at += -(-len(content) // _ALIGN) * _ALIGN
    file = bytearray(at)
    header = struct.pack("<IIHIQIQQI", 0x01282014, 0, 5, 0x400, 0, _ALIGN, 0x3000, _ALIGN, 0x1000)
    file[0 : len(header)] = header
    stale = struct.pack("<IIHIQIQQI", 0x01282014, 0, 4, 0x400, 0, _ALIGN, 0x3000, _ALIGN, 0x1000)
    file[0x1000 : 0x1000 + len(stale)] = stale
    objects = struct.pack("<II", 0x01110001, len(rows) + 1)
    objects += b"".join(struct.pack("<BIQIB", kind, 0, offset, size, 1) for kind, offset, size in rows)
    objects += struct.pack("<BIQIB", 2, 0, 2**40, 64, 0)  # free: its place says nothing
    file[0x2000 : 0x2000 + len(objects)] = objects
    file[0x3000:0x300C] = struct.pack("<III", 0x01110003, 0, int(dirty))
    for offset, content in places:
        file[offset : offset + len(content)] = content
    return bytes(file)


def _point(table: bytes, offsets: Sequence[int]) -> bytes:
    """Numbers of file objects become their places."""
    content = bytearray(table)
    at = 10
    while at + 21 <= len(content):
        kind, size, *_, data_at = struct.unpack_from("<HIHIIIB", content, at)
        if size == 0:
            break
        if kind & 0x100:
            place = at + 21 + data_at
            length, number = struct.unpack_from("<IQ", content, place)
            struct.pack_into("<IQ", content, place, length, offsets[number])
        at += size
    return bytes(content)


# as .exp


def exp(name: str, ide: dict[tuple[int, int], str], mac: str = "00155D010203", doctype: bool = True) -> bytes:
    """The description of an export of 2008: instances of `root\\virtualization` as CIM-XML in UTF-16. `ide`: images by
    (controller, unit)."""
    root = f"Microsoft:{VM_ID.upper()}"
    parts = [
        _instance("Msvm_VirtualSystemGlobalSettingData", InstanceID=root, ElementName=name, AutomaticStartupAction="2"),
        _instance(
            "Msvm_VirtualSystemSettingData",
            InstanceID=root,
            ElementName=name,
            SettingType="3",
            BootOrder=["1", "2", "3", "0"],
            Notes="from 2008",
        ),
        _instance("Msvm_ProcessorSettingData", InstanceID=f"{root}\\b637f346", ResourceType="3", VirtualQuantity="2"),
        _instance("Msvm_MemorySettingData", InstanceID=f"{root}\\4764334d", ResourceType="4", VirtualQuantity="512"),
    ]
    for controller in (0, 1):
        parts.append(
            _resource(f"{root}\\{IDE.upper()}\\{controller}", 5, "Microsoft Emulated IDE Controller", controller)
        )
    for (controller, unit), path in ide.items():
        above = f"{root}\\{IDE.upper()}\\{controller}"
        drive = f"{above}\\{unit}\\D"
        iso = path.lower().endswith(".iso")
        kind, image = ("DVD Drive", "CD/DVD Disk") if iso else ("Disk Drive", "Hard Disk")
        parts.append(_resource(drive, 16 if iso else 22, f"Microsoft Synthetic {kind}", unit, above))
        parts.append(_resource(f"{above}\\{unit}\\L", 21, f"Microsoft Virtual {image}", unit, drive, path))
    parts.append(
        _instance(
            "Msvm_SyntheticEthernetPortSettingData",
            InstanceID=f"{root}\\9B5D1F39-5A50-4B5A-9A10-0A11B4EB22C7",
            ElementName="Network Adapter",
            ResourceType="10",
            ResourceSubType="Microsoft Synthetic Ethernet Port",
            Address=mac,
            StaticMacAddress="FALSE",
            Connection=["LAN"],
        )
    )
    parts.append(_resource(f"{root}\\99\\0", 33, "Microsoft Fibre Thing", 0))
    head = '<!DOCTYPE CIM SYSTEM "http://www.dmtf.org/cim/mof.dtd/2.0">' if doctype else ""
    body = "".join(f"<VALUE.OBJECT>{part}</VALUE.OBJECT>" for part in parts)
    text = (
        f'<?xml version="1.0" encoding="unicode"?>{head}<CIM CIMVERSION="2.0" DTDVERSION="2.0"><DECLARATION><DECLGROUP>'
    )
    return f"{text}{body}</DECLGROUP></DECLARATION></CIM>".encode("utf-16")


def _resource(id: str, kind: int, subtype: str, address: int, parent: str = "", path: str = "") -> str:
    doubled = parent.replace("\\", "\\\\")
    above = (
        f'\\\\HOST\\root\\virtualization:Msvm_ResourceAllocationSettingData.InstanceID="{doubled}"' if parent else ""
    )
    return _instance(
        "Msvm_ResourceAllocationSettingData",
        InstanceID=id,
        ResourceType=str(kind),
        ResourceSubType=subtype,
        Address=str(address),
        Parent=above,
        Connection=[path] if path else [],
    )


def _instance(kind: str, **values: str | list[str]) -> str:
    parts = []
    for name, value in values.items():
        if isinstance(value, list):
            inner = "".join(f"<VALUE>{escape(v)}</VALUE>" for v in value)
            parts.append(
                f'<PROPERTY.ARRAY NAME="{name}" TYPE="string"><VALUE.ARRAY>{inner}</VALUE.ARRAY></PROPERTY.ARRAY>'
            )
        else:
            parts.append(f'<PROPERTY NAME="{name}" TYPE="string"><VALUE>{escape(value)}</VALUE></PROPERTY>')
    return f'<INSTANCE CLASSNAME="{kind}">{"".join(parts)}</INSTANCE>'
