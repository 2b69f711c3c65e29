"""Long work that QEMU does on a running VM's disks: copying, merging, backing up. Values only."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from hostler.model.base import Record


class BlockJobState(StrEnum):
    """running: works. ready: a copy or an active merge keeps up with the guest and waits to be finished. paused: by an
    I/O error. done, failed: over; QEMU keeps it until it is dismissed. (QEMU's own states are more; see
    qapi/job.json.)"""

    RUNNING = "running"
    READY = "ready"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"


class BlockJob(Record):
    """`id` is chosen by whoever starts it and found again by a restarted daemon. `done` and `total` in bytes; `total`
    grows when the guest writes. `error` is QEMU's text."""

    id: str
    kind: str
    """QEMU's job type: mirror, commit, stream, backup."""
    state: BlockJobState
    done: int = Field(default=0, ge=0)
    total: int = Field(default=0, ge=0)
    error: str = ""

    @property
    def fraction(self) -> float | None:
        """0.0 to 1.0; None while the total is unknown."""
        return min(1.0, self.done / self.total) if self.total else None
