"""Restore a saved VM: like a start, but its memory comes from the saved state, which is deleted once the guest runs.

The record forgets the saved state before the guest may run, since a state that has been run on must never be restored
again (its disks have moved on); the file is deleted only after the guest runs, by the next daemon if this one dies in
between. A guest that certainly did not run (its disk is locked by somebody else) is saved again.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import launch, prepare, reserve
from hostler.host.steps import JobContext, Step
from hostler.model.errors import HostlerError, NotFound
from hostler.model.job import Job, StepState
from hostler.model.machine import RunStatus
from hostler.model.vm import VmState


def load(actor: VmActor) -> Step:
    """Read the memory from the saved state; the guest stays stopped."""

    async def do(_context: JobContext) -> None:
        machine = actor.present()
        if actor.record.saved is None:
            raise NotFound(actor.subject, "has no saved state", "start it with 'hostler vm start'")
        if not await machine.loaded():
            await machine.load_from(actor.record.saved)

    return Step("load", do)


def run(host: Host, actor: VmActor) -> Step:
    """Let the guest go on, and forget the saved state."""

    async def do(context: JobContext) -> None:
        context.no_return()
        machine, saved = actor.present(), host.resources.saved_path(actor.record.config)
        await machine.status()  # a QEMU that is gone by now has not run
        if actor.record.saved is not None:
            await actor.set(durable=True, saved=None)
        try:
            await machine.run()
        except HostlerError:
            if await _stands_still(machine):
                await actor.set(durable=True, saved=saved)
            else:
                host.resources.discard_saved(saved)
            raise
        await actor.set(state=VmState.RUNNING)
        host.resources.discard_saved(saved)

    return Step("run", do)


async def _stands_still(machine: Machine) -> bool:
    """Whether the guest has certainly not run, so that its saved state is still good."""
    try:
        return await machine.status() in (RunStatus.PAUSED, RunStatus.PRELAUNCH)
    except HostlerError:
        return False


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
