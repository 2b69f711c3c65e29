"""Restore a saved VM: like a start, but its memory comes from the saved state, which is deleted once the guest runs.

The record forgets the saved state before the guest may run, since a state that has been run on must never be restored
again (its disks have moved on). From there only three things end the job:

the guest runs, or has run           -> restored; the file is deleted
it certainly did not run (its disk   -> saved, as before
    is locked by somebody else)
its QEMU is gone                     -> off; the file is deleted

A QEMU that does not answer (its storage hangs while it opens the disks for writing) is none of them: it is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

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

log = structlog.get_logger()

HAS_NOT_RUN = frozenset({RunStatus.PAUSED, RunStatus.PRELAUNCH, RunStatus.INMIGRATE})
"""What a QEMU says whose guest has never gone on from its saved state. (Nobody else pauses it: a job holds it.)"""


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
    began = False

    async def do(context: JobContext) -> None:
        nonlocal began
        context.no_return()
        machine, saved = actor.present(), host.resources.saved_path(actor.record.config)
        if not began:
            await machine.status()  # a QEMU that is gone by now has not run
            if actor.record.saved is not None:
                await actor.set(durable=True, saved=None)
            began = await _begin(actor, machine, saved)
        await actor.set(state=VmState.RUNNING)
        host.resources.discard_saved(saved)

    async def undo(_context: JobContext) -> None:
        if actor.record.saved is None:
            host.resources.discard_saved(host.resources.saved_path(actor.record.config))

    return Step("run", do, undo, insist=lambda: actor.record.saved is None and actor.machine is not None)


async def _begin(actor: VmActor, machine: Machine, saved: str) -> bool:
    """True when the guest runs or has run. Raises when it has not, with the saved state recorded again, and when nobody
    can tell."""
    try:
        await machine.run()
    except HostlerError as error:
        status = await machine.status()  # answered after whatever `run` began, since QEMU works in order
        if status in HAS_NOT_RUN:
            await actor.set(durable=True, saved=saved)
            raise
        log.info("vm.restored-at-second-sight", vm=actor.record.id, status=status, why=str(error))
    return True


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
