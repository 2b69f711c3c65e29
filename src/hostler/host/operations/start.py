"""Start a VM: reserve, prepare, launch, run. Undone, it is off again and holds nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import launch, prepare, reserve
from hostler.host.steps import JobContext, Step
from hostler.model.job import Job
from hostler.model.vm import VmState


def run(actor: VmActor) -> Step:
    """Let the guest's processors go. A guest that has begun is not killed because its record cannot be written."""
    began = False

    async def do(context: JobContext) -> None:
        nonlocal began
        context.no_return()
        machine = actor.present()
        if not began:
            await machine.run()
            began = True
        await actor.set(state=VmState.RUNNING)

    return Step("run", do, insist=lambda: began and actor.machine is not None)


def steps(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    return (
        reserve(host, actor, VmState.STARTING, VmState.OFF),
        prepare(host, actor),
        launch(host, actor),
        run(actor),
    )


async def resume_at(_host: Host, actor: VmActor, _job: Job) -> str | None:
    """A start whose QEMU is there already goes on: its owner wanted the VM to run."""
    return "run" if actor.machine is not None and actor.record.process is not None else None


OPERATION = Operation("vm.start", "start", frozenset({VmState.OFF}), steps, resume_at)
