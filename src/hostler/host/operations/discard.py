"""Give a saved VM's memory up: it is off afterwards, its disks as they were when it was saved."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import unclaim
from hostler.host.steps import JobContext, Step
from hostler.model.job import Job
from hostler.model.vm import VmState


def steps(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    async def do(context: JobContext) -> None:
        context.no_return()
        await unclaim(host, actor, state=VmState.OFF, saved=None)
        host.resources.discard_saved(host.resources.saved_path(actor.record.config))

    return (Step("discard", do),)


async def resume_at(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    return "discard"


OPERATION = Operation(
    "vm.discard-saved", "discard its saved state", frozenset({VmState.SAVED}), steps, resume_at, cancellable=False
)
