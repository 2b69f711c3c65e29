"""The layers that a checkpoint is about to put on a VM's disks: which, and where their files go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hostler.host.actor import VmActor
from hostler.host.checkpoints.layer_changes import written as written_disks
from hostler.host.checkpoints.layers import on_top
from hostler.host.context import Host
from hostler.model.checkpoint import MEMORY, Checkpoint
from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.qemu.blockdev import layer_node
from hostler.storage.catalogue import real_target


class NewLayers:
    """The layers that a checkpoint puts on a VM's disks, as the VM's record is at the moment of asking. `token` names
    the new layer of each disk."""

    def __init__(self, host: Host, actor: VmActor, point: Checkpoint, token: str) -> None:
        self._host = host
        self._actor = actor
        self.point = point
        self.token = token

    def written(self) -> list[Disk]:
        """The disks that get a new layer, or have it."""
        return written_disks(self._actor.record.config)

    def chain(self, disk: Disk) -> DiskSource:
        """What is to be behind a disk."""
        if disk.id not in {d.id for d in self.written()}:
            return disk.source
        return on_top(disk.source, self.token, layer_path(self._host, self._actor.record.id, disk, self.token))

    def planned(self) -> list[Disk]:
        """The written disks as they are to be."""
        return [disk.model_copy(update={"source": self.chain(disk)}) for disk in self.written()]

    def recorded(self) -> bool:
        """Whether the record says that it has happened."""
        return self._actor.record.checkpoint == self.point.id

    def memory_path(self) -> str:
        """Where its memory goes: beside the first disk's layer, so that whoever has the disks has it, too."""
        planned = self.planned()
        if not planned:
            return str(self._host.paths.vm_state(self._actor.record.id) / f"{self.token}{MEMORY}")
        return planned[0].source.path.removesuffix(".qcow2") + MEMORY

    def nodes(self) -> dict[str, str]:
        """Disk id to the node its new layer is in QEMU."""
        return {disk.id: layer_node(disk, disk.source) for disk in self.planned()}


def without_new_layers(disks: Sequence[Disk]) -> Sequence[Disk]:
    """The disks as they were before they got their new layers."""
    return [d.model_copy(update={"source": d.source.backing}) for d in disks if d.source.backing is not None]


def layer_path(host: Host, vm: str, disk: Disk, token: str) -> str:
    """Where a disk's new layer goes: beside the present one, or in the host's volume directory where that is no file.
    Named after the disk's base, at most 255 bytes long."""
    top, base = disk.source, disk.source.base
    if top.local and top.kind is not SourceKind.DEVICE:
        directory = os.path.dirname(real_target(top.path))
        stem = Path(base.path).stem if base.kind is SourceKind.VOLUME else f"{vm[:8]}-{disk.id}"
    else:
        directory, stem = str(host.paths.volumes), f"{vm[:8]}-{disk.id}"
    ending = f".{disk.id}.{token}.qcow2"  # disks may have bases of one name
    short = os.fsencode(stem)[: 255 - len(ending)].decode("utf-8", "ignore")
    return os.path.join(directory, short + ending)
