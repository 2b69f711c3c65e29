"""Restore a saved VM: like a start, but its memory comes from the saved state, which is deleted once the guest runs.

The saved file is deleted only after the guest runs; if the daemon dies in between, the next one deletes it, since a
state that has been run on must never be restored again (its disks have moved on).
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import launch, prepare, reserve
from hostler.host.steps import JobContext, Step
from hostler.model.errors import NotFound
from hostler.model.job import Job, StepState
from hostler.model.vm import VmState


def load(actor: VmActor) -> Step:
    """Read the memory from the saved state; the guest stays stopped."""

    async def do(_context: JobContext) -> None:
        assert actor.machine is not None
        if actor.record.saved is None:
            raise NotFound(actor.subject, "has no saved state", "start it with 'hostler vm start'")
        await actor.machine.load_from(actor.record.saved)

    return Step("load", do)


def run(host: Host, actor: VmActor) -> Step:
    """Let the guest go on, and forget the saved state."""

    async def do(context: JobContext) -> None:
        context.no_return()
        assert actor.machine is not None
        saved, record = actor.record.saved, actor.record
        if record.state is VmState.RESTORING:
            await actor.set(durable=True, state=VmState.RUNNING, saved=None)
        await actor.machine.run()
        if saved is not None:
            host.resources.discard_saved(saved)

    return Step("run", do)


def steps(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    return (
        reserve(host, actor, VmState.RESTORING, VmState.SAVED),
        prepare(host, actor),
        launch(host, actor, incoming=True),
        load(actor),
        run(host, actor),
    )


async def resume_at(_host: Host, actor: VmActor, job: Job) -> str | None:
    """Once the step `run` has begun the guest may have run: only forward from there."""
    begun = any(s.name == "run" and s.state is not StepState.PENDING for s in job.steps)
    return "run" if begun and actor.machine is not None else None


OPERATION = Operation("vm.restore", "restore", frozenset({VmState.SAVED}), steps, resume_at)
