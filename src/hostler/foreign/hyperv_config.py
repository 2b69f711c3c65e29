"""A machine out of the sections of Hyper-V's configuration, whether these came from XML or from a .vmcx.

Every device is a section named by a GUID, `_GUID_`; the manifest says what each is. The GUIDs of device types are
Hyper-V's own and the same in all its versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hostler.foreign.sections import Section, Value
from hostler.model.disk import Media
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignNic, ForeignSnapshot
from hostler.model.units import MiB
from hostler.model.vm import Firmware

IDE = "83f8638b-8dca-4152-9eda-2ca8b33039b4"
SCSI = "d422512d-2bf2-4752-809d-7b82b5fcb1b4"
FLOPPY = "8f0d2762-0b00-4e04-af4f-19010527cb93"
BIOS = "ac6b8dc1-3257-4a70-b1b2-a9c9215659ad"
SERIAL = "8e3a359f-559a-4b6a-98a9-1690a6100ed7"
SYNTHETIC_NIC = "2fc216b0-d2e2-4967-9b6d-b8a5c9ca2778"
TPM = "736e6aa9-a3f8-49c0-9550-a963214d259a"

INTEGRATION: dict[str, str] = {
    "84eaae65-2f2e-45f5-9bb5-0e857dc8eb47": "heartbeat",
    "9f8233ac-be49-4c79-8ee3-e7e1985b2077": "shutdown",
    "2a34b1c2-fd73-4043-8a5b-dd2159bc743f": "key-value exchange",
    "2497f4de-e9fa-4204-80e4-4b75c46419c0": "time synchronization",
    "5ced1297-4598-4915-a5fc-ad21bb4d02a4": "backup (VSS)",
    "6c09bb55-d683-4da0-8931-c9bf705f6480": "guest file copy",
}
PLUMBING = frozenset(
    {
        "58f75a6d-d949-4320-99e1-a2a2576d581c",  # synthetic mouse
        "197f74e3-b84b-46de-8ae6-82f1cd181cdc",  # synthetic keyboard
        "f3cf6965-e8d3-44a9-9b7d-a04245ea7525",  # synthetic video
        "7d80d3db-61ee-4879-8879-5609f1100ad0",  # emulated S3 video
        "bc12c717-8898-4688-8ee4-2cd14894f8ea",  # activation
        "6c5addb9-a11a-4e8e-84cb-e6208201db63",  # remote desktop
        "655bc5c5-a784-46b7-81bc-e26328f7eb0e",  # i8042
        "de6cdc86-e1fb-4940-801b-c3c1a26c4da4",  # input
        "e51b7ef6-4a7f-4780-aaae-d4b291aacd2e",  # clock
        "35b0b12f-a0d7-482f-80a0-f52f1ab3da2e",  # super I/O
        "4d42d9f7-6531-4f6c-9e46-1f0477876104",  # ISA bus
        "4d46d139-7821-4dc4-98a3-01e98a586a44",  # speaker
        "72682fc4-040a-430a-be0b-224574b953fe",  # I/O APIC
        "84535fad-4d98-4a6a-bdcd-21d5720dc430",  # PCI bus
        "87045ce9-5323-438f-93bb-1e83dcbce18e",  # DMA
        "9edd1639-9bca-40dc-b3a2-07c828da60b5",  # PIC
        "a28e4d02-3323-4148-9569-565930a5cb39",  # PIT
        "ba8735ef-e3a9-4f1b-badd-dbf3a5909915",  # monitor
        "d41a1872-3740-41ce-a1ee-4522ab82f991",  # VMBus
        "db8b9818-b4bb-4725-b99d-b4612716b6b4",  # power management
        "deaeeed3-4119-4b44-95cf-a73604b76971",  # debugger
        "e3c82929-edb4-475e-85a4-29aaa2a30c2d",  # dynamic memory
        "917bd8cb-3bb6-4124-9383-b7d21ac07f79",  # runtime state
        "9cb98db1-4d09-4538-a192-2d3d8c0b6cdb",  # RDP encoder
        "9ed5fd4b-40c3-4de3-8597-98ecd17035da",  # synthetic RDP
    }
)
"""Devices that every machine has in some form, ours too."""

_NOISE = re.compile(
    r"/(vdevversion|version|channelinstanceguid|vpciinstanceguid|flags|instance|name|size|weight|limit|reservation"
    r"|priority|pool_?id|poolid|iops_\w+|persistent_reservations_supported|address|clustermonitored|targetvtl)$"
    r"|/metrics/|/feature_|/features/|/topology/|/vnuma/|/owner/|/base_board/|/chassis/|/manifest/|/rtcdevice/"
    r"|_time$|/bios_guid$|/bios_serial_number$|/num_lock$|/authorizationscope$|/chimneyoffloadweight$|/portname$"
    r"|/preventipspoofing$|/testreplica\w+$|/generation_id$|/highly_available$|/type_id$|/vhd_path_acled$|/altportname$|/switchname$|/host_shutdown/|/snapshots/list/|/unexpected_termination/"
    r"|/savedstate/|/global_id$|/logical_id$|/data_root$|/last_powered_\w+$|/disk_merge_pending$|/limit_cpuid$",
    re.IGNORECASE,
)
"""Leaves that say how Hyper-V runs or measures it, not what the machine is."""
MOST_NOT_UNDERSTOOD = 500
_GUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NUMBERED = re.compile(r"(controller|drive|lun)(\d{1,3})$", re.IGNORECASE)
_MAC = re.compile(r"[0-9a-f]{12}")


@dataclass(slots=True)
class _Devices:
    disks: list[ForeignDisk] = field(default_factory=list)
    nics: list[ForeignNic] = field(default_factory=list)
    com_ports: list[str] = field(default_factory=list)
    integration: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    scsi: int = 0
    tpm: bool = False


def machine_of(root: Section, kind: ForeignKind, fallback_name: str) -> ForeignMachine:
    """The machine that a configuration describes. `fallback_name`: for one without a name."""
    devices = _devices(root)
    bios = root.section(f"_{BIOS}_")
    generation = 2 if root.number("properties/subtype") == 1 else 1
    secure = bios.flag("secure_boot_enabled")
    memory = root.number("settings/memory/bank/size") or 0
    dynamic = root.flag("settings/memory/bank/dynamic_memory_enabled")
    most = root.number("settings/memory/bank/limit")
    return ForeignMachine(
        kind=kind,
        version=_version(root.number("properties/version")),
        name=root.text("properties/name") or fallback_name,
        id=(root.text("properties/global_id") or root.text("settings/global/logical_id")).strip("{}").lower(),
        vcpus=max(1, root.number("settings/processors/count") or 1),
        memory=max(0, memory) * MiB,
        memory_maximum=most * MiB if dynamic and most and most > 0 else None,
        generation=generation,
        firmware=Firmware.UEFI if generation == 2 else Firmware.BIOS,
        secure_boot=generation == 2 and secure,
        tpm=devices.tpm,
        boot_order=tuple(text for n in range(8) if (text := bios.text(f"boot/device{n}"))),
        notes=root.text("properties/notes")[:16_384],
        scsi_controllers=devices.scsi,
        disks=tuple(devices.disks),
        nics=tuple(devices.nics),
        com_ports=tuple(devices.com_ports),
        integration=tuple(devices.integration),
        starts_with_host=root.number("global_settings/power/host_startup/action") == 2,
        saved_state=_has_saved_state(root),
        not_understood=_left_over(root, devices.strange),
    )


def snapshot_of(root: Section, fallback_id: str) -> ForeignSnapshot:
    """A snapshot, whose configuration is a machine's as it was then. Its id is the name of its file."""
    machine = machine_of(root, ForeignKind.HYPER_V_XML, fallback_id)
    return ForeignSnapshot(
        id=fallback_id.lower(),
        name=machine.name,
        parent=_parent(root),
        notes=machine.notes,
        disks=machine.disks,
        saved_state=machine.saved_state,
    )


def _devices(root: Section) -> _Devices:
    found = _Devices()
    for device, section, name in _instances(root):
        if device in (IDE, SCSI, FLOPPY):
            _add_drives(found, device, section)
        elif device == SERIAL:
            found.com_ports += [section.text(f"port{n}/connection") for n in range(4) if _has(section, f"port{n}")]
        elif device in INTEGRATION:
            if section.value("Enabled") is not False:
                found.integration.append(INTEGRATION[device])
        elif device == TPM:
            found.tpm = True
        elif (nic := _nic(section, name, legacy=device != SYNTHETIC_NIC)) is not None:
            found.nics.append(nic)
        elif device not in PLUMBING and device != BIOS:
            found.strange.append(f"device {name or device} ({device})")
    return found


def _add_drives(found: _Devices, device: str, section: Section) -> None:
    bus = {IDE: ForeignBus.IDE, FLOPPY: ForeignBus.FLOPPY}.get(device, ForeignBus.SCSI)
    found.disks += _drives(section, bus, found.scsi if device == SCSI else 0)
    found.scsi += device == SCSI


def _instances(root: Section) -> Iterator[tuple[str, Section, str]]:
    """Type, section and name of each device: those of the manifest in its order, which is the guest's; then sections
    that it does not name (old versions have emulated devices without an entry)."""
    sections = {name.strip("_").lower(): s for name, s in root.sections if _GUID.fullmatch(name.strip("_"))}
    manifest = [(n, s) for n, s in root.section("manifest").sections if n.lower().startswith("vdev")]
    for _, entry in sorted(manifest, key=lambda item: item[0].lower()):
        device = entry.text("device").strip("{}").lower()
        instance = entry.text("instance").strip("{}").lower()
        yield device, sections.pop(instance, Section()), entry.text("name")
    for guid, section in sections.items():
        yield _guess(guid, section), section, section.text("FriendlyName")


def _guess(guid: str, section: Section) -> str:
    """The type of a device without an entry: emulated ones have their type for a name, a SCSI controller has drives."""
    if guid in (IDE, FLOPPY) or not _has(section, "controller0"):
        return guid
    return SCSI


def _has(section: Section, name: str) -> bool:
    return any(n.lower() == name for n, _ in section.sections)


def _drives(section: Section, bus: ForeignBus, first: int) -> Iterator[ForeignDisk]:
    for controller_name, controller in section.sections:
        place = _NUMBERED.fullmatch(controller_name)
        if place is None:
            continue
        for drive_name, drive in controller.sections:
            unit = _NUMBERED.fullmatch(drive_name)
            disk = _drive(drive, bus, first + int(place[2]), int(unit[2])) if unit else None
            if disk is not None:
                yield disk


def _drive(drive: Section, bus: ForeignBus, controller: int, unit: int) -> ForeignDisk | None:
    kind = drive.text("type").upper()
    name = drive.text("pathname")
    if not name and (kind in ("", "NONE") or bus is ForeignBus.FLOPPY):
        return None
    if bus is ForeignBus.FLOPPY:
        return ForeignDisk(bus=bus, controller=controller, unit=unit, media=Media.FLOPPY, name=name)
    media = Media.CDROM if kind in ("ISO", "ATAPI", "DVD") or name.lower().endswith(".iso") else Media.DISK
    image = kind in ("VHD", "ISO", "VFD") or name.lower().endswith((".vhd", ".vhdx", ".avhd", ".avhdx", ".iso", ".vfd"))
    return ForeignDisk(
        bus=bus, controller=controller, unit=unit, media=media, name=name, physical=bool(name) and not image
    )


def _nic(section: Section, name: str, legacy: bool) -> ForeignNic | None:
    """An adapter: whatever has a MAC address. Since 2012 its connection is a section of its own; before, the names of
    switch and port were beside the address, and only GUIDs."""
    holder = next((s for s in (section, *(s for _, s in section.sections)) if s.value("MacAddress") is not None), None)
    if holder is None:
        return None
    network = holder.text("Connection/AltSwitchName") or holder.text("AltSwitchName")
    network = network or holder.text("SwitchName") or holder.text("Connection/SwitchName")
    connected = holder.value("IsConnected")
    return ForeignNic(
        name=section.text("FriendlyName") or name,
        mac=clean_mac(holder.text("MacAddress")),
        static=holder.flag("MacAddressIsStatic"),
        network="" if connected is False else network,
        legacy=legacy,
    )


def clean_mac(text: str) -> str | None:
    """ "00-15-5D-01-07-DC" as "00:15:5d:01:07:dc"; None for none, for all zeroes (not given yet) and for a group's."""
    digits = re.sub(r"[^0-9a-f]", "", text.lower())
    if not _MAC.fullmatch(digits) or digits == "0" * 12 or int(digits[1], 16) & 1:
        return None
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def _version(number: int | None) -> str:
    """Stored as major * 256 + minor: 5.0 is 2012 R2, 9.0 is 2019."""
    return f"{number >> 8}.{number & 0xFF}" if number is not None and 0 < number < 2**24 else ""


def _has_saved_state(root: Section) -> bool:
    return any(root.text(f"savedstate/{leaf}") for leaf in ("memlocation", "vsvlocation"))


def _parent(root: Section) -> str | None:
    """The GUID of the snapshot that a snapshot was taken after, by whichever name this version keeps it under."""
    for place in ("properties", "settings/global", "global_settings", "global_settings/snapshots"):
        section = root.section(place)
        for name, _ in section.values:
            if "parent" in name.lower() and (found := _GUID.search(section.text(name))):
                return found[0].lower()
    return None


def _left_over(root: Section, strange: Sequence[str]) -> tuple[str, ...]:
    lines = list(strange)
    for path, value in root.unread():
        if len(lines) >= MOST_NOT_UNDERSTOOD:
            break
        if not _NOISE.search("/" + path) and not _plumbing(path):
            lines.append(f"{path} = {_shown(value)}")
    return tuple(lines)


def _plumbing(path: str) -> bool:
    found = _GUID.search(path)
    return found is not None and found[0].lower() in PLUMBING


def _shown(value: Value) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text[:200]
