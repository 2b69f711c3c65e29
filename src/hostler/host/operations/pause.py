"""Pause and resume: stop and continue the guest's processors; its memory stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.steps import JobContext, Step
from hostler.model.job import Job
from hostler.model.vm import VmState


def _pause(_host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        machine = actor.present()
        if actor.record.state is not VmState.PAUSED:
            await actor.set(state=VmState.PAUSING)
        await machine.stop()
        await actor.set(state=VmState.PAUSED)

    return (Step("stop", do),)


def _resume(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        machine = actor.present()
        if actor.record.state is VmState.PAUSED:
            await actor.set(state=VmState.RESUMING)
        # After a move whose exports could not be opened a placeholder may still be behind its disks.
        await host.resources.open_exports(actor.record.config)
        await machine.run()
        await actor.set(state=VmState.RUNNING, reason=None, reason_text="")

    return (Step("run", do),)


def _reset(_host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        await actor.present().reset()

    return (Step("reset", do),)


async def _to_the_end(_host: Host, actor: VmActor, job: Job) -> str | None:
    """What was asked for is done after a crash as well: its only step may be repeated. A reset may not: the guest has
    perhaps been working since."""
    return job.steps[0].name if actor.machine is not None else None


PAUSE = Operation("vm.pause", "pause", frozenset({VmState.RUNNING}), _pause, _to_the_end, cancellable=False)
RESUME = Operation(
    "vm.resume", "resume", frozenset({VmState.PAUSED, VmState.CRITICAL}), _resume, _to_the_end, cancellable=False
)
RESET = Operation("vm.reset", "reset", frozenset({VmState.RUNNING, VmState.PAUSED}), _reset, cancellable=False)
