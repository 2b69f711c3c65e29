"""Overlays: a new, empty layer on an image that is only read, as a disk of a VM.

    recorded as being made, with what it builds on --> file made --> recorded as ready

At no moment is there a record of it without its base, with which it would read as zeroes. It belongs to nobody but
itself: no merge of checkpoints goes from it into the image below, which others may read as well.
"""

from __future__ import annotations

import asyncio
import os
import secrets

from hostler.host.checkpoints.layer_changes import delete_layers, forget_layers
from hostler.host.checkpoints.layers import all_fixed, on_top
from hostler.host.context import Host
from hostler.host.steps import JobContext
from hostler.model.base import utc_now
from hostler.model.disk import Disk, DiskSource, ImageFormat, SourceKind
from hostler.model.errors import AlreadyExists, InUse, InvalidInput
from hostler.model.names import MAX_NAME
from hostler.model.vm import VmRecord
from hostler.model.volume import Volume, VolumeState
from hostler.storage.catalogue import Catalogue
from hostler.storage.claims import real_path


async def plan_overlay(host: Host, record: VmRecord, disk: Disk) -> tuple[Disk, str]:
    """That disk on a new layer over what it was to be, and the name of the layer's volume. InUse when somebody writes
    the image, InvalidInput for what is no image."""
    base = disk.source
    if base.kind not in (SourceKind.VOLUME, SourceKind.CHAIN):
        raise InvalidInput(f"volume {base.path}", f"is no image in a file ({base.kind})", "attach it as it is")
    _refuse_written(host, base)
    name = await _free_name(host, f"{record.name[: MAX_NAME - 40]}-{disk.id}")
    path = host.volumes.service.check_new(name, base.size, ImageFormat.QCOW2, None)
    return disk.but(source=on_top(all_fixed(base), secrets.token_hex(4), os.path.realpath(path))), name


def _refuse_written(host: Host, base: DiskSource) -> None:
    """Of what changes below it an overlay makes nonsense. (Claims see only those VMs that run.)"""
    path = real_path(base.path)
    for actor in host.actors.values():
        for disk in actor.record.config.disks:
            if disk.writes and disk.source.local and disk.source.path and real_path(disk.source.path) == path:
                raise InUse(
                    f"volume {base.path}",
                    f"is disk {disk.id} of vm {actor.record.name}, which writes it",
                    "detach it there first, or copy it with 'hostler volume clone'",
                    holder=actor.record.id,
                )


async def _free_name(host: Host, stem: str) -> str:
    """The first one that neither a volume nor a file of the volume directory has."""
    taken = {volume.name for volume in await host.volumes.service.records()}
    number, name = 2, stem
    while name in taken or await asyncio.to_thread(os.path.lexists, host.paths.volumes / f"{name}.qcow2"):
        name, number = f"{stem}-{number}", number + 1
    return name


class Overlay:
    """The overlay that a job makes; `disk` is on it already. `name`: of its volume."""

    def __init__(self, host: Host, disk: Disk, name: str) -> None:
        self._host = host
        self._layer = disk.source
        self._name = name

    async def make(self, context: JobContext) -> None:
        """The record, then the file. AlreadyExists when another one has the name or the path."""
        catalogue = Catalogue(self._host.store)
        row = await catalogue.find(self._layer.path)
        if row is None:
            if await asyncio.to_thread(os.path.lexists, self._layer.path):
                raise AlreadyExists(f"file {self._layer.path}", "exists already", "try again: another name is taken")
            row = await catalogue.add(await self._volume(context.job.id))
        elif row.value.made_by != context.job.id:
            raise AlreadyExists(f"file {self._layer.path}", f"is volume {row.id!r} by now", "try again")
        if row.value.state is not VolumeState.CREATING:
            return
        if not await asyncio.to_thread(os.path.lexists, self._layer.path):
            await self._host.layers.create(self._layer)
        row = await catalogue.change(row, row.value.but(state=VolumeState.READY, job=""))
        self._host.events.publish("volume", row.id, row.value)

    async def _volume(self, job: str) -> Volume:
        assert self._layer.backing is not None
        pool = await self._host.pools.pool_at(self._layer.path)
        return Volume(
            name=self._name,
            path=self._layer.path,
            format=self._layer.format,
            size=self._layer.size,
            backing=self._layer.backing.path,
            pool=pool.name if pool else "",
            node=self._layer.node,
            made_by=job,
            job=job,
            state=VolumeState.CREATING,
            created=utc_now(),
        )

    async def remove(self, job: str) -> None:
        """Delete what that job has made, and nothing else. Harmless when there is nothing."""
        row = await Catalogue(self._host.store).find(self._layer.path)
        if row is None or row.value.made_by != job:
            return
        going, rows = await forget_layers(self._host, [self._layer.path])
        await self._host.store.commit(going)
        await delete_layers(self._host, rows)
        self._host.events.publish("volume", row.id, None)
