"""Make a checkpoint: put a new, empty layer on each written disk, at one moment.

    layers     the files of the new layers
    take       the VM's QEMU may open them
    record     the new chains, the checkpoint "creating": safe before QEMU has them, for an empty layer changes nothing
    freeze     QEMU has them, all at one moment; with the guest's file systems frozen, or with its memory, where asked
    ready      the checkpoint counts

From `freeze` on it goes forward only. A QEMU that dies there leaves a checkpoint of the moment of its death, at the
latest: what was written before is below the new layers or in them.

A checkpoint with memory is written while the guest runs; QEMU stops it for the last pages, the disks get their new
layers at that moment, and it goes on when the rest is written. Where the memory is lost (the daemon or QEMU died in the
middle), but the disks have their new layers, it becomes one of the disks alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import structlog

from hostler.host.actor import VmActor
from hostler.host.checkpoints.book import put, remove
from hostler.host.checkpoints.layer_changes import (
    delete_layers,
    forget_layers,
    layer_volume,
    remove_layer,
    rewrite,
    together,
)
from hostler.host.checkpoints.layers import without_top
from hostler.host.checkpoints.new_layers import NewLayers
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.checkpoint_delete import Deletion, ids_of
from hostler.host.operations.checkpoint_freeze import Freezing, require_room
from hostler.host.steps import JobContext, Step
from hostler.model.checkpoint import Checkpoint, CheckpointKind, CheckpointState
from hostler.model.job import Job, StepState
from hostler.model.vm import VmState
from hostler.storage.catalogue import Catalogue
from hostler.store.contract import Transaction

log = structlog.get_logger()

STATES = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.OFF, VmState.SAVED})


class Creation:
    """One checkpoint being made."""

    def __init__(self, host: Host, actor: VmActor, new: NewLayers) -> None:
        self._host = host
        self._actor = actor
        self._new = new
        self.freezing = Freezing(host, actor, new)

    # layers

    async def make(self, _context: JobContext) -> None:
        if self._new.point.kind is CheckpointKind.FULL and self._actor.machine is not None:
            require_room(self._actor.subject, self._new.memory_path(), self._actor.record.config.memory)
        for disk in self._new.planned():
            if not os.path.exists(disk.source.path):
                await self._host.layers.create(disk.source)

    async def unmake(self, _context: JobContext) -> None:
        if not self._new.recorded():
            for disk in self._new.planned():
                await asyncio.to_thread(remove_layer, disk.source.path)

    # take

    async def take(self, _context: JobContext) -> None:
        if self._actor.machine is not None:
            for disk in self._new.planned():
                await self._host.resources.grant(self._actor.record.config, disk.at(disk.source))

    async def give_back(self, _context: JobContext) -> None:
        if not self._new.recorded():
            for disk in self._new.planned():
                await self._host.resources.revoke(self._actor.record.config, disk.at(disk.source))

    # record

    async def record(self, _context: JobContext) -> None:
        if self._new.recorded():
            return
        record, catalogue = self._actor.record, Catalogue(self._host.store)
        made = self._new.point.but(config=record.config, parent=record.checkpoint, state=CheckpointState.CREATING)
        volumes = [catalogue.plan_add(layer_volume(record.config, d, d.source)) for d in self._new.planned()]
        extra = together(Transaction([put(made)]), *volumes)
        await rewrite(self._host, self._actor, self._new.chain, extra, lambda now: now.but(checkpoint=made.id))

    async def forget(self, _context: JobContext) -> None:
        """Back to the old chains, unless QEMU has the new ones, or may have them: then it has happened."""
        if not self._new.recorded() or self.freezing.done:
            return
        made = await self._stored()
        if await self.freezing.may_be_in_qemu():
            log.warning("checkpoint.not-undone", vm=self._actor.record.id, checkpoint=self._new.point.id)
            await self._write_ready()
            return
        paths = [d.source.path for d in self._new.planned()]
        layers, rows = await forget_layers(self._host, paths)
        extra = together(Transaction([remove(made)]), layers)
        token = self._new.token
        await rewrite(
            self._host,
            self._actor,
            lambda disk: without_top(disk.source, token),
            extra,
            lambda now: now.but(checkpoint=made.parent),
        )
        await delete_layers(self._host, rows)

    async def _stored(self) -> Checkpoint:
        points = await self._host.checkpoints.of(self._actor.record.id)
        return next((p for p in points if p.id == self._new.point.id), self._new.point)

    # ready

    async def ready(self, context: JobContext) -> None:
        made = await self._write_ready()
        context.result(made.to_json())

    async def _write_ready(self) -> Checkpoint:
        made = await self._stored()
        memory = self._new.memory_path() if self._new.point.kind is CheckpointKind.FULL else None
        if memory is not None and not os.path.exists(memory):
            memory = None
        kind = CheckpointKind.DISKS if self._new.point.kind is CheckpointKind.FULL and memory is None else made.kind
        made = made.but(state=CheckpointState.READY, kind=kind, memory=memory)
        await self._actor.set(durable=True, extra=Transaction([put(made)]))
        self._host.events.publish("checkpoint", made.id, made)
        return made

    def steps(self) -> Sequence[Step]:
        """Everything, in order."""
        return (
            Step("layers", self.make, self.unmake),
            Step("take", self.take, self.give_back),
            Step("record", self.record, self.forget),
            Step("freeze", self.freezing.freeze, self.freezing.unfreeze, insist=self.freezing.has_happened),
            Step("ready", self.ready, insist=lambda: True),
        )


def creation(host: Host, actor: VmActor, params: Params) -> Creation:
    """The creation that a job's parameters describe."""
    point = Checkpoint.model_validate(params["checkpoint"])
    return Creation(host, actor, NewLayers(host, actor, point, str(params["token"])))


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    """Automatic ones that must go first, so that no chain gets too long; the checkpoint; automatic ones too many."""
    return (
        *_deletion(host, actor, params, "room"),
        *creation(host, actor, params).steps(),
        *_deletion(host, actor, params, "prune"),
    )


def _deletion(host: Host, actor: VmActor, params: Params, name: str) -> Sequence[Step]:
    given = params.get(name)
    return Deletion(host, actor, *ids_of(given), prefix=f"{name}-").steps() if isinstance(given, dict) else ()


FORWARD = ("prune-forget", "prune-merge", "freeze", "room-forget", "room-merge")
"""Steps from which there is no way back, the last one first."""


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """From the moment on at which QEMU may have the new layers: forward. Where memory was being written and the disks
    have not got their new layers, the checkpoint is undone."""
    begun = {s.name for s in job.steps if s.state is not StepState.PENDING}
    step = next((name for name in FORWARD if name in begun), None)
    if step != "freeze" or actor.machine is None:
        return step
    made = creation(host, actor, job.params)
    return step if await made.freezing.may_go_forward() else None


OPERATION = Operation("checkpoint.create", "make a checkpoint", STATES, steps, resume_at)
