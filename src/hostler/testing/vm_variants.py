"""The VMs whose command lines are golden files, and that a real QEMU must accept."""

from __future__ import annotations

from hostler.model.disk import Bus, CacheMode, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.host import Accelerator, QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.nic import Network, Nic
from hostler.model.pool import Connection, PoolKind
from hostler.model.units import GiB, MiB
from hostler.model.vm import Firmware, KernelBoot, VmConfig

FACTS = QemuFacts(
    binary="/usr/bin/qemu-system-x86_64",
    version="7.2.22",
    machines=("pc-q35-7.2",),
    cpu_models=("Westmere-v1",),
    default_cpu="Westmere-v1",
    migration_capabilities=(
        "auto-converge",
        "background-snapshot",
        "dirty-bitmaps",
        "events",
        "late-block-activate",
        "multifd",
        "pause-before-switchover",
        "postcopy-preempt",
        "postcopy-ram",
        "release-ram",
        "return-path",
        "validate-uuid",
        "x-ignore-shared",
        "xbzrle",
        "zero-copy-send",
    ),
    sandbox=True,
    tpm=True,
    firmware_code="/usr/share/OVMF/OVMF_CODE_4M.fd",
    firmware_vars="/usr/share/OVMF/OVMF_VARS_4M.fd",
    firmware_secure_code="/usr/share/OVMF/OVMF_CODE_4M.ms.fd",
    firmware_secure_vars="/usr/share/OVMF/OVMF_VARS_4M.ms.fd",
    aio_io_uring=True,
)
ID = "6f1c2ad0-5a53-4b4e-9f6e-0d2f3c1b7a11"


def config(**changes: object) -> VmConfig:
    base: dict[str, object] = {
        "id": ID,
        "name": "web1",
        "memory": 256 * MiB,
        "machine": "pc-q35-7.2",
        "cpu_model": "Westmere-v1",
        "generation_id": "0b9b8f6e-36b5-4b0c-a2d3-6c2f9f1f7c55",
    }
    return VmConfig.model_validate(base | changes)


def volume(format: ImageFormat = ImageFormat.RAW, name: str = "a.img", size: int = 16 * MiB) -> DiskSource:
    return DiskSource(path=f"/srv/{name}", format=format, size=size)


def _spec(vm: VmConfig, **changes: object) -> LaunchSpec:
    base: dict[str, object] = {
        "config": vm,
        "accelerator": Accelerator.TCG,
        "run_dir": "/run/h/vm",
        "state_dir": "/var/lib/h/vm",
    }
    return LaunchSpec.model_validate(base | changes)


def _formats() -> tuple[Disk, ...]:
    return (
        Disk(
            id="system",
            source=volume(ImageFormat.QCOW2, "a.qcow2"),
            boot_index=1,
            serial="H0001",
            wwn=0x5000000000000001,
        ),
        Disk(id="fixed", source=volume(ImageFormat.VHD_FIXED, "b.vhd"), unit=1, cache=CacheMode.WRITETHROUGH),
        Disk(id="dynamic", source=volume(ImageFormat.VHD, "c.vhd"), unit=2, cache=CacheMode.WRITEBACK),
        Disk(id="served", source=volume(ImageFormat.VHDX, "d.vhdx"), unit=3),
        Disk(id="raw", source=volume(), unit=63, read_only=True),
        Disk(id="boot", source=volume(name="e.img"), bus=Bus.IDE, discard=False),
        Disk(id="dvd", source=volume(name="f.iso"), bus=Bus.IDE, unit=1, media=Media.CDROM, boot_index=2),
    )


def _drives() -> tuple[Disk, ...]:
    empty = DiskSource(kind=SourceKind.EMPTY, path="")
    return (
        Disk(id="cd", source=empty, bus=Bus.IDE, media=Media.CDROM, read_only=True),
        Disk(id="dvd", source=empty, media=Media.CDROM, read_only=True),
        Disk(id="a", source=volume(name="a.vfd", size=1440 * 1024), bus=Bus.FLOPPY, media=Media.FLOPPY),
        Disk(id="b", source=empty, bus=Bus.FLOPPY, unit=1, media=Media.FLOPPY),
    )


def _network_disks() -> tuple[Disk, ...]:
    lun = DiskSource(
        kind=SourceKind.ISCSI,
        path="iscsi://10.0.0.5:3260/iqn.2020-01.com.example:vms/7",
        size=16 * MiB,
        pool="san",
        identity="naa.6001405000000001",
    )
    export = DiskSource(kind=SourceKind.NBD, path="nbd://10.0.0.6:10809/data", size=16 * MiB, pool="far")
    clear = DiskSource(kind=SourceKind.NBD, path="nbd://[fd00::7]:10809/data", size=16 * MiB, pool="lab")
    return (
        Disk(id="lun", source=lun, serial="H0001"),
        Disk(id="export", source=export, unit=1, cache=CacheMode.WRITEBACK),
        Disk(id="clear", source=clear, unit=2, read_only=True),
    )


def _connections() -> tuple[Connection, ...]:
    return (
        Connection(
            pool="san",
            kind=PoolKind.ISCSI,
            portal="10.0.1.5:3260",
            initiator="iqn.2008-11.org.linux-kvm:host",
            user="vms",
            secret_file="/run/h/vm/pool-san+0/secret",  # noqa: S106 - a path
        ),
        Connection(
            pool="far",
            kind=PoolKind.NBD,
            portal="10.0.0.6:10809",
            tls_dir="/run/h/vm/pool-far+0",
            tls_hostname="storage.example.com",
        ),
        Connection(pool="lab", kind=PoolKind.NBD, portal="[fd00::7]:10809"),
    )


def _many() -> tuple[Disk, ...]:
    return tuple(
        Disk(
            id=f"d{controller}-{unit}",
            source=volume(name=f"{controller}-{unit}.img", size=1 * MiB),
            controller=controller,
            unit=unit,
        )
        for controller in range(4)
        for unit in range(64)
    )


def _nic(number: int, **changes: object) -> Nic:
    return Nic.model_validate({"id": f"nic{number}", "mac": f"52:54:00:00:00:{number:02x}", **changes})


VARIANTS: dict[str, LaunchSpec] = {
    "bios": _spec(config()),
    "uefi": _spec(config(firmware=Firmware.UEFI)),
    "secure-boot": _spec(config(firmware=Firmware.UEFI, secure_boot=True)),
    "tpm": _spec(config(tpm=True)),
    "kernel": _spec(
        config(
            kernel=KernelBoot(kernel="/boot/vmlinuz", initrd="/srv/initrd.img", cmdline="console=ttyS0,115200 quiet")
        )
    ),
    "formats": _spec(config(disks=_formats()), exports={"served": "/run/h/vm/served.sock"}),
    "pass-through": _spec(
        config(disks=(Disk(id="lun", source=DiskSource(kind=SourceKind.DEVICE, path="/dev/loop0", size=16 * MiB)),))
    ),
    "drives": _spec(config(disks=_drives())),
    "network-disks": _spec(config(disks=_network_disks()), connections=_connections()),
    "disks-4x64": _spec(config(scsi_controllers=4, disks=_many())),
    "nics": _spec(
        config(
            nics=(
                _nic(0),
                _nic(1, network=Network.NONE),
                _nic(2, network=Network.BRIDGE, bridge="br0"),
                _nic(3, network=Network.BRIDGE, bridge="br0", queues=4, slot=23),
            )
        ),
        taps={"nic2": "htap2", "nic3": "htap3"},
    ),
    "nics-24": _spec(config(nics=tuple(_nic(n) for n in range(24)))),
    "large": _spec(config(name="big, 255 vCPUs", vcpus=255, memory=2048 * GiB)),
    "no-controllers": _spec(config(scsi_controllers=0)),
    "incoming": _spec(config(vcpus=2, nics=(_nic(0),)), incoming=True),
}
