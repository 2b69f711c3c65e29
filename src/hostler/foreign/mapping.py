"""What becomes of a foreign machine here: its disks' places, its request, and everything there is to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hostler.model.disk import Bus, Media
from hostler.model.errors import InvalidInput
from hostler.model.foreign import (
    ForeignBus,
    ForeignDisk,
    ForeignKind,
    ForeignMachine,
    ForeignNic,
    Remark,
    RemarkKind,
)
from hostler.model.limits import Limits
from hostler.model.nic import Network
from hostler.model.requests import NicAdd, VmCreate
from hostler.model.units import GiB, MiB, format_size
from hostler.model.vm import Autostart, Firmware

IDE_DISKS = 4
SCSI_CONTROLLERS, SCSI_DISKS = 4, 64
HYPER_V = frozenset({ForeignKind.HYPER_V_XML, ForeignKind.HYPER_V_EXP, ForeignKind.HYPER_V_VMCX})
VIRTIO = "https://github.com/virtio-win/virtio-win-pkg-scripts"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a drive is plugged in here."""

    bus: Bus
    controller: int
    unit: int


def places(disks: tuple[ForeignDisk, ...]) -> list[Place | None]:
    """A place for each drive, None for one that has none here. Drives stay on their bus and in their order: IDE's two
    controllers of two are our four; SATA, which we have no name for, takes what IDE leaves, then SCSI."""
    taken: set[Place] = set()
    found: dict[int, Place | None] = {}
    ranked = sorted(range(len(disks)), key=lambda i: (disks[i].bus is ForeignBus.SATA, i))
    for index in ranked:
        place = next((p for p in _wishes(disks[index]) if p not in taken), None)
        if place is not None:
            taken.add(place)
        found[index] = place
    return [found[index] for index in range(len(disks))]


def _wishes(disk: ForeignDisk) -> Iterator[Place]:
    if disk.bus is ForeignBus.FLOPPY:
        return
    if disk.bus is ForeignBus.IDE and disk.controller < 2 and disk.unit < 2:
        yield Place(Bus.IDE, 0, disk.controller * 2 + disk.unit)
    elif disk.bus is ForeignBus.SATA and disk.unit < IDE_DISKS:
        yield Place(Bus.IDE, 0, disk.unit)
    elif disk.bus is ForeignBus.SCSI and disk.controller < SCSI_CONTROLLERS and disk.unit < SCSI_DISKS:
        yield Place(Bus.SCSI, disk.controller, disk.unit)
    if disk.bus is not ForeignBus.SCSI:
        yield from (Place(Bus.IDE, 0, unit) for unit in range(IDE_DISKS))
    for controller in range(SCSI_CONTROLLERS):
        yield from (Place(Bus.SCSI, controller, unit) for unit in range(SCSI_DISKS))


def boot_rank(machine: ForeignMachine, disk: ForeignDisk, index: int) -> tuple[int, int, int, int]:
    """Sorts drives by the order in which the machine would have booted from them."""
    buses = (ForeignBus.SCSI, ForeignBus.IDE) if machine.generation == 2 else (ForeignBus.IDE, ForeignBus.SATA)
    return (0 if disk.bus in buses else 1, disk.controller, disk.unit, index)


def network_of(nic: ForeignNic, choices: Mapping[str, str], default: str | None, own: bool) -> NicAdd:
    """What an adapter is connected to here: what was chosen for its network's name, else the default, else nothing (a
    machine with a MAC address and an IP address of its own must not appear in a network by surprise). An adapter of
    our own folder stays where it was."""
    chosen = choices.get(nic.network, default if nic.network else None)
    if chosen is None:
        chosen = nic.network if own and nic.network else "none"
    kind, _, bridge = chosen.partition(":")
    try:
        return NicAdd(network=Network(kind), bridge=bridge or None, mac=nic.mac)
    except ValueError as error:
        raise InvalidInput(
            f"network {chosen!r}", "is none that an adapter can be connected to", "write user, none or bridge:NAME"
        ) from error


def request_of(machine: ForeignMachine, name: str, nics: tuple[NicAdd, ...], controllers: int) -> VmCreate:
    """The machine as it is asked for here, without its disks. `controllers`: SCSI controllers that its disks need."""
    memory = machine.memory - machine.memory % MiB
    return VmCreate(
        name=name,
        vcpus=machine.vcpus,
        memory=memory or GiB,
        firmware=machine.firmware,
        secure_boot=machine.secure_boot,
        tpm=machine.tpm,
        nics=nics,
        scsi_controllers=max(controllers, min(SCSI_CONTROLLERS, machine.scsi_controllers), 1),
        autostart=Autostart(enabled=machine.starts_with_host),
        notes=machine.notes,
    )


def remarks(machine: ForeignMachine, placed: list[Place | None], limits: Limits) -> list[Remark]:
    """Everything there is to say about a machine that does not depend on the host's files."""
    found = [*_processor_and_memory(machine, limits), *_firmware(machine), *_drives(machine, placed)]
    found += [*_adapters(machine), *_rest(machine)]
    return sorted(found, key=lambda remark: list(RemarkKind).index(remark.kind))


def _processor_and_memory(machine: ForeignMachine, limits: Limits) -> Iterator[Remark]:
    size = format_size(machine.memory)
    if machine.memory == 0:
        yield Remark(kind=RemarkKind.CHANGED, subject="memory", text="is not said; it gets 1 GiB")
    elif machine.memory % MiB:
        yield Remark(kind=RemarkKind.CHANGED, subject="memory", text=f"{size} becomes a number of whole MiB")
    else:
        yield Remark(kind=RemarkKind.KEPT, subject="processors, memory", text=f"{machine.vcpus}, {size}")
    if machine.memory_maximum is not None:
        yield Remark(
            kind=RemarkKind.LOST,
            subject="dynamic memory",
            text=f"was on, up to {format_size(min(machine.memory_maximum, limits.vm_memory))}; it gets what it"
            f" started with, {size}, always",
            advice="change it with 'hostler vm set --memory' if that is too little",
        )


def _firmware(machine: ForeignMachine) -> Iterator[Remark]:
    uefi = machine.firmware is Firmware.UEFI
    generation = f"generation {machine.generation}, " if machine.generation is not None else ""
    yield Remark(kind=RemarkKind.KEPT, subject="firmware", text=f"{generation}{'UEFI' if uefi else 'BIOS'}")
    if uefi and machine.kind is not ForeignKind.HOSTLER:
        yield Remark(
            kind=RemarkKind.GUEST,
            subject="firmware",
            text="its UEFI variables are not taken over: it boots by the default path (\\EFI\\BOOT\\BOOTX64.EFI)",
            advice="a guest without that file needs its boot entry made anew, in the firmware's menu",
        )
    if machine.tpm and machine.kind is not ForeignKind.HOSTLER:
        yield Remark(
            kind=RemarkKind.LOST,
            subject="TPM",
            text="it gets a new, empty one: what was sealed in the old one (BitLocker keys) stays there",
            advice="suspend BitLocker before the export, or have its recovery key at hand",
        )
    if machine.boot_order:
        yield Remark(
            kind=RemarkKind.CHANGED,
            subject="boot order",
            text=f"was {', '.join(machine.boot_order)}; here it is the order of the disks, CD drives first",
        )


def _drives(machine: ForeignMachine, placed: list[Place | None]) -> Iterator[Remark]:
    disks = [d for d in machine.disks if d.media is Media.DISK and d.bus is not ForeignBus.FLOPPY]
    foreign = machine.kind is not ForeignKind.HOSTLER
    if foreign and any(d.bus is ForeignBus.SCSI for d in disks):
        yield Remark(
            kind=RemarkKind.GUEST,
            subject="SCSI disks",
            text="are on virtio-scsi here: the guest needs its driver. Linux has it; Windows needs 'vioscsi'",
            advice=f"install the virtio drivers before the export, or boot once from IDE and install them ({VIRTIO})",
        )
    if foreign and any(p is not None and p.bus is Bus.IDE and d.media is Media.DISK for d, p in _both(machine, placed)):
        yield Remark(
            kind=RemarkKind.GUEST,
            subject="IDE disks",
            text="are on AHCI (SATA) here. Linux, and Windows since 8 and Server 2012, find them; Windows 7, Server"
            " 2008 and 2008 R2 stop with 0x7B unless their AHCI driver starts at boot",
            advice="in the guest, before the export: set 'Start' of HKLM\\SYSTEM\\CurrentControlSet\\Services\\msahci"
            " to 0",
        )
    for disk, place in _both(machine, placed):
        if place is not None and _moved(disk, place):
            where = f"{place.bus} {place.controller}:{place.unit}"
            yield Remark(
                kind=RemarkKind.CHANGED,
                subject=f"disk {disk.place}",
                text=f"is at {where} here",
                advice="check what the guest calls it",
            )


def _both(machine: ForeignMachine, placed: list[Place | None]) -> list[tuple[ForeignDisk, Place | None]]:
    return list(zip(machine.disks, placed, strict=True))


def _moved(disk: ForeignDisk, place: Place) -> bool:
    if disk.bus is ForeignBus.IDE:
        return place != Place(Bus.IDE, 0, disk.controller * 2 + disk.unit)
    if disk.bus is ForeignBus.SATA:
        return place.bus is not Bus.IDE
    return place != Place(Bus.SCSI, disk.controller, disk.unit)


def _adapters(machine: ForeignMachine) -> Iterator[Remark]:
    if machine.kind is ForeignKind.HOSTLER or not machine.nics:
        return
    yield Remark(
        kind=RemarkKind.GUEST,
        subject="network adapters",
        text="are virtio-net here: Linux has the driver, Windows needs 'NetKVM'. The guest sees new adapters with the"
        " old MAC addresses, in the old order; Windows binds its IP settings to the adapter, not to the address",
        advice="have the IP settings at hand, or set the guest to DHCP before the export",
    )
    for number, nic in enumerate(machine.nics, 1):
        subject = f"network adapter {number}"
        if nic.mac is None:
            yield Remark(kind=RemarkKind.CHANGED, subject=subject, text="had no MAC address yet; it gets a new one")
        else:
            dynamic = "" if nic.static else " (it was a dynamic one)"
            yield Remark(kind=RemarkKind.KEPT, subject=subject, text=f"keeps its MAC address {nic.mac}{dynamic}")
        if nic.legacy:
            yield Remark(
                kind=RemarkKind.CHANGED,
                subject=subject,
                text="was an emulated one, for guests without the hypervisor's driver; here it is virtio-net too",
                advice="a guest without a virtio driver has no network",
            )


def _rest(machine: ForeignMachine) -> Iterator[Remark]:
    if machine.starts_with_host:
        yield Remark(
            kind=RemarkKind.KEPT,
            subject="autostart",
            text="it starts with the host",
            advice="take that away with 'hostler vm set --no-autostart' while the original still runs",
        )
    if machine.saved_state:
        yield Remark(
            kind=RemarkKind.LOST,
            subject="saved state",
            text="cannot be taken over: the guest starts as after a power cut, and what it had not written is lost",
            advice="shut the guest down there and export it again",
        )
    for number, connection in enumerate(machine.com_ports, 1):
        if connection:
            yield Remark(
                kind=RemarkKind.LOST,
                subject=f"COM{number}",
                text=f"was connected to {connection}; here COM1 is the console",
                advice="see 'hostler vm console'",
            )
    if machine.kind in HYPER_V and machine.integration:
        yield Remark(
            kind=RemarkKind.GUEST,
            subject="integration services",
            text=f"({', '.join(machine.integration)}) have nobody to talk to here: shutdown is by the power button,"
            " or by qemu-guest-agent, which also freezes file systems; time is NTP's",
            advice="install qemu-guest-agent in the guest; the Hyper-V services may be removed",
        )
    if machine.kind is ForeignKind.IMAGE:
        yield Remark(
            kind=RemarkKind.CHANGED,
            subject="machine",
            text="a disk says nothing about its machine: 1 processor, 1 GiB, BIOS, the disk on AHCI, no network",
            advice="give --memory, --vcpus, --firmware; add adapters with 'hostler nic add'",
        )
    if machine.snapshots:
        names = ", ".join(repr(s.name) for s in machine.snapshots[:20])
        yield Remark(
            kind=RemarkKind.LOST,
            subject="snapshots",
            text=f"{len(machine.snapshots)} ({names}) are not taken over as such: the present state is imported",
            advice="give --checkpoint NAME to import one of them instead",
        )
