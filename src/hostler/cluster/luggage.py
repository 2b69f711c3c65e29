"""What travels with a VM beside its configuration: its checkpoints, and the records of the layers made for it.

The files themselves stay where they are, on storage that both hosts have: layers, and the memory of checkpoints, which
lies beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from hostler.host.checkpoints.book import put, remove
from hostler.host.checkpoints.layer_changes import used_by_others
from hostler.host.context import Host
from hostler.model.checkpoint import Luggage, pack, unpack
from hostler.model.disk import SourceKind
from hostler.model.migration import Blocker, BlockerKind, Incoming
from hostler.model.vm import VmRecord
from hostler.model.volume import Volume, VolumeState
from hostler.storage.catalogue import Catalogue
from hostler.store.contract import Delete, Put


async def luggage(host: Host, record: VmRecord) -> Luggage:
    """What a VM of this host takes with it."""
    rows = await Catalogue(host.store).rows()
    family = pack(await host.checkpoints.of(record.id))
    layers = {layer.path for disk in record.config.disks for layer in disk.source.layers()} | family.layers.keys()
    return Luggage(
        family=family,
        now=record.checkpoint,
        volumes=tuple(row.value for row in rows if row.value.owner == record.id and row.value.path in layers),
    )


async def arrive(host: Host, incoming: Incoming) -> list[Put | Delete]:
    """The writes with which it is here."""
    catalogue, writes = Catalogue(host.store), list[Put | Delete]()
    for checkpoint in unpack(incoming.luggage.family):
        writes.append(put(checkpoint.model_copy(update={"vm": incoming.config.id})))
    for volume in own_volumes(incoming):
        if await catalogue.find(volume.path) is None and await catalogue.find(volume.name) is None:
            writes += catalogue.plan_add(volume).writes
    return writes


def own_volumes(incoming: Incoming) -> list[Volume]:
    """The records of its layers, as far as they are that: what a record says is what this host may delete. Pure."""
    config, family = incoming.config, incoming.luggage.family
    layers = [layer for disk in config.disks for layer in disk.source.layers()] + list(family.layers.values())
    made = {layer.path for layer in layers if layer.node and layer.kind is SourceKind.VOLUME}
    return [
        volume.but(state=VolumeState.READY, job="", made_by="")
        for volume in incoming.luggage.volumes
        if volume.owner == config.id and volume.path in made and volume.kind is SourceKind.VOLUME
    ]


async def leave(host: Host, vm: str) -> list[Put | Delete]:
    """The writes with which it is here no more: after a move away, or one that came to nothing at its very end. The
    files belong to the VM wherever it is."""
    catalogue = Catalogue(host.store)
    writes: list[Put | Delete] = [remove(checkpoint) for checkpoint in await host.checkpoints.of(vm)]
    for row in await catalogue.rows():
        if row.value.owner == vm:
            writes += catalogue.plan_remove(row).writes
    return writes


def files_of(luggage: Luggage) -> list[str]:
    """Every file it needs that another host must have as well."""
    memory = [c.memory for c in luggage.family.checkpoints if c.memory is not None]
    return [*(path for path, layer in luggage.family.layers.items() if layer.local), *memory]


async def shared_layers(host: Host, record: VmRecord) -> Sequence[Blocker]:
    """What keeps a VM here: layers that another VM of this host reads as well. Two hosts would merge and delete them
    without knowing of each other."""
    points = await host.checkpoints.of(record.id)
    configs = [record.config, *(p.config for p in points if p.config is not None)]
    layers = (s for c in configs for d in c.disks for s in d.source.layers() if d.writes or d.source.backing)
    foreign = await used_by_others(host, record.id)
    found = {s.path: foreign[real] for s in layers if (real := os.path.realpath(s.path)) in foreign}
    return [_shared(path, name) for path, name in found.items()]


def _shared(path: str, name: str) -> Blocker:
    return Blocker(
        kind=BlockerKind.VOLUME_BUSY,
        text=f"layer {path} is also read by vm {name!r}, which stays here",
        advice="make one of the two from a full copy ('hostler checkpoint apply ... --new NAME --full')",
    )


def missing(luggage: Luggage, here: dict[str, int], there: dict[str, int], name: str) -> Iterable[Blocker]:
    """The files of checkpoints that the target has not, or has others of the same name. Inode numbers by path."""
    for path in files_of(luggage):
        if here.get(path) is None or here[path] != there.get(path):
            found = "is another file" if path in here else "does not exist"
            yield Blocker(
                kind=BlockerKind.VOLUME_NOT_SHARED,
                text=f"a checkpoint needs {path}, which {found} on {name}",
                advice="put its volumes on storage that both hosts mount at the same path, or delete the checkpoint",
            )
