"""The command line of one VM's QEMU: a pure function of what to launch and what the host's QEMU can do.

Two hosts given the same configuration build the same machine: everything the guest can see is said explicitly (machine
type, CPU model, topology, PCI addresses), what differs between hosts (paths, tap names, accelerator) the guest does
not see. The golden files in tests/unit/golden show the whole of it.

Choices that are not obvious:
- `-S`: the guest's processors stand still until the machine's owner says so.
- `enforce`: QEMU refuses to start where the host cannot give the CPU model in full, instead of giving less.
- No option ROMs on network adapters: their size goes into the migration stream and differs with the host's packages,
  and iPXE costs seconds of boot time.
- Keyboard is the built-in PS/2 one, which every firmware and system knows; the USB tablet gives an absolute pointer.
- After a guest's own shutdown QEMU ends by itself (the SHUTDOWN event precedes); a guest panic stops the guest.
- Suspend to RAM or disk is not offered to the guest: a suspended guest looks hung to everyone else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from hostler.model.disk import Bus, SourceKind
from hostler.model.errors import HostLacks
from hostler.model.host import Accelerator, QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.nic import Network, Nic
from hostler.model.units import GiB, KiB
from hostler.model.vm import Firmware, VmConfig
from hostler.qemu import pci
from hostler.qemu.blockdev import FLOPPY_CONTROLLER, Aio, blockdev_options, device_options
from hostler.qemu.network_disks import objects, reach
from hostler.qemu.paths import RunDir, StateDir

AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"
"""Name under which the guest agent looks for its port (its built-in default)."""
RAM_ID: Final = "pc.ram"
"""QEMU's own name for a PC's memory: the migration stream stays the same if the back end changes one day."""

_LARGE: Final = 1000 * GiB
_BITMAP_WORD: Final = 256 * KiB
"""Memory covered by one word of QEMU's dirty bitmap: 64 pages of 4 KiB."""
_ODD: Final = 8 * KiB
"""QEMU rounds `-m` up to this."""
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def command_line(spec: LaunchSpec, facts: QemuFacts, qmp_fd: int | None = None) -> list[str]:
    """The program and its arguments. `qmp_fd`: an inherited listening socket for QMP; None lets QEMU make its own at
    `RunDir.qmp`. HostLacks where this host has not what the configuration needs."""
    config = spec.config
    _check(config, facts)
    return [
        facts.binary,
        *("-name", f"guest={_comma(config.name)},debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-S", "-display", "none"),
        *_machine(spec, facts),
        *_processors(config),
        *_memory(spec),
        *_firmware(spec, facts),
        *_boot(config),
        *_policy(facts),
        *_monitor(spec, qmp_fd),
        *_consoles(spec),
        *_guest_services(spec),
        *_tpm(spec),
        *_disks(spec, facts),
        *_nics(spec),
        *(("-incoming", "defer") if spec.incoming else ()),
    ]


def nic_device_id(nic: Nic) -> str:
    """QEMU's device id of an adapter, for set_link and NIC_RX_FILTER_CHANGED."""
    return f"nic-{nic.id}"


def aio_for(facts: QemuFacts) -> Aio:
    """How disks are read here: io_uring where it works, else Linux AIO (which blockdev uses for direct I/O only)."""
    return "io_uring" if facts.aio_io_uring else "native"


def _check(config: VmConfig, facts: QemuFacts) -> None:
    """Refuse here, in words, what QEMU would refuse at start in its own."""
    what, install = "", ""
    if config.machine not in facts.machines:
        what, install = f"the machine type {config.machine}", "a QEMU that still has it, or recreate the VM"
    elif config.firmware is Firmware.UEFI and _firmware_files(config, facts) is None:
        secure = " with secure boot" if config.secure_boot else ""
        what, install = f"UEFI firmware{secure}", "the package ovmf"
    elif config.tpm and not facts.tpm:
        what, install = "a TPM emulator", "the package swtpm"
    if what:
        raise HostLacks(f"vm {config.name}", f"this host has not {what}", f"install {install}")


def _json(option: str, values: Mapping[str, JsonValue]) -> tuple[str, str]:
    """JSON where QEMU takes it: no quoting rules, and the same values as over QMP."""
    return option, json.dumps(values, separators=(",", ":"), ensure_ascii=False)


def _comma(value: str) -> str:
    """Quote for options of the form key=value,key=value."""
    return value.replace(",", ",,")


def _device(driver: str, id: str, address: pci.Address, **properties: JsonValue) -> tuple[str, str]:
    return _json("-device", {"driver": driver, "id": id, **address.options(), **properties})


def _socket(id: str, path: str) -> tuple[str, str]:
    return "-chardev", f"socket,id={id},path={_comma(path)},server=on,wait=off"


def _machine(spec: LaunchSpec, facts: QemuFacts) -> list[str]:
    config = spec.config
    options = [config.machine, "usb=off", "vmport=off", "dump-guest-core=off", f"memory-backend={RAM_ID}"]
    if config.firmware is Firmware.UEFI:
        options += ["pflash0=firmware.code", "pflash1=firmware.vars"]
    options.append(f"smm={'on' if config.secure_boot else 'off'}")
    accelerator = "kvm" if spec.accelerator is Accelerator.KVM else "tcg,thread=multi"
    return ["-machine", ",".join(options), "-accel", accelerator, "-uuid", config.id]


def _processors(config: VmConfig) -> list[str]:
    """One socket: client versions of Windows use two at most. QEMU's 40 physical address bits end at 1 TiB; above, 46
    (64 TiB) are said, so that the guest sees the same on every host."""
    model = [config.cpu_model, "enforce=on"] + (["phys-bits=46"] if config.memory > _LARGE else [])
    topology = f"cpus={config.vcpus},maxcpus={config.vcpus},sockets=1,dies=1,cores={config.vcpus},threads=1"
    return ["-cpu", ",".join(model), "-smp", topology]


def ram_size(memory: int, accelerator: Accelerator) -> int:
    """Bytes of RAM that QEMU is given for a VM of `memory` bytes: under TCG 8 KiB more, where that is a multiple of
    256 KiB.

    QEMU before 9.0 collects the dirty bitmap of a RAM block of such a length word by word, and forgets to tell TCG's
    TLB. Later writes to these pages are then not seen by a migration: the guest arrives with stale pages (measured on
    7.2.22: half of the guests hung after a transfer of 10 s; none of 12 with the odd length). Fixed upstream in March
    2024 ("physmem: Fix migration dirty bitmap coherency with TCG memory access"). Any other length goes page by page,
    which is right. A function of the configuration only, since both ends of a move must agree."""
    return memory + _ODD if accelerator is Accelerator.TCG and memory % _BITMAP_WORD == 0 else memory


def _memory(spec: LaunchSpec) -> list[str]:
    size = ram_size(spec.config.memory, spec.accelerator)
    backend: dict[str, JsonValue] = {"qom-type": "memory-backend-ram", "id": RAM_ID, "size": size}
    return ["-m", f"{size}b", *_json("-object", backend)]


def _firmware_files(config: VmConfig, facts: QemuFacts) -> tuple[str, str] | None:
    """Code and variable template for this VM; None where the host has none."""
    code, template = facts.firmware_code, facts.firmware_vars
    if config.secure_boot:
        code, template = facts.firmware_secure_code, facts.firmware_secure_vars
    return (code, template) if code and template else None


def firmware_template(config: VmConfig, facts: QemuFacts) -> str | None:
    """The file whose copy becomes the VM's own variable store; None for BIOS."""
    files = _firmware_files(config, facts) if config.firmware is Firmware.UEFI else None
    return files[1] if files else None


def _firmware(spec: LaunchSpec, facts: QemuFacts) -> list[str]:
    files = _firmware_files(spec.config, facts)
    if spec.config.firmware is not Firmware.UEFI or files is None:
        return []
    code: dict[str, JsonValue] = {"node-name": "firmware.code", "filename": files[0], "read-only": True}
    variables: dict[str, JsonValue] = {
        "node-name": "firmware.vars",
        "filename": StateDir(spec.state_dir).uefi_vars,
        "read-only": False,
        "locking": "on",
    }
    arguments: list[str] = []
    for node in (code, variables):
        arguments += _json("-blockdev", {"driver": "file", "auto-read-only": False, **node})
    if spec.config.secure_boot:
        # Only code in system management mode may write the variables, else the guest could enrol its own keys.
        arguments += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return arguments


def _boot(config: VmConfig) -> list[str]:
    """`strict`: with a boot order given, nothing else is tried (an unreadable first disk must not boot the second)."""
    arguments: list[str] = []
    if any(disk.boot_index is not None for disk in config.disks):
        arguments += ["-boot", "menu=off,strict=on"]
    if config.kernel is not None:
        arguments += ["-kernel", config.kernel.kernel]
        arguments += ["-initrd", config.kernel.initrd] if config.kernel.initrd else []
        arguments += ["-append", config.kernel.cmdline] if config.kernel.cmdline else []
    return arguments


def _policy(facts: QemuFacts) -> list[str]:
    return [
        *("-rtc", "base=utc,driftfix=slew"),
        *("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1"),
        *("-action", "shutdown=poweroff,reboot=reset,panic=pause"),
        *(("-sandbox", _SANDBOX) if facts.sandbox else ()),
        *("-msg", "timestamp=on"),
    ]


def _monitor(spec: LaunchSpec, qmp_fd: int | None) -> list[str]:
    run = RunDir(spec.run_dir)
    socket = (
        _socket("qmp", run.qmp) if qmp_fd is None else ("-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off")
    )
    return ["-pidfile", run.pid, *socket, "-mon", "chardev=qmp,mode=control"]


def _consoles(spec: LaunchSpec) -> list[str]:
    run = RunDir(spec.run_dir)
    return [
        *_device("VGA", "vga", pci.VGA),
        *("-vnc", f"unix:{_comma(run.vnc)}"),
        *_device("qemu-xhci", "usb", pci.USB),
        *_json("-device", {"driver": "usb-tablet", "id": "tablet", "bus": "usb.0", "port": "1"}),
        *_socket("serial", run.serial),
        *_json("-device", {"driver": "isa-serial", "id": "serial0", "chardev": "serial", "index": 0}),
    ]


def _guest_services(spec: LaunchSpec) -> list[str]:
    """What a guest's own drivers use. `free-page-reporting` gives memory the guest freed back to the host."""
    generation = spec.config.generation_id or spec.config.id
    port: dict[str, JsonValue] = {
        "driver": "virtserialport",
        "id": "agent",
        "bus": "channels.0",
        "nr": 1,
        "chardev": "qga",
        "name": AGENT_CHANNEL,
    }
    return [
        *_device("virtio-serial-pci", "channels", pci.SERIAL),
        *_socket("qga", RunDir(spec.run_dir).agent),
        *_json("-device", port),
        *_device("virtio-balloon-pci", "balloon", pci.BALLOON, **{"deflate-on-oom": True, "free-page-reporting": True}),
        *_json("-object", {"qom-type": "rng-builtin", "id": "entropy"}),
        *_device("virtio-rng-pci", "rng", pci.RNG, rng="entropy"),
        *_json("-device", {"driver": "vmgenid", "id": "generation", "guid": generation}),
        *_json("-device", {"driver": "pvpanic", "id": "panic"}),
    ]


def _tpm(spec: LaunchSpec) -> list[str]:
    if not spec.config.tpm:
        return []
    return [
        *("-chardev", f"socket,id=tpm-control,path={_comma(RunDir(spec.run_dir).tpm)}"),
        *("-tpmdev", "emulator,id=tpm-backend,chardev=tpm-control"),
        *_json("-device", {"driver": "tpm-crb", "id": "tpm", "tpmdev": "tpm-backend"}),
    ]


def _disks(spec: LaunchSpec, facts: QemuFacts) -> list[str]:
    """Each SCSI controller has a thread of its own: a busy disk does not hold up the others or the monitor.

    Disks are made in descending order, because QEMU reports the LUNs of a target newest first, and guests name disks
    in the order in which they are reported: LUN 0 shall be the first."""
    arguments: list[str] = []
    for index in range(spec.config.scsi_controllers):
        thread = f"iothread{index}"
        arguments += _json("-object", {"qom-type": "iothread", "id": thread})
        arguments += _device("virtio-scsi-pci", f"scsi{index}", pci.scsi_controller(index), iothread=thread)
    if any(disk.bus is Bus.FLOPPY for disk in spec.config.disks):
        arguments += _json("-device", {"driver": "isa-fdc", "id": FLOPPY_CONTROLLER})
    connections = {connection.pool: connection for connection in spec.connections}
    for connection in spec.connections:
        for secret in objects(connection):
            arguments += _json("-object", secret)
    for disk in sorted(spec.config.disks, key=lambda disk: disk.address, reverse=True):
        if disk.source.kind is not SourceKind.EMPTY:
            options = blockdev_options(disk, spec.exports.get(disk.id), aio_for(facts))
            arguments += _json("-blockdev", reach(options, connections))
        arguments += _json("-device", device_options(disk))
    return arguments


def _nics(spec: LaunchSpec) -> list[str]:
    slots = pci.nic_slots(spec.config.nics)
    arguments: list[str] = []
    for nic in sorted(spec.config.nics, key=lambda nic: slots[nic.id]):
        netdev = _netdev(spec, nic)
        arguments += ["-netdev", netdev] if netdev else []
        properties: dict[str, JsonValue] = {"mac": nic.mac, "romfile": ""}
        if netdev:
            properties["netdev"] = f"net-{nic.id}"
        if nic.queues > 1:
            # One vector for each of the 2 x queues rings, one for the control ring, one for configuration changes.
            properties |= {"mq": True, "vectors": 2 * nic.queues + 2}
        arguments += _device("virtio-net-pci", nic_device_id(nic), pci.nic(slots[nic.id]), **properties)
    return arguments


def _netdev(spec: LaunchSpec, nic: Nic) -> str | None:
    if nic.network is Network.NONE:
        return None
    if nic.network is Network.USER:
        return f"user,id=net-{nic.id}"
    tap = spec.taps.get(nic.id)
    if tap is None:
        raise HostLacks(
            f"vm {spec.config.name}",
            f"its network adapter {nic.id} was given no tap interface on {nic.bridge}",
            "start it on a host where Hostler may make tap interfaces",
        )
    queues = f",queues={nic.queues}" if nic.queues > 1 else ""
    return f"tap,id=net-{nic.id},ifname={_comma(tap)},script=no,downscript=no{queues}"
