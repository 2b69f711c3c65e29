"""Changing what is behind a VM's disks: the VM's record, the checkpoints that share its layers, the claims and the
records of the layers in one durable transaction."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import structlog

from hostler.host.actor import VmActor
from hostler.host.checkpoints.layers import Layer, with_sources
from hostler.host.context import Host
from hostler.model.base import utc_now
from hostler.model.checkpoint import Checkpoint, CheckpointState
from hostler.model.disk import Disk, DiskSource, Media, SourceKind
from hostler.model.errors import Busy
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.model.volume import Volume, VolumeState
from hostler.storage.catalogue import Catalogue
from hostler.storage.layer_images import can_take
from hostler.storage.qemu_img import leftovers
from hostler.store.contract import Check, CheckFailed, Delete, Put, Transaction
from hostler.store.table import Row

log = structlog.get_logger()

TRIES = 5
NOTHING = Transaction([])


def together(*parts: Transaction) -> Transaction:
    """One transaction of several about different keys."""
    writes: list[Put | Delete] = [write for part in parts for write in part.writes]
    checks: list[Check] = [check for part in parts for check in part.checks]
    return Transaction(writes, checks, durable=True)


def written(config: VmConfig) -> list[Disk]:
    """The disks that a checkpoint freezes: those the guest can change. Drives for removable media stay as they are."""
    return [d for d in config.disks if d.writes and d.media is Media.DISK and d.source.kind is not SourceKind.EMPTY]


async def rewrite(
    host: Host,
    actor: VmActor,
    source_of: Callable[[Disk], DiskSource],
    extra: Transaction = NOTHING,
    edit: Callable[[VmRecord], VmRecord] = lambda record: record,
) -> None:
    """Change what is behind each disk, by `source_of`, and what `edit` changes beside. Whatever holds claims holds
    those of the new layers then, and no others. Busy when others are always quicker."""

    def change(now: VmRecord) -> VmRecord:
        later = with_sources(now.next_config, source_of) if now.next_config is not None else None
        return edit(now.but(config=with_sources(now.config, source_of), next_config=later))

    for left in reversed(range(TRIES)):
        planned = change(actor.record)
        claims = NOTHING
        if planned.state is not VmState.OFF:
            claims = await host.claims.plan_hold(planned.id, planned.config.disks, planned.generation)
        try:
            await actor.change(change, together(claims, extra), durable=True)
            return
        except CheckFailed as error:
            if not left:
                raise Busy(actor.subject, "others change its disks at the same moment", "try again") from error


# the records of layers


def layer_volume(vm: VmConfig, disk: Disk, layer: DiskSource) -> Volume:
    """How a layer made for a VM is known. The name says whose it is; a token keeps it unique."""
    below = layer.backing.path if layer.backing is not None else None
    return Volume(
        name=f"{vm.name[:60]}.{disk.id}.{layer.node}",
        path=os.path.realpath(layer.path),
        format=layer.format,
        size=layer.size,
        backing=below,
        pool=layer.pool,
        owner=vm.id,
        node=layer.node,
        created=utc_now(),
    )


async def forget_layers(host: Host, paths: Iterable[str]) -> tuple[Transaction, list[Row[Volume]]]:
    """The transaction with which these layers are about to be deleted, and their records as it leaves them. A daemon
    that is killed after it deletes the files at its next start."""
    catalogue, parts, rows = Catalogue(host.store), [], []
    for path in paths:
        row = await catalogue.find(path)
        if row is not None:
            going = row.value.but(state=VolumeState.DELETING)
            parts.append(catalogue.plan_change(row, going))
            rows.append(Row(row.id, going, row.revision))
    return together(*parts), rows


async def delete_layers(host: Host, rows: Sequence[Row[Volume]]) -> None:
    """Delete the files of layers whose records say so, then the records."""
    catalogue = Catalogue(host.store)
    for row in rows:
        try:
            await asyncio.to_thread(remove_layer, row.value.path)
        except OSError as error:  # its record says that it is to go, and the next daemon tries again
            log.warning("checkpoint.layer-not-removed", path=row.value.path, why=str(error))
            continue
        now = await catalogue.find(row.id)
        if now is not None and now.value.state is VolumeState.DELETING:
            with suppress(CheckFailed):  # somebody else tidies up, too
                await host.store.commit(catalogue.plan_remove(now))


def remove_layer(path: str) -> None:
    """Delete a layer's file, and what is left of one that was being made. Harmless when there is none."""
    for part in leftovers(path):
        part.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(path)


# what there is


async def layers_of(
    host: Host, record: VmRecord, points: Sequence[Checkpoint], before: VmConfig | None = None
) -> tuple[list[Layer], set[str]]:
    """Every layer of a VM's disks and checkpoints, and the paths that are held: by what the VM writes now, by each
    checkpoint that is not being deleted, and by volumes that build on a layer without being a disk of the VM. `before`:
    what the VM was, of which nothing is held."""
    here = [record.config, *([record.next_config] if record.next_config else [])]
    configs = [*here, *(p.config for p in points if p.config is not None)]
    configs += [before] if before is not None else []
    chains = [d.source for c in configs for d in c.disks if d.source.kind is not SourceKind.EMPTY]
    largest: dict[str, int] = {}
    known: dict[str, DiskSource] = {}
    for chain in chains:
        for layer in chain.layers():
            known[layer.path] = layer
            largest[layer.path] = max(chain.size, largest.get(layer.path, 0))
    foreign = await used_by_others(host, record.id)
    made: set[str] = set()
    found: list[Layer] = []
    held = {d.source.path for c in here for d in c.disks}
    held |= {s.path for p in points if p.state is not CheckpointState.MERGING for s in p.frozen().values()}
    for row in await Catalogue(host.store).rows():
        volume = row.value
        if volume.owner == record.id:
            made.add(volume.path)
        if volume.backing is not None and volume.path not in known:
            found.append(Layer(volume.path, volume.backing, fixed=True))
            held.add(volume.path)
    for path, layer in known.items():
        fixed = os.path.realpath(path) in foreign or layer.fixed or not can_take(layer, largest[path])
        parent = layer.backing.path if layer.backing is not None else None
        found.append(Layer(path, parent, made=os.path.realpath(path) in made, fixed=fixed))
    return found, held


async def used_by_others(host: Host, vm: str) -> dict[str, str]:
    """Layers that other VMs of this host, or their checkpoints, read, by their paths without links; with the VM's
    name."""
    found: dict[str, str] = {}
    for owner, config in await _configs(host):
        if owner != vm:
            for path in (layer.path for disk in config.disks for layer in disk.source.layers()):
                found[os.path.realpath(path)] = config.name
    return found


async def _configs(host: Host) -> list[tuple[str, VmConfig]]:
    """Every configuration there is here, with the id of its VM: of VMs, of their next start, of checkpoints."""
    found = []
    for actor in host.actors.values():
        record = actor.record
        found += [(record.id, c) for c in (record.config, record.next_config) if c is not None]
    return found + [(p.vm, p.config) for p in await host.checkpoints.all() if p.config is not None]
