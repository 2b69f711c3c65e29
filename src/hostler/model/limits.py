"""Limits as data, in two profiles. A refusal names the limit, the value and the profile.

Sources of `hyper-v-2008-r2`: TechNet ee405267 and the R2 news post (64 logical processors, 384 running VMs, 512 virtual
processors a host; 4 vCPUs, 64 GB, 4 IDE disks, 4 x 64 SCSI disks, 12 NICs, 50 snapshots a VM; VHD to 2,040 GB).
Sources of `hostler`: QEMU's q35 takes 288 vCPUs with an interrupt-remapping IOMMU and 255 without (x2APIC ids above 254
need one); virtio-scsi takes 16,384 LUNs, 64 are offered as Hyper-V does; memory is bounded by the 46 physical address
bits that QEMU exposes by default.
"""

from __future__ import annotations

from enum import StrEnum

from hostler.model.base import Record
from hostler.model.errors import LimitExceeded
from hostler.model.units import GiB, TiB, format_size


class Profile(StrEnum):
    HYPER_V_2008_R2 = "hyper-v-2008-r2"
    HOSTLER = "hostler"


class Limits(Record):
    """None means: no limit of the platform; what the host has is the bound. Sizes in bytes."""

    profile: Profile
    host_logical_processors: int | None
    host_running_vms: int | None
    host_vcpus: int | None
    vm_vcpus: int
    vm_memory: int
    vm_ide_disks: int
    vm_scsi_controllers: int
    scsi_disks_per_controller: int
    vm_nics: int
    vm_checkpoints: int
    chain_depth: int = 64
    """Layers of one disk: R2's 50 snapshots in a row and the base fit. Each costs an open file, and time to read."""
    vhd_size: int = 2040 * GiB
    volume_size: int = 64 * TiB

    def refuse_above(self, object: str, limit: str, value: int, what: str) -> None:
        """Raises LimitExceeded if `value` is above the limit of that field name."""
        maximum = getattr(self, limit)
        if maximum is None or value <= maximum:
            return
        sizes = limit in ("vm_memory", "vhd_size", "volume_size")
        shown, top = (format_size(value), format_size(maximum)) if sizes else (str(value), str(maximum))
        raise LimitExceeded(
            object,
            f"{what} would be {shown}, but the limit {limit} of profile {self.profile} is {top}",
            f"stay at or below {top}"
            + (", or use the profile 'hostler'" if self.profile is not Profile.HOSTLER else ""),
            limit=limit,
            value=value,
            maximum=maximum,
            profile=str(self.profile),
        )


PROFILES: dict[Profile, Limits] = {
    Profile.HYPER_V_2008_R2: Limits(
        profile=Profile.HYPER_V_2008_R2,
        host_logical_processors=64,
        host_running_vms=384,
        host_vcpus=512,
        vm_vcpus=4,
        vm_memory=64 * GiB,
        vm_ide_disks=4,
        vm_scsi_controllers=4,
        scsi_disks_per_controller=64,
        vm_nics=12,
        vm_checkpoints=50,
    ),
    Profile.HOSTLER: Limits(
        profile=Profile.HOSTLER,
        host_logical_processors=None,
        host_running_vms=None,
        host_vcpus=None,
        vm_vcpus=255,
        vm_memory=32 * TiB,
        vm_ide_disks=4,
        vm_scsi_controllers=4,
        scsi_disks_per_controller=64,
        vm_nics=24,
        vm_checkpoints=512,
    ),
}
