"""Turn off (at once) and shut down (the guest's own way, with a time limit and what happens then)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import end_machine, unclaim
from hostler.host.steps import JobContext, Step
from hostler.model.errors import GuestRefused, HostlerError
from hostler.model.job import Job, Progress
from hostler.model.vm import StopAction, VmState

log = structlog.get_logger()


def end(host: Host, actor: VmActor) -> Step:
    """End QEMU if it still lives, give back what the VM held."""

    async def do(context: JobContext) -> None:
        context.no_return()
        if actor.record.state not in (VmState.STOPPING, VmState.OFF):
            await actor.set(state=VmState.STOPPING)
        await end_machine(host, actor)
        await host.resources.release(actor.record.config)
        await unclaim(host, actor, state=VmState.OFF, reason=None, reason_text="")

    return Step("end", do)


def ask(host: Host, actor: VmActor) -> Step:
    """Ask the guest (through its agent, else by the power button) and wait until it is gone, or not."""

    async def do(context: JobContext) -> None:
        params = context.job.params
        timeout = int(str(params["timeout"]))
        await actor.set(state=VmState.STOPPING)
        if not await _press(actor):
            return
        context.progress(Progress(text=f"the guest has {timeout} s to shut down"))
        try:
            await asyncio.wait_for(actor.gone.wait(), timeout)
            context.no_return()
        except TimeoutError:
            if params["then"] == StopAction.TURN_OFF:
                log.info("vm.shutdown-forced", vm=actor.record.id, after=timeout)
                return
            raise GuestRefused(
                actor.subject,
                f"the guest has not shut down within {timeout} s; it is left running",
                "give it more --timeout, use '--then turn-off', or 'hostler vm turn-off'",
                timeout=timeout,
            ) from None

    async def undo(_context: JobContext) -> None:
        if actor.machine is not None and actor.record.state is VmState.STOPPING:
            await actor.set(state=VmState.RUNNING)

    return Step("ask", do, undo)


async def _press(actor: VmActor) -> bool:
    """Whether there was a machine to ask. The agent first: it also works in guests that ignore the button."""
    machine = actor.machine
    if machine is None:
        return False
    try:
        await machine.guest_shutdown()
    except HostlerError as error:
        log.debug("vm.no-agent", vm=actor.record.id, why=str(error))
        await machine.power_down()
    return True


def _turn_off(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    return (end(host, actor),)


def _shutdown(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    return (ask(host, actor), end(host, actor))


async def _resume_off(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    return "end"


async def _resume_shutdown(_host: Host, actor: VmActor, _job: Job) -> str | None:
    """The guest may have gone while no daemon looked; then only the tidying is left."""
    return "end" if actor.machine is None else None


TURN_OFF = Operation(
    "vm.turn-off",
    "turn off",
    frozenset({VmState.RUNNING, VmState.PAUSED, VmState.CRITICAL}),
    _turn_off,
    _resume_off,
    cancellable=False,
)
SHUTDOWN = Operation("vm.shutdown", "shut down", frozenset({VmState.RUNNING}), _shutdown, _resume_shutdown)
