"""Make a disk of several layers one image, while its VM runs: everything below goes into the top layer.

    copy       QEMU copies into the top layer; at its end it uses that alone; flushed
    record     the disk is that one image
    clean-up   what is below is closed: export, claims, rights

The top layer is the same file all the time, and with what is below it reads the same before, during and after the
copying: whenever somebody dies the record is right. It may forget what is below only when all of the copy is on the
storage. A daemon that comes later asks QEMU which layers it has: one, and the copying is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import structlog

from hostler.host.actor import VmActor
from hostler.host.blocks import Blocks
from hostler.host.checkpoints.layer_changes import NOTHING, rewrite
from hostler.host.checkpoints.merging import Merging
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.disk_edit import edit_disk, source_of
from hostler.host.operations.disks import require_disk
from hostler.host.progress import CopyProgress
from hostler.host.resources import renew
from hostler.host.steps import JobContext, Step
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import HostlerError
from hostler.model.job import Job, StepState
from hostler.model.vm import VmState
from hostler.qemu.blockdev import layer_node
from hostler.storage.catalogue import Catalogue
from hostler.storage.claims import thing_of
from hostler.store.contract import Transaction

log = structlog.get_logger()


class Flattening:
    """One disk. `params`: `disk_id`; `source`, its chain as it was; `limit` in bytes/s."""

    def __init__(self, host: Host, actor: VmActor, params: Params) -> None:
        self._host = host
        self._actor = actor
        self._disk_id = str(params["disk_id"])
        self._source = source_of(params["source"])
        self._limit = int(cast(int, params["limit"]))
        self.copied = False
        """Whether everything is in the top layer, and on the storage."""

    @property
    def disk(self) -> Disk:
        """As it is on record."""
        return require_disk(self._actor.record, self._disk_id)

    @property
    def before(self) -> Disk:
        """On all its layers."""
        return self.disk.model_copy(update={"source": self._source})

    @property
    def after(self) -> Disk:
        """On the top one alone."""
        return self.disk.at(self._source)

    @property
    def recorded(self) -> bool:
        """Whether the record says that it is one image."""
        return self.disk.source.backing is None

    @property
    def _blocks(self) -> Blocks:
        return self._actor.present().blocks

    async def _flat(self) -> bool:
        """Whether QEMU has the top layer alone."""
        return (await self._blocks.layers()).get(self._disk_id) == (layer_node(self.before, self._source),)

    # copy

    async def copy(self, context: JobContext) -> None:
        if not (self.copied or self.recorded):
            if not await self._flat():
                await self._stream(context)
            context.no_return()
            await self._blocks.flush(self.after)
        self.copied = True

    async def _stream(self, context: JobContext) -> None:
        """How it ended is not always to be learnt: which layers QEMU has always is."""
        name = job_name(context.job)
        show = CopyProgress(context)
        try:
            if (found := await self._blocks.job(name)) is not None and found.error:
                await self._blocks.forget(name)
            await self._blocks.stream(name, self.before, speed=self._limit)
            await self._blocks.watch(name, show.block_job)
        except HostlerError:
            if not await self._flat():
                raise
        await self._blocks.forget(name)

    async def uncopy(self, context: JobContext) -> None:
        """Let QEMU stop. What it has copied is what the layers below say anyway."""
        if self._actor.machine is not None and not self.recorded:
            await self._blocks.cancel(job_name(context.job))
            await self._blocks.forget(job_name(context.job))

    # record

    async def record(self, context: JobContext) -> None:
        context.no_return()
        if self.recorded:
            return

        def source(disk: Disk) -> DiskSource:
            return self.after.source if disk.id == self._disk_id else disk.source

        await rewrite(self._host, self._actor, source, await self._volume_alone())

    async def _volume_alone(self) -> Transaction:
        """The record of the volume that the disk is: it builds on nothing."""
        catalogue = Catalogue(self._host.store)
        row = await catalogue.find(self._source.path)
        if row is None:
            return NOTHING
        volume = row.value
        return catalogue.plan_change(row, volume.but(backing=None, generation=volume.generation + 1))

    # clean-up

    async def clean_up(self, context: JobContext) -> None:
        """Close what is below, everywhere; delete of it what was made for this VM alone and nobody needs."""
        lower = list(self._source.layers())[1:]
        if self._actor.machine is not None:
            await self._blocks.forget(job_name(context.job))
        config = self._actor.record.config
        used = {thing_of(s) for d in config.disks for s in d.source.layers() if s.path}
        for layer in lower:
            if self._actor.machine is not None:
                await self._blocks.close(self._disk_id, layer_node(self.before, layer))
            if thing_of(layer) not in used:
                await self._host.resources.revoke(config, self.before.at(layer))
        if self._actor.machine is not None:
            await renew(config, self.disk)
        was = edit_disk(self._actor.record, self._disk_id, lambda d: d.but(source=self._source)).config
        await Merging(self._host, self._actor, context).remove_unneeded(was)
        freed = [layer.path for layer in lower if thing_of(layer) not in used]
        log.info("disk.flattened", vm=self._actor.record.id, disk=self._disk_id, freed=freed)
        context.result({"disk": self._disk_id, "path": self._source.path, "freed": [*freed]})


def job_name(job: Job) -> str:
    """QEMU's name of the copying."""
    return f"flatten-{job.id}"


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    work = Flattening(host, actor, params)
    return (
        Step("copy", work.copy, work.uncopy, insist=lambda: work.copied),
        Step("record", work.record, insist=lambda: True),
        Step("clean-up", work.clean_up, insist=lambda: True),
    )


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """What is recorded is finished; what was copied, and flushed, is recorded. QEMU goes on copying by itself."""
    states = {step.name: step.state for step in job.steps}
    if Flattening(host, actor, job.params).recorded:
        return "clean-up"
    if states["copy"] is StepState.DONE:
        return "record"
    return "copy" if actor.machine is not None and states["copy"] is not StepState.PENDING else None


OPERATION = Operation("disk.flatten", "flatten a disk", frozenset({VmState.RUNNING, VmState.PAUSED}), steps, resume_at)
