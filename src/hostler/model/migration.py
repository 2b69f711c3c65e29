"""What a move of a VM between hosts is made of: its phases, blockers, settings, progress and outcome."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.base import Record
from hostler.model.checkpoint import Luggage, unpack
from hostler.model.host import Accelerator
from hostler.model.vm import VmConfig


class MigrationMode(StrEnum):
    LIVE = "live"
    QUICK = "quick"
    """Save, hand over, restore: the guest stands still during the whole transfer."""


class Phase(StrEnum):
    """The named steps of a migration job, in order. Up to and including PRE_COPY it can be cancelled."""

    CHECK = "check"
    PREPARE = "prepare-target"
    PRE_COPY = "pre-copy"
    SWITCH_OVER = "switch-over"
    RESUME = "resume"
    CLEAN_UP = "clean-up"


class BlockerKind(StrEnum):
    NOT_RUNNING = "not-running"
    SAME_HOST = "same-host"
    NAME_TAKEN = "name-taken"
    NO_MACHINE_TYPE = "no-machine-type"
    NO_CPU_MODEL = "no-cpu-model"
    ACCELERATOR_DIFFERS = "accelerator-differs"
    NO_MEMORY = "no-memory"
    LIMIT = "limit"
    VOLUME_NOT_SHARED = "volume-not-shared"
    VOLUME_BUSY = "volume-busy"
    PASS_THROUGH = "pass-through"
    NO_BRIDGE = "no-bridge"
    NO_FIRMWARE = "no-firmware"
    NO_TPM = "no-tpm"
    NO_USER = "no-user"
    CAPABILITY_MISSING = "capability-missing"
    KERNEL_FILE_MISSING = "kernel-file-missing"
    ALREADY_INCOMING = "already-incoming"


class Blocker(Record):
    """One reason why a VM cannot move, and the way out."""

    kind: BlockerKind
    text: str
    advice: str = ""


class MigrationSettings(Record):
    """`bandwidth` bytes/s (0: unlimited), `downtime_limit` ms, `streams` of multifd (1: none)."""

    mode: MigrationMode = MigrationMode.LIVE
    bandwidth: int = Field(default=0, ge=0)
    downtime_limit: int = Field(default=50, ge=1, le=60_000)
    streams: int = Field(default=1, ge=1, le=64)
    encrypted: bool = True


class MigrationProgress(Record):
    """A reading of QEMU's counters. Bytes; rates in bytes/s; times in ms. `expected_pause` and `remaining_time` are
    estimates from the current rates, None until there are any."""

    status: str = "none"
    transferred: int = 0
    remaining: int = 0
    total: int = 0
    rounds: int = 0
    dirty_rate: int = 0
    rate: int = 0
    elapsed: int = 0
    remaining_time: int | None = None
    expected_pause: int | None = None
    downtime: int | None = None


class IncomingPhase(StrEnum):
    """The target's side. prepared: QEMU waits for the stream; accepted: this host owns the VM now (recorded before the
    guest may run); refused: it will never run here."""

    PREPARED = "prepared"
    ACCEPTED = "accepted"
    REFUSED = "refused"


class Incoming(Record):
    """A VM on its way to this host, as its target keeps it. `generation` is the one it will have here."""

    id: str
    config: VmConfig
    next_config: VmConfig | None = None
    luggage: Luggage = Luggage()
    generation: int
    source: str
    """Id of the host it comes from."""
    phase: IncomingPhase = IncomingPhase.PREPARED
    run: bool = True
    """Whether the guest shall run after the move (it was not paused by its owner)."""
    text: str = ""
    """Why it was refused."""


OneName = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z_-]{0,63}$")]
"""An id that can be one name in a directory or a key, and nothing else."""


class IncomingRequest(Record):
    """What the source sends to prepare a target. `secret` is the pre-shared key (hex) of this one move; it is kept in
    a file only QEMU can read and dies with the move."""

    id: OneName
    config: VmConfig
    next_config: VmConfig | None = None
    """A changed configuration that waits for the VM's next start, wherever that is."""
    luggage: Luggage = Luggage()
    generation: int
    settings: MigrationSettings
    accelerator: Accelerator
    secret: str
    run: bool = True
    inodes: dict[str, int] = {}
    """Path to inode number of each file at the source: the same path must be the same file at the target."""
    boot_id: str = ""
    """The source's boot id: devices can be shared by path only within one machine."""

    @model_validator(mode="after")
    def _vm_id(self) -> Self:
        """The VM's id names directories at the target; what comes from another host is looked at closely."""
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", self.config.id):
            raise ValueError("the VM's id is not an id of a VM")
        return self

    @model_validator(mode="after")
    def _its_own(self) -> Self:
        """What comes along is its own: layers of its disks and of its checkpoints, and nobody else's checkpoints."""
        layers = {layer.path for disk in self.config.disks for layer in disk.source.layers()}
        if any(v.path not in layers | self.luggage.family.layers.keys() for v in self.luggage.volumes):
            raise ValueError("a volume comes along that is no layer of the VM")
        if any(v.owner != self.config.id for v in self.luggage.volumes):
            raise ValueError("a volume comes along that was not made for the VM")
        unpack(self.luggage.family)
        return self


class IncomingStatus(Record):
    """The target's answer: its phase, whether the whole state has arrived, and where its QEMU listens."""

    phase: IncomingPhase
    loaded: bool = False
    address: str = ""
    """tcp host:port of QEMU's migration listener."""
    text: str = ""
