"""From what people ask to what a VM is: defaults, free addresses, limits. No change is made here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from pydantic import ValidationError

from hostler.host.context import Host
from hostler.model.disk import BUS_NAMES, Bus, Disk, DiskSource, Media, SourceKind
from hostler.model.errors import HostLacks, InUse, InvalidInput, LimitExceeded
from hostler.model.limits import Limits
from hostler.model.names import check_name, new_id
from hostler.model.nic import Nic
from hostler.model.requests import DiskAdd, NicAdd, VmChange, VmCreate
from hostler.model.units import MiB, format_size
from hostler.model.vm import Firmware, VmConfig, VmRecord, VmState
from hostler.network.mac import new_mac
from hostler.qemu.pci import free_nic_slot, nic_slots

CHANGES_AT_ONCE = frozenset({"name", "notes", "autostart", "shutdown"})
"""Fields of VmChange that need no stop."""


FLOPPY_DRIVES = 2
"""A PC's floppy controller has two."""


async def new_config(host: Host, request: VmCreate, vm_id: str | None = None) -> VmConfig:
    """The configuration of a new VM, complete and within the limits. `vm_id`: its id, where that was settled before."""
    check_name("vm", request.name)
    await host.volumes.check_kernel(request.kernel)
    vm_id = vm_id or new_id()
    config = VmConfig(
        id=vm_id,
        name=request.name,
        vcpus=request.vcpus,
        memory=request.memory,
        machine=_machine(host, request.machine),
        cpu_model=_cpu_model(host, request.cpu_model),
        firmware=request.firmware,
        secure_boot=request.secure_boot,
        tpm=request.tpm,
        kernel=request.kernel,
        scsi_controllers=request.scsi_controllers,
        autostart=request.autostart,
        shutdown=request.shutdown,
        notes=request.notes,
        generation_id=new_id(),
        run_as=host.resources.user_for(vm_id, [a.record.config for a in host.actors.values()]),
    )
    record = VmRecord(config=config)
    for disk_request in request.disks:
        source = await host.volumes.resolve(disk_request)
        disk = next_disk(host, record, disk_request, source)
        if disk_request.overlay:
            raise InvalidInput(
                f"vm {record.name}", "is only made; overlays are for VMs that are there", "add the disk afterwards"
            )
        record = record.but(config=record.config.but(disks=(*record.config.disks, disk)))
    for nic_request in request.nics:
        nic = next_nic(host, record.config, nic_request)
        await host.resources.check_nic(nic)
        record = record.but(config=record.config.but(nics=(*record.config.nics, nic)))
    config = _boot_order(record.config)
    check_config(host, config)
    return config


def _boot_order(config: VmConfig) -> VmConfig:
    """Disks boot in the order given; CD drives first, since one is there only to install from. Counts from 1: QEMU
    gives a directly booted kernel the index 0. Floppy drives do not boot."""
    order = sorted((d for d in config.disks if d.bus is not Bus.FLOPPY), key=lambda d: d.media is not Media.CDROM)
    rank = {disk.id: index for index, disk in enumerate(order, start=1)}
    return config.but(disks=tuple(d.but(boot_index=rank.get(d.id)) for d in config.disks))


def _machine(host: Host, wanted: str | None) -> str:
    known = host.facts.qemu.machines
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise HostLacks(f"machine type {wanted}", "is not known to this host's QEMU", f"known: {', '.join(known)}")
    return wanted


def _cpu_model(host: Host, wanted: str | None) -> str:
    known = host.facts.qemu.cpu_models
    if wanted is None:
        return host.facts.qemu.default_cpu
    if wanted not in known:
        raise HostLacks(
            f"processor model {wanted}", "cannot be provided by this host", f"available: {', '.join(known)}"
        )
    return wanted


def check_config(host: Host, config: VmConfig) -> None:
    """Raises LimitExceeded or HostLacks if this host could never run that VM."""
    subject = f"vm {config.name}"
    if config.memory % MiB:
        near = f"for example {format_size(config.memory - config.memory % MiB + MiB)}"
        raise InvalidInput(subject, f"a memory of {config.memory} bytes is not a number of whole MiB", near)
    check_limits(host.limits, config)
    if config.firmware is Firmware.UEFI and host.facts.qemu.firmware_code is None:
        raise HostLacks(subject, "needs UEFI firmware, which this host has not", "install the package ovmf")
    if config.tpm and not host.facts.qemu.tpm:
        raise HostLacks(subject, "needs a TPM, but this host has no swtpm", "install the package swtpm")
    if config.secure_boot and config.firmware is not Firmware.UEFI:
        raise InvalidInput(subject, "secure boot needs UEFI firmware", "create it with --uefi")


def check_limits(limits: Limits, config: VmConfig) -> None:
    """Raises LimitExceeded if a VM is more than these limits allow one to be."""
    subject = f"vm {config.name}"
    limits.refuse_above(subject, "vm_vcpus", config.vcpus, "its virtual processors")
    limits.refuse_above(subject, "vm_memory", config.memory, "its memory")
    limits.refuse_above(subject, "vm_nics", len(config.nics), "its network adapters")
    limits.refuse_above(subject, "vm_scsi_controllers", config.scsi_controllers, "its SCSI controllers")
    ide = sum(1 for d in config.disks if d.bus is Bus.IDE)
    limits.refuse_above(subject, "vm_ide_disks", ide, "its IDE disks")


def next_disk(host: Host, record: VmRecord, request: DiskAdd, source: DiskSource) -> Disk:
    """The disk that this request makes: first free address and id where none is given."""
    config = record.config
    everything = [*config.disks, *(record.next_config.disks if record.next_config else ())]
    _refuse_twice(config, source)
    bus = Bus.FLOPPY if request.media is Media.FLOPPY else request.bus
    controller, unit = _address(host, config, request.model_copy(update={"bus": bus}), [d.address for d in everything])
    if bus is not Bus.SCSI and record.state is not VmState.OFF:
        raise InvalidInput(
            f"vm {config.name}",
            f"is {record.state}, and the {BUS_NAMES[bus]} takes no disk while a VM runs",
            "use the SCSI bus, or shut the VM down first",
        )
    token = secrets.token_hex(8)
    try:
        return Disk(
            id=_free_id("disk", [d.id for d in everything]),
            source=source,
            bus=bus,
            controller=controller,
            unit=unit,
            media=request.media,
            read_only=request.read_only or request.media is Media.CDROM,
            cache=request.cache,
            discard=request.discard,
            reservations=request.reservations,
            serial=request.serial or f"HL{token[:12].upper()}",
            wwn=(0x5 << 60) | int(token, 16) >> 4,
        )
    except ValidationError as error:
        raise InvalidInput(f"disk for vm {config.name}", error.errors()[0]["msg"]) from error


def _refuse_twice(config: VmConfig, source: DiskSource) -> None:
    if source.kind is SourceKind.EMPTY:
        return
    for disk in config.disks:
        if disk.source.path == source.path and (disk.writes or source.kind is not disk.source.kind):
            raise InUse(f"volume {source.path}", f"is disk {disk.id} of vm {config.name} already", holder=config.name)


def _address(host: Host, config: VmConfig, request: DiskAdd, taken: Sequence[tuple[Bus, int, int]]) -> tuple[int, int]:
    controllers = config.scsi_controllers if request.bus is Bus.SCSI else 1
    units = {
        Bus.SCSI: host.limits.scsi_disks_per_controller,
        Bus.IDE: host.limits.vm_ide_disks,
        Bus.FLOPPY: FLOPPY_DRIVES,
    }[request.bus]
    if request.controller is not None and request.controller >= controllers:
        raise InvalidInput(
            f"vm {config.name}",
            f"has {controllers} {request.bus} controllers; there is no controller {request.controller}",
            "controllers count from 0; give the VM more with --scsi-controllers while it is off",
        )
    for controller in range(controllers) if request.controller is None else (request.controller,):
        for unit in range(units) if request.unit is None else (request.unit,):
            if (request.bus, controller, unit) not in taken:
                return controller, unit
    if request.unit is not None:
        where = f"{request.bus} controller {request.controller or 0} unit {request.unit}"
        raise InUse(f"vm {config.name}", f"has a disk at {where} already", "choose another unit, or none")
    raise LimitExceeded(
        f"vm {config.name}",
        f"has no free place on its {controllers} {request.bus} controllers of {units} disks"
        f" (limit scsi_disks_per_controller of profile {host.limits.profile})",
        "give it another SCSI controller while it is off",
        limit="scsi_disks_per_controller",
        value=units + 1,
        maximum=units,
        profile=str(host.limits.profile),
    )


def next_nic(host: Host, config: VmConfig, request: NicAdd) -> Nic:
    """The adapter that this request makes."""
    host.limits.refuse_above(f"vm {config.name}", "vm_nics", len(config.nics) + 1, "its network adapters")
    taken = {n.mac for a in host.actors.values() for n in a.record.config.nics} | {n.mac for n in config.nics}
    if request.mac is not None and request.mac in taken:
        raise InUse(f"MAC address {request.mac}", "belongs to an adapter of this host already", "leave it out")
    mac = request.mac
    while mac is None or (request.mac is None and mac in taken):
        mac = new_mac(secrets.token_bytes)
    return Nic(
        id=_free_id("nic", [n.id for n in config.nics]),
        mac=mac,
        network=request.network,
        bridge=request.bridge,
        queues=request.queues,
        slot=free_nic_slot(config.nics),
    )


def with_nic(config: VmConfig, nic: Nic) -> VmConfig:
    """The configuration with one adapter more."""
    return config.but(nics=(*config.nics, nic))


def without_nic(config: VmConfig, nic_id: str) -> VmConfig:
    """The configuration without that adapter. The others stay where the guest knows them, also those that had no slot
    of their own."""
    slots = nic_slots(config.nics)
    return config.but(nics=tuple(n.but(slot=slots[n.id]) for n in config.nics if n.id != nic_id))


def _free_id(prefix: str, taken: Sequence[str]) -> str:
    number = 0
    while f"{prefix}{number}" in taken:
        number += 1
    return f"{prefix}{number}"


def needs_stop(record: VmRecord, request: VmChange) -> list[str]:
    """The fields of the request that cannot change in the VM's present state."""
    if record.state is VmState.OFF:
        return []
    return sorted(request.model_fields_set - CHANGES_AT_ONCE)


def change_config(host: Host, record: VmRecord, request: VmChange, later: bool) -> tuple[VmConfig, VmConfig | None]:
    """The configuration now and the one waiting for the next start (None: none waits)."""
    changes = {name: getattr(request, name) for name in request.model_fields_set}
    if "name" in changes:
        check_name("vm", str(changes["name"]))
    at_once = {name: value for name, value in changes.items() if name in CHANGES_AT_ONCE or not later}
    try:
        now = record.config.but(**at_once)
        waiting = (record.next_config or record.config).but(**changes) if later or record.next_config else None
    except ValidationError as error:
        raise InvalidInput(f"vm {record.name}", error.errors()[0]["msg"]) from error
    for config in (now, waiting):
        if config is not None:
            check_config(host, config)
    return now, waiting
