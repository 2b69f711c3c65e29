"""Checkpoints: a VM's past states, as a tree.

    creating --> ready --apply--> applying --> ready;  ready --delete--> merging --> (gone)

A checkpoint holds a layer of each disk (and everything below it) unchanged: what the VM writes later goes into a layer
on top. It is deleted by giving its layers free; a layer that nobody holds and that has one layer on top is merged with
it, one that nothing builds on is removed. Layers may outlive their checkpoint, where two states build on one.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from hostler.model.base import Record
from hostler.model.disk import DiskSource
from hostler.model.vm import VmConfig


class CheckpointState(StrEnum):
    CREATING = "creating"
    READY = "ready"
    APPLYING = "applying"
    MERGING = "merging"


C = CheckpointState
CHECKPOINT_TRANSITIONS: dict[CheckpointState, frozenset[CheckpointState]] = {
    C.CREATING: frozenset({C.READY}),
    C.READY: frozenset({C.APPLYING, C.MERGING}),
    C.APPLYING: frozenset({C.READY}),
    C.MERGING: frozenset({C.READY}),
}


class CheckpointKind(StrEnum):
    """disks: as after a power cut. application: the guest's file systems were frozen by its agent. full: with
    memory."""

    DISKS = "disks"
    APPLICATION = "application"
    FULL = "full"


class Checkpoint(Record):
    """`parent` is the checkpoint before it (an id). `config` is the VM's configuration at that time, whose disks'
    sources are the frozen layers. `memory` is the path of the saved memory (kind full). `size` is what it holds alone,
    in bytes, as far as known."""

    id: str
    vm: str
    name: str
    parent: str | None = None
    kind: CheckpointKind = CheckpointKind.DISKS
    state: CheckpointState = CheckpointState.READY
    notes: str = ""
    created: datetime
    config: VmConfig | None = None
    memory: str | None = None
    automatic: bool = False
    """Made by a schedule or before an apply: the oldest of these go first when there are too many."""

    def frozen(self) -> dict[str, DiskSource]:
        """Disk id to the layers it holds."""
        return {d.id: d.source for d in self.config.disks} if self.config is not None else {}
