"""What people ask of checkpoints: the bodies of the REST API. Unknown fields are refused."""

from __future__ import annotations

from pydantic import Field

from hostler.model.base import Input
from hostler.model.checkpoint import CheckpointKind
from hostler.model.requests import Name, Notes


class CheckpointCreate(Input):
    """Without `name` it gets the VM's name and the time. `keep`: it counts as automatic, and of the VM's automatic ones
    only so many are kept: the oldest are deleted when it is made."""

    name: Name | None = None
    kind: CheckpointKind = CheckpointKind.DISKS
    notes: Notes = ""
    keep: int | None = Field(default=None, ge=1, le=512)


class CheckpointApply(Input):
    """`first`: make a checkpoint of the present state before it is given up. `turn_off`: a VM that is not off is turned
    off (a saved one loses its memory)."""

    first: bool = False
    turn_off: bool = False


class CheckpointClone(Input):
    """A new VM from a checkpoint. `full`: with disks of its own instead of layers on those of the checkpoint."""

    name: Name
    full: bool = False


class CheckpointChange(Input):
    """Fields left out stay as they are."""

    name: Name | None = None
    notes: Notes | None = None
