"""Checkpoints: a VM's past states, as a tree.

    creating --> ready --apply--> applying --> ready;  ready --delete--> merging --> (gone)

A checkpoint holds a layer of each disk (and everything below it) unchanged: what the VM writes later goes into a layer
on top. It is deleted by giving its layers free; a layer that nobody holds and that has one layer on top is merged with
it, one that nothing builds on is removed. Layers may outlive their checkpoint, where two states build on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Self

from pydantic import model_validator

from hostler.model.base import Record
from hostler.model.disk import MAX_LAYERS, DiskSource
from hostler.model.vm import VmConfig
from hostler.model.volume import Volume


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
    sources are the frozen layers. `memory` is the path of the saved memory (kind full)."""

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


class CheckpointView(Checkpoint):
    """A checkpoint as its VM's owner sees it. `size`: bytes that its own layers and its memory take on the storage, as
    far as known; `now`: whether what the VM is now builds on it."""

    size: int = 0
    now: bool = False


class Family(Record):
    """All checkpoints of a VM as they travel to another host: each layer once, however many build on it. Chains hold
    every layer below in full, and would grow with the square of their number."""

    checkpoints: tuple[Checkpoint, ...] = ()
    """Without what is below their disks' topmost layers."""
    layers: dict[str, DiskSource] = {}
    """By path, alone."""
    parents: dict[str, str] = {}
    """Path to the path of the layer below."""


MEMORY = ".memory"
"""Ending of the file that holds a checkpoint's memory."""


class Luggage(Record):
    """What goes with a VM to another host: its checkpoints, which of them it builds on, the records of its layers."""

    family: Family = Family()
    now: str | None = None
    volumes: tuple[Volume, ...] = ()

    @model_validator(mode="after")
    def _own_files(self) -> Self:
        """Who deletes a checkpoint deletes these files: another host must not name any others."""
        folders = {path.rpartition("/")[0] for path in self.family.layers}
        for checkpoint in self.family.checkpoints:
            path = checkpoint.memory
            if path is not None and not (
                path.endswith(MEMORY) and path.rpartition("/")[0] in folders and ".." not in path.split("/")
            ):
                raise ValueError(f"the memory of a checkpoint is not beside its disks: {path}")
        return self


def default_name(vm: str, at: datetime) -> str:
    """As Hyper-V names a snapshot: the VM and the moment, to the second; at most 100 characters."""
    return f"{vm[:78]} - {at:%Y-%m-%d %H:%M:%S}"


def in_tree_order(checkpoints: Iterable[Checkpoint]) -> Iterator[tuple[int, Checkpoint]]:
    """Each checkpoint after the one it builds on, with its depth in the tree (0: it builds on none that is known);
    the older of two on one first."""
    known = sorted(checkpoints, key=lambda c: (c.created, c.id))
    ids = {c.id for c in known}
    stack = [(0, c) for c in reversed(known) if c.parent not in ids]
    while stack:
        depth, checkpoint = stack.pop()
        yield depth, checkpoint
        stack += [(depth + 1, c) for c in reversed(known) if c.parent == checkpoint.id]


def subtree(checkpoints: Sequence[Checkpoint], root: str) -> list[Checkpoint]:
    """That checkpoint (an id) and every one that builds on it, in whatever depth."""
    found = [c for c in checkpoints if c.id == root]
    for checkpoint in found:  # grows while it is walked: children are looked for behind their parents
        found += [c for c in checkpoints if c.parent == checkpoint.id and c not in found]
    return found


def nearest_left(checkpoints: Sequence[Checkpoint], gone: Iterable[str], start: str | None) -> str | None:
    """Where something hangs when those in `gone` (ids) are no more: the first one above that stays."""
    parents = {c.id: c.parent for c in checkpoints}
    leaving, seen = set(gone), set[str]()
    while start is not None and start in leaving and start not in seen:
        seen.add(start)
        start = parents.get(start)
    return start if start in parents and start not in leaving else None


def pack(checkpoints: Iterable[Checkpoint]) -> Family:
    """For the way to another host."""
    layers: dict[str, DiskSource] = {}
    parents: dict[str, str] = {}
    packed: list[Checkpoint] = []
    for checkpoint in checkpoints:
        config = checkpoint.config
        if config is not None:
            for layer in (layer for disk in config.disks for layer in disk.source.layers()):
                layers[layer.path] = layer.model_copy(update={"backing": None})
                if layer.backing is not None:
                    parents[layer.path] = layer.backing.path
            config = config.model_copy(update={"disks": tuple(d.at(d.source) for d in config.disks)})
        packed.append(checkpoint.model_copy(update={"config": config}))
    return Family(checkpoints=tuple(packed), layers=layers, parents=parents)


def unpack(family: Family) -> list[Checkpoint]:
    """The checkpoints with their chains. ValueError when these do not fit together."""

    def chain(top: DiskSource) -> DiskSource:
        layers, path = [top], family.parents.get(top.path)
        while path is not None:
            if path not in family.layers or len(layers) > MAX_LAYERS:
                raise ValueError(f"the layers below {top.path} do not fit together")
            layers.append(family.layers[path])
            path = family.parents.get(path)
        made: DiskSource | None = None
        for layer in reversed(layers):
            made = layer.model_copy(update={"backing": made})
        assert made is not None
        return DiskSource.model_validate(made.model_dump())

    found = []
    for checkpoint in family.checkpoints:
        config = checkpoint.config
        if config is not None:
            disks = tuple(d.model_copy(update={"source": chain(d.source)}) for d in config.disks)
            config = VmConfig.model_validate({**dict(config), "disks": disks})
        found.append(checkpoint.model_copy(update={"config": config}))
    return found
