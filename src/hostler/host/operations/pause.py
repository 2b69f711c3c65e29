"""Pause and resume: stop and continue the guest's processors; its memory stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.steps import JobContext, Step
from hostler.model.vm import VmState


def _pause(_host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        assert actor.machine is not None
        await actor.set(state=VmState.PAUSING)
        await actor.machine.stop()
        await actor.set(state=VmState.PAUSED)

    return (Step("stop", do),)


def _resume(_host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        assert actor.machine is not None
        if actor.record.state is VmState.PAUSED:
            await actor.set(state=VmState.RESUMING)
        await actor.machine.run()
        await actor.set(state=VmState.RUNNING, reason=None, reason_text="")

    return (Step("run", do),)


def _reset(_host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(_context: JobContext) -> None:
        assert actor.machine is not None
        await actor.machine.reset()

    return (Step("reset", do),)


PAUSE = Operation("vm.pause", "pause", frozenset({VmState.RUNNING}), _pause, cancellable=False)
RESUME = Operation("vm.resume", "resume", frozenset({VmState.PAUSED, VmState.CRITICAL}), _resume, cancellable=False)
RESET = Operation("vm.reset", "reset", frozenset({VmState.RUNNING, VmState.PAUSED}), _reset, cancellable=False)
