"""Checkpoints: a VM's past states, as a tree.

creating --> ready --apply--> applying --> ready;  ready --delete--> merging --> (gone)
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from hostler.model.base import Record


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
    DISKS = "disks"
    APPLICATION = "application"
    FULL = "full"


class Checkpoint(Record):
    id: str
    vm: str
    name: str
    parent: str | None = None
    kind: CheckpointKind = CheckpointKind.DISKS
    state: CheckpointState = CheckpointState.READY
    notes: str = ""
    created: datetime
