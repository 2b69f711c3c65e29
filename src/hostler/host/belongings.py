"""What goes when a VM is deleted, and what stays: its disks with all their layers, its checkpoints and their memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hostler.host.checkpoints.layer_changes import used_by_others
from hostler.host.context import Host
from hostler.model.checkpoint import Checkpoint
from hostler.model.vm import VmRecord
from hostler.storage.catalogue import Catalogue


@dataclass(frozen=True, slots=True)
class Belongings:
    """Paths that go with the VM, what builds on something before that; paths that stay; its checkpoints; the files of
    their memory, which go in any case: nobody could use them."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    memory: tuple[str, ...]


async def belongings(host: Host, record: VmRecord, disks: bool) -> Belongings:
    """Of that VM. `disks`: its disks shall go too. Layers that another VM builds on stay in any case."""
    points = await host.checkpoints.of(record.id)
    configs = [record.config, *([record.next_config] if record.next_config else [])]
    configs += [p.config for p in points if p.config is not None]
    foreign = await used_by_others(host, record.id)
    made = [row.value.path for row in await Catalogue(host.store).rows() if row.value.owner == record.id]
    paths: dict[str, bool] = dict.fromkeys(made, disks)
    for disk in (d for config in configs for d in config.disks):
        for layer in disk.source.layers():
            goes = disks and host.volumes.is_deletable(disk.at(layer))
            if layer.path:
                paths[layer.path] = paths.get(layer.path, False) or goes
    removed = [path for path, goes in paths.items() if goes and os.path.realpath(path) not in foreign]
    return Belongings(
        removed=tuple(removed),
        kept=tuple(path for path in paths if path not in removed),
        checkpoints=tuple(points),
        memory=tuple(p.memory for p in points if p.memory is not None),
    )
