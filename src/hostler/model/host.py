"""Hosts: what a machine that runs VMs has."""

from __future__ import annotations

from enum import StrEnum

from hostler.model.base import Record
from hostler.model.limits import Profile


class HostState(StrEnum):
    """up: takes VMs; unreachable: a peer that does not answer (its VMs may well run)."""

    UP = "up"
    UNREACHABLE = "unreachable"


H = HostState
HOST_TRANSITIONS: dict[HostState, frozenset[HostState]] = {
    H.UP: frozenset({H.UNREACHABLE}),
    H.UNREACHABLE: frozenset({H.UP}),
}


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"


class AcceleratorChoice(Record):
    """Which accelerator VMs get here, and why, as a sentence for people. `forced` when the operator chose it."""

    kind: Accelerator
    reason: str
    forced: bool = False


class QemuFacts(Record):
    """What this host's QEMU can do, asked from the binary itself, never concluded from its version."""

    binary: str
    version: str
    machines: tuple[str, ...] = ()
    """Versioned q35 machine types, newest first."""
    cpu_models: tuple[str, ...] = ()
    """Versioned models usable here without missing features."""
    default_cpu: str
    migration_capabilities: tuple[str, ...] = ()
    sandbox: bool = False
    tpm: bool = False
    """Whether both QEMU's tpm-emulator back end and the swtpm program are there."""
    firmware_code: str | None = None
    """OVMF code image (4M build), None where UEFI is not installed."""
    firmware_vars: str | None = None
    """Template of its variable store, copied for each VM."""
    firmware_secure_code: str | None = None
    """The same pair with secure boot and Microsoft's keys enrolled."""
    firmware_secure_vars: str | None = None
    aio_io_uring: bool = False


class NumaNode(Record):
    id: int
    cpus: tuple[int, ...]
    memory: int


class HostFacts(Record):
    """`memory` in bytes. `machine_id` and `boot_id` tell whether two daemons share one machine."""

    id: str
    name: str
    logical_processors: int
    cpu_name: str
    cpu_flags: tuple[str, ...] = ()
    memory: int
    numa: tuple[NumaNode, ...] = ()
    accelerator: AcceleratorChoice
    qemu: QemuFacts
    privileged: bool
    """Whether the daemon is root: bridges, taps and per-VM users need it."""
    profile: Profile = Profile.HOSTLER
    machine_id: str = ""
    boot_id: str = ""
    kernel: str = ""


class Peer(Record):
    """Another host this one trusts. `fingerprint` is the SHA-256 of its certificate (hex); `certificate` is PEM."""

    id: str
    name: str
    address: str
    """host:port of its HTTPS API."""
    fingerprint: str
    certificate: str
