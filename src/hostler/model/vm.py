"""Virtual machines: what one is (VmConfig), what it is doing (VmState), and who runs it (VmRecord).

    off --start--> starting --> running --pause--> pausing --> paused --resume--> resuming --> running
    running|paused --save--> saving --> saved --restore--> restoring --> running
    running|paused --shut down, turn off--> stopping --> off
    running|paused --migrate--> migrating --> (gone: it runs on the other host) | running | paused
    any state with a process --QEMU dies, disk full, ...--> critical (with a reason)
    critical --turn off--> stopping --> off;  critical --cause is gone--> running
    off --a checkpoint with memory is applied--> saved

A failure on the way goes back to where it came from: starting -> off, pausing -> running, resuming -> paused,
saving -> running|paused, restoring -> saved, migrating -> running|paused. Discarding a saved state: saved -> off.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from hostler.model.base import Record
from hostler.model.disk import Bus, Disk
from hostler.model.nic import Nic


class VmState(StrEnum):
    OFF = "off"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    SAVING = "saving"
    SAVED = "saved"
    RESTORING = "restoring"
    STOPPING = "stopping"
    MIGRATING = "migrating"
    CRITICAL = "critical"


S = VmState
TRANSITIONS: dict[VmState, frozenset[VmState]] = {
    S.OFF: frozenset({S.STARTING, S.SAVED, S.CRITICAL}),
    S.STARTING: frozenset({S.RUNNING, S.OFF, S.CRITICAL}),
    S.RUNNING: frozenset({S.PAUSING, S.PAUSED, S.SAVING, S.STOPPING, S.MIGRATING, S.CRITICAL, S.OFF}),
    S.PAUSING: frozenset({S.PAUSED, S.RUNNING, S.OFF, S.CRITICAL}),
    S.PAUSED: frozenset({S.RESUMING, S.RUNNING, S.SAVING, S.STOPPING, S.MIGRATING, S.CRITICAL, S.OFF}),
    S.RESUMING: frozenset({S.RUNNING, S.PAUSED, S.OFF, S.CRITICAL}),
    S.SAVING: frozenset({S.SAVED, S.RUNNING, S.PAUSED, S.OFF, S.CRITICAL}),
    S.SAVED: frozenset({S.RESTORING, S.OFF, S.CRITICAL}),
    S.RESTORING: frozenset({S.RUNNING, S.PAUSED, S.SAVED, S.OFF, S.CRITICAL}),
    S.STOPPING: frozenset({S.OFF, S.RUNNING, S.PAUSED, S.CRITICAL}),
    S.MIGRATING: frozenset({S.RUNNING, S.PAUSED, S.OFF, S.CRITICAL}),
    S.CRITICAL: frozenset({S.RUNNING, S.PAUSED, S.STOPPING, S.OFF, S.SAVED}),
}
"""Legal next states. running -> off is the guest shutting itself down; running -> paused an outside `stop`."""

HAS_PROCESS = frozenset(
    {S.RUNNING, S.PAUSING, S.PAUSED, S.RESUMING, S.SAVING, S.STOPPING, S.MIGRATING, S.STARTING, S.RESTORING}
)
"""States in which a QEMU may exist (critical may have one too)."""


class Firmware(StrEnum):
    BIOS = "bios"
    UEFI = "uefi"


class StopAction(StrEnum):
    """What happens when a guest has not shut down in time."""

    TURN_OFF = "turn-off"
    LEAVE = "leave"
    """Leave it running and fail the job."""


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    if "\0" in path:
        raise ValueError("must not have a zero byte")
    return path


AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class KernelBoot(Record):
    """Boot a Linux kernel directly, without a boot disk. Paths on the host."""

    kernel: AbsolutePath
    initrd: AbsolutePath | None = None
    cmdline: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")] = ""


class Autostart(Record):
    """Start with the host. Lower `order` first; `delay` seconds are waited after this VM's start, before the next."""

    enabled: bool = False
    order: int = Field(default=100, ge=0, le=1_000_000)
    delay: int = Field(default=0, ge=0, le=86_400)


class Shutdown(Record):
    """How long (seconds) a guest may take to shut down, and what happens then."""

    timeout: int = Field(default=120, ge=1, le=86_400)
    then: StopAction = StopAction.LEAVE


class VmConfig(Record):
    """Everything a VM is, so that two hosts given the same value build the same machine.

    `memory` in bytes. `machine` and `cpu_model` are pinned at creation ("pc-q35-7.2", "Nehalem-v1"); they never follow
    the QEMU version, since a running or saved guest depends on them. `generation_id` is the guest-visible VM
    generation id (vmgenid). `run_as` is the user id of its QEMU where the daemon is root.
    """

    id: str
    name: str
    vcpus: int = Field(default=1, ge=1)
    memory: int = Field(default=1024**3, ge=1024**2)
    machine: str
    cpu_model: str
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    kernel: KernelBoot | None = None
    scsi_controllers: int = Field(default=1, ge=0, le=4)
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    autostart: Autostart = Autostart()
    shutdown: Shutdown = Shutdown()
    notes: Annotated[str, StringConstraints(max_length=16_384)] = ""
    generation_id: str = ""
    run_as: int | None = None

    @model_validator(mode="after")
    def _devices(self) -> Self:
        ids = [d.id for d in self.disks] + [n.id for n in self.nics]
        if len(set(ids)) != len(ids):
            raise ValueError("two devices have the same id")
        addresses = [d.address for d in self.disks]
        if len(set(addresses)) != len(addresses):
            raise ValueError("two disks have the same address")
        macs = [n.mac for n in self.nics]
        if len(set(macs)) != len(macs):
            raise ValueError("two adapters have the same MAC address")
        for disk in self.disks:
            if disk.bus is Bus.SCSI and disk.controller >= self.scsi_controllers:
                raise ValueError(f"disk {disk.id} is on SCSI controller {disk.controller}, which the VM has not")
        return self

    def disk(self, disk_id: str) -> Disk | None:
        """The disk with this id, or None."""
        return next((d for d in self.disks if d.id == disk_id), None)


class CriticalReason(StrEnum):
    QEMU_DIED = "qemu-died"
    NO_SPACE = "no-space"
    IO_ERROR = "io-error"
    GUEST_PANICKED = "guest-panicked"
    HANDOVER_PENDING = "handover-pending"
    """Handed over to another host that has not confirmed yet."""
    INCONSISTENT = "inconsistent"
    """Process, QMP and record did not agree; stopped rather than risking two writers."""


class Process(Record):
    """The QEMU of a VM. `started` (clock ticks since boot, /proc/PID/stat field 22) tells a reused pid apart."""

    pid: int
    started: int
    run_dir: str


class VmRecord(Record):
    """A VM as a host keeps it.

    `generation` grows with each change of owner; a host acts on a VM only while its own record has the highest.
    `reason` and `reason_text` explain the state critical (or the last unexpected stop). `saved` is the path of the
    saved state while the state is saved.
    """

    config: VmConfig
    state: VmState = VmState.OFF
    reason: CriticalReason | None = None
    reason_text: str = ""
    generation: int = 1
    process: Process | None = None
    saved: str | None = None
    job: str | None = None
    """The job that holds this VM now."""
    checkpoint: str | None = None
    """Id of the checkpoint that the present state builds on."""
    next_config: VmConfig | None = None
    """A changed configuration that waits for the next start."""
    handed_to: str | None = None
    """Id of the host that owns the VM now, from the hand-over until that host has confirmed. While it is set, this
    host never lets the guest run."""

    @property
    def id(self) -> str:
        """The VM's id."""
        return self.config.id

    @property
    def name(self) -> str:
        """The VM's name, which people use."""
        return self.config.name
