"""A new VM from a checkpoint: another id, other MAC addresses, another generation id.

    disks      new layers on those of the checkpoint (linked), or whole copies of its disks
    define     the VM, off

A linked VM reads the layers of the checkpoint: they stay as they are for as long as it exists.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from hostler.host.actor import VmActor, vm_key
from hostler.host.checkpoints.layer_changes import layer_volume, remove_layer, together, written
from hostler.host.checkpoints.layers import on_top, with_sources
from hostler.host.checkpoints.new_layers import layer_path
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.roster import Roster
from hostler.host.steps import JobContext, Step
from hostler.model.base import utc_now
from hostler.model.disk import Disk, DiskSource, ImageFormat, SourceKind
from hostler.model.errors import AlreadyExists
from hostler.model.job import Job, Progress
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.model.volume import Volume
from hostler.storage.catalogue import Catalogue, real_target
from hostler.storage.formats import SUFFIX
from hostler.store.contract import ABSENT, Check, CheckFailed, Put, Transaction

STATES = frozenset({VmState.OFF, VmState.RUNNING, VmState.PAUSED, VmState.SAVED, VmState.CRITICAL})


class Cloning:
    """One VM being made. `config`: as it will be, with the disks' sources as they are in the checkpoint."""

    def __init__(self, host: Host, config: VmConfig, token: str, full: bool) -> None:
        self._host = host
        self._config = config
        self._token = token
        self._full = full

    def chain(self, disk: Disk) -> DiskSource:
        """What is to be behind a disk."""
        if disk.id not in {d.id for d in written(self._config)}:
            return disk.source
        if self._full:
            return self._copy(disk)
        return on_top(disk.source, self._token, layer_path(self._host, self._config.id, disk, self._token))

    def _copy(self, disk: Disk) -> DiskSource:
        base = disk.source.base
        format = base.format if base.kind is SourceKind.VOLUME else ImageFormat.QCOW2
        directory = Path(real_target(base.path)).parent if base.kind is SourceKind.VOLUME else self._host.paths.volumes
        name = f"{self._config.name[:60]}-{disk.id}.{self._token}{SUFFIX[format]}"
        return DiskSource(path=str(directory / name), format=format, size=disk.source.size)

    def _new(self) -> list[Disk]:
        return written(with_sources(self._config, self.chain))

    def defined(self) -> bool:
        """Whether the VM is there."""
        return self._config.id in self._host.actors

    async def make(self, context: JobContext) -> None:
        before = {disk.id: disk for disk in self._config.disks}
        for number, disk in enumerate(self._new()):
            if os.path.exists(disk.source.path):
                continue
            if not self._full:
                await self._host.layers.create(disk.source)
                continue

            def show(fraction: float, done: int = number) -> None:
                whole = (done + fraction) / len(self._new())
                context.progress(Progress(fraction=whole, text="copying the disks"))

            source = before[disk.id].source
            await self._host.layers.flatten(source, disk.source.path, disk.source.format, show)

    async def unmake(self, _context: JobContext) -> None:
        if not self.defined():
            for disk in self._new():
                await asyncio.to_thread(remove_layer, disk.source.path)

    async def define(self, context: JobContext) -> None:
        context.no_return()
        if not self.defined():
            await self._insert()
        context.result(self._host.actors[self._config.id].record.to_json())

    async def _insert(self) -> None:
        config = with_sources(self._config, self.chain)
        if any(a.record.name == config.name for a in self._host.actors.values()):
            raise AlreadyExists(f"vm {config.name}", "a VM of this name exists on this host", "choose another name")
        catalogue = Catalogue(self._host.store)
        volumes = [catalogue.plan_add(self._volume(config, disk)) for disk in self._new()]
        record = VmRecord(config=config)
        key = vm_key(record.id)
        put = Transaction([Put(key, record.to_json())], [Check(key, ABSENT)])
        try:
            revision = await self._host.store.commit(together(put, *volumes))
        except CheckFailed as error:
            raise AlreadyExists(f"vm {config.name}", f"{error.key} exists already", "try again") from error
        Roster(self._host).add(record, revision)

    def _volume(self, config: VmConfig, disk: Disk) -> Volume:
        if not self._full:
            return layer_volume(config, disk, disk.source)
        source = disk.source
        name = f"{config.name[:60]}-{disk.id}.{self._token}"
        return Volume(name=name, path=source.path, format=source.format, size=source.size, created=utc_now())

    def steps(self) -> Sequence[Step]:
        """Everything, in order."""
        return (Step("disks", self.make, self.unmake), Step("define", self.define, insist=self.defined))


def cloning(host: Host, params: Params) -> Cloning:
    """The work that a job's parameters describe."""
    config = VmConfig.model_validate(params["config"])
    return Cloning(host, config, str(params["token"]), bool(params.get("full")))


def steps(host: Host, _actor: VmActor, params: Params) -> Sequence[Step]:
    return cloning(host, params).steps()


async def resume_at(host: Host, _actor: VmActor, job: Job) -> str | None:
    return "define" if cloning(host, job.params).defined() else None


OPERATION = Operation("checkpoint.clone", "make a new VM from a checkpoint", STATES, steps, resume_at)
