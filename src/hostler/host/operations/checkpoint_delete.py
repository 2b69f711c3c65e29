"""Delete checkpoints, while the VM runs: what nobody holds any more is merged into what is below it, or removed.

    mark       the checkpoints are being deleted: nobody can apply them any more
    merge      layer by layer, each recorded when it is done
    forget     the checkpoints, and their memory

Merging takes as long as there is to copy. Broken off, everything still reads as before, but for the deleted
checkpoints, which are left half deleted: deleting them again goes on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.checkpoints.book import put, remove
from hostler.host.checkpoints.layer_changes import remove_layer, together
from hostler.host.checkpoints.merging import Merging
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.steps import JobContext, Step
from hostler.model.checkpoint import Checkpoint, CheckpointState, nearest_left
from hostler.model.job import Job, StepState
from hostler.model.vm import VmRecord, VmState
from hostler.store.contract import Transaction

STATES = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.OFF, VmState.SAVED})


class Deletion:
    """Some checkpoints of one VM being deleted. `prefix` tells its steps apart where it is part of a longer job."""

    def __init__(self, host: Host, actor: VmActor, ids: Sequence[str], memory: Sequence[str], prefix: str = "") -> None:
        self._host = host
        self._actor = actor
        self._ids = frozenset(ids)
        self._memory = tuple(memory)
        self._prefix = prefix
        self._merging: Merging | None = None
        self._merged = False

    async def _points(self) -> list[Checkpoint]:
        points = await self._host.checkpoints.of(self._actor.record.id)
        return [p for p in points if p.id in self._ids]

    async def mark(self, _context: JobContext) -> None:
        await self._all_in(CheckpointState.MERGING)

    async def unmark(self, _context: JobContext) -> None:
        """Only while nothing was merged: afterwards they are no more what they were."""
        if self._merging is None or not self._merging.changed:
            await self._all_in(CheckpointState.READY)

    async def _all_in(self, state: CheckpointState) -> None:
        changed = [p.but(state=state) for p in await self._points() if p.state is not state]
        if changed:
            await self._actor.set(durable=True, extra=Transaction([put(p) for p in changed]))
        for point in changed:
            self._host.events.publish("checkpoint", point.id, point)

    async def merge(self, context: JobContext) -> None:
        self._merging = Merging(self._host, self._actor, context)
        await self._merging.run()
        self._merged = True
        context.no_return()

    async def forget(self, _context: JobContext) -> None:
        every = await self._host.checkpoints.of(self._actor.record.id)
        gone = [p for p in every if p.id in self._ids]
        hung = [p.but(parent=nearest_left(every, self._ids, p.parent)) for p in every if p.parent in self._ids]
        stay = [p for p in hung if p.id not in self._ids]

        def edit(now: VmRecord) -> VmRecord:
            return now.but(checkpoint=nearest_left(every, self._ids, now.checkpoint))

        extra = Transaction([*(remove(p) for p in gone), *(put(p) for p in stay)])
        if gone:
            await self._actor.change(edit, together(extra), durable=True)
        for path in self._memory:
            await asyncio.to_thread(remove_layer, path)
        for point in gone:
            self._host.events.publish("checkpoint", point.id, None)

    def steps(self) -> Sequence[Step]:
        """Everything, in order."""
        return (
            Step(f"{self._prefix}mark", self.mark, self.unmark),
            Step(f"{self._prefix}merge", self.merge, insist=lambda: self._merged),
            Step(f"{self._prefix}forget", self.forget, insist=lambda: True),
        )


def ids_of(params: Params) -> tuple[list[str], list[str]]:
    """The ids and the memory files of the checkpoints that a job's parameters name."""
    ids, memory = params.get("ids"), params.get("memory")
    return (
        [str(i) for i in ids] if isinstance(ids, list) else [],
        [str(m) for m in memory] if isinstance(memory, list) else [],
    )


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    return Deletion(host, actor, *ids_of(params)).steps()


async def resume_at(_host: Host, _actor: VmActor, job: Job) -> str | None:
    """Once something may have been merged only forward."""
    begun = {s.name for s in job.steps if s.state is not StepState.PENDING}
    return next((name for name in ("forget", "merge") if name in begun), None)


OPERATION = Operation("checkpoint.delete", "delete a checkpoint", STATES, steps, resume_at)
