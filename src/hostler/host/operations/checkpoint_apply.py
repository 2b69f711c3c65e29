"""Apply a checkpoint: what the VM is becomes what it was then. What it was before is gone, unless a checkpoint of it is
made first.

    layers     new, empty layers on those of the checkpoint; a copy of its memory
    end        the VM is turned off, if it runs and that was asked for; a saved state is given up
    switch     the record: disks and devices as they were then; saved, where the checkpoint has memory
    tidy       layers that nobody needs any more go away

What stays as it is: name, notes, adapters (but those of a checkpoint with memory are in its memory), autostart and
shut-down settings. The guest can see by the VM generation id that it has gone back in time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.checkpoints.layer_changes import layer_volume, remove_layer, together, written
from hostler.host.checkpoints.layers import on_top, with_sources
from hostler.host.checkpoints.merging import Merging
from hostler.host.checkpoints.new_layers import layer_path
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations import checkpoint_create
from hostler.host.operations.launching import end_machine, unclaim
from hostler.host.steps import JobContext, Step
from hostler.model.checkpoint import Checkpoint
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import Busy
from hostler.model.job import Job, StepState
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.qemu import access
from hostler.storage.catalogue import Catalogue
from hostler.storage.layer_images import copy_file
from hostler.store.contract import CheckFailed, Transaction

STATES = frozenset({VmState.OFF, VmState.RUNNING, VmState.PAUSED, VmState.SAVED, VmState.CRITICAL})
TRIES = 5


class Applying:
    """One checkpoint being applied. `token` names the new layers, `generation` is the new VM generation id."""

    def __init__(self, host: Host, actor: VmActor, point: Checkpoint, token: str, generation: str) -> None:
        self._host = host
        self._actor = actor
        self._point = point
        self._token = token
        self._generation = generation

    def chain(self, disk: Disk) -> DiskSource:
        """What is to be behind a disk of the checkpoint."""
        if disk.id not in {d.id for d in written(self._then())}:
            return disk.source
        return on_top(disk.source, self._token, layer_path(self._host, self._point.vm, disk, self._token))

    def _then(self) -> VmConfig:
        assert self._point.config is not None
        return self._point.config

    def _new(self) -> list[Disk]:
        return written(with_sources(self._then(), self.chain))

    def config(self, now: VmConfig) -> VmConfig:
        """What the VM is to be."""
        return applied(self._point, now, self._generation).but(disks=with_sources(self._then(), self.chain).disks)

    def switched(self) -> bool:
        """Whether it has happened."""
        return self._actor.record.config.generation_id == self._generation

    # layers

    async def make(self, _context: JobContext) -> None:
        for disk in self._new():
            if not os.path.exists(disk.source.path):
                await self._host.layers.create(disk.source)
        if self._point.memory is not None and not os.path.exists(self._copied()):
            directory = os.path.dirname(self._copied())
            await asyncio.to_thread(access.prepare_directory, directory, self._actor.record.config.run_as)
            await copy_file(self._point.memory, self._copied())

    def _copied(self) -> str:
        return f"{self._host.resources.saved_path(self._actor.record.config)}.{self._token}"

    async def unmake(self, _context: JobContext) -> None:
        if not self.switched():
            for disk in self._new():
                await asyncio.to_thread(remove_layer, disk.source.path)
            self._host.resources.discard_saved(self._copied())

    # end

    async def end(self, context: JobContext) -> None:
        actor, host = self._actor, self._host
        record = actor.record
        if record.state is VmState.OFF or self.switched():
            return
        context.no_return()
        if record.state is VmState.SAVED:
            await unclaim(host, actor, state=VmState.OFF, saved=None)
            host.resources.discard_saved(host.resources.saved_path(record.config))
            return
        if record.state is not VmState.STOPPING:
            await actor.set(state=VmState.STOPPING)
        await end_machine(host, actor)
        await host.resources.release(record.config)
        await unclaim(host, actor, state=VmState.OFF, reason=None, reason_text="")

    # switch

    async def switch(self, context: JobContext) -> None:
        if not self.switched():
            await context.remember(before=self._actor.record.config.to_json())
        context.no_return()
        saved = None
        if self._point.memory is not None:
            saved = self._host.resources.saved_path(self._actor.record.config)
            if os.path.exists(self._copied()):
                await asyncio.to_thread(os.replace, self._copied(), saved)
        if not self.switched():
            await self._record(saved)

    async def _record(self, saved: str | None) -> None:
        def edit(now: VmRecord) -> VmRecord:
            state = VmState.OFF if saved is None else VmState.SAVED
            config = self.config(now.config)
            return now.but(config=config, next_config=None, checkpoint=self._point.id, state=state, saved=saved)

        for left in reversed(range(TRIES)):
            planned = edit(self._actor.record)
            catalogue = Catalogue(self._host.store)
            parts = [catalogue.plan_add(layer_volume(planned.config, d, d.source)) for d in self._new()]
            if saved is not None:
                claims = await self._host.claims.plan_hold(planned.id, planned.config.disks, planned.generation)
                parts.append(claims)
            try:
                await self._actor.change(edit, together(Transaction([]), *parts), durable=True)
                return
            except CheckFailed as error:
                if not left:
                    raise Busy(self._actor.subject, "others claim its disks at the same moment", "try again") from error

    async def tidy(self, context: JobContext) -> None:
        before = VmConfig.model_validate(context.job.data["before"])
        await Merging(self._host, self._actor, context).remove_unneeded(before)
        context.result(self._actor.record.to_json())

    def steps(self) -> Sequence[Step]:
        """Everything, in order."""
        return (
            Step("layers", self.make, self.unmake),
            Step("end", self.end),
            Step("switch", self.switch, insist=self.switched),
            Step("tidy", self.tidy, insist=lambda: True),
        )


def applied(point: Checkpoint, now: VmConfig, generation: str) -> VmConfig:
    """The configuration of that checkpoint, for the VM as it is called and started now."""
    assert point.config is not None
    stays: dict[str, object] = {
        "name": now.name,
        "notes": now.notes,
        "autostart": now.autostart,
        "shutdown": now.shutdown,
        "run_as": now.run_as,
        "generation_id": generation,
    }
    if point.memory is None:
        stays["nics"] = now.nics
    return point.config.but(**stays)


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    """First the checkpoint of what is to be given up, where asked for."""
    point = Checkpoint.model_validate(params["point"])
    apply = Applying(host, actor, point, str(params["token"]), str(params["generation_id"])).steps()
    first = params.get("first")
    if not isinstance(first, dict):
        return apply
    made = checkpoint_create.creation(host, actor, first).steps()
    return (*(_renamed(step) for step in made), *apply)


def _renamed(step: Step) -> Step:
    return Step(f"first-{step.name}", step.do, step.undo, step.insist)


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """A VM that may have been turned off for it gets it; before that, nothing was changed."""
    begun = {s.name for s in job.steps if s.state is not StepState.PENDING}
    return next((name for name in ("tidy", "switch", "end", "first-ready", "first-freeze") if name in begun), None)


OPERATION = Operation("checkpoint.apply", "apply a checkpoint", STATES, steps, resume_at)
