"""A running virtual machine as the layers above QEMU see it: values; the behaviour is `host.hypervisor.Machine`."""

from __future__ import annotations

from enum import StrEnum

from pydantic import JsonValue

from hostler.model.base import Record
from hostler.model.host import Accelerator
from hostler.model.pool import Connection
from hostler.model.vm import VmConfig


class RunStatus(StrEnum):
    """QEMU's run states (qapi/run-state.json), under QEMU's own names."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"


class MachineEvent(Record):
    """An event of QEMU: its QMP name ("SHUTDOWN", "BLOCK_IO_ERROR", "MIGRATION", ...) and data."""

    name: str
    data: dict[str, JsonValue] = {}


class LaunchSpec(Record):
    """Everything the command line is made of, beside the host's facts.

    `run_dir` holds sockets (short: a unix socket path has at most 107 bytes), `state_dir` what must survive a reboot
    (UEFI variables, TPM state). `taps` maps nic id to the tap interface made for it; `exports` maps disk id to the
    unix socket of the NBD export that serves it (formats QEMU cannot migrate itself). `incoming`: wait for a migration
    stream instead of booting. `user_network` addresses need nothing.
    """

    config: VmConfig
    accelerator: Accelerator
    run_dir: str
    state_dir: str
    taps: dict[str, str] = {}
    exports: dict[str, str] = {}
    incoming: bool = False
    connections: tuple[Connection, ...] = ()
    """How the network pools of its disks are reached, with the files of their secrets."""


class MigrationEnd(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MigrationResult(Record):
    """How a migration ended at its source; `text` is QEMU's own error. `downtime` and `total_time` in ms."""

    end: MigrationEnd
    text: str = ""
    downtime: int | None = None
    total_time: int | None = None
    transferred: int = 0
