"""Save a VM: its memory goes to a file in its state directory, then its QEMU ends. Undone, the guest goes on.

The disks stay claimed while it is saved: nobody else may change what its memory believes to be on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import end_machine
from hostler.host.steps import JobContext, Step
from hostler.model.errors import QemuFailed, TimedOut
from hostler.model.job import Job, Progress
from hostler.model.machine import MigrationEnd
from hostler.model.migration import MigrationProgress
from hostler.model.vm import VmState
from hostler.qemu.saved import PARTIAL

WRITING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug"})
"""QEMU's migration states (qapi/migration.json) in which it may still stop the guest."""
LOOK_AGAIN = 0.02
"""Seconds between two looks at a transfer that is being cancelled: usually the first or second finds it ended."""
LOOKS = 1500
"""Makes 30 s: one chunk of memory to a storage that hardly moves."""


def save_progress(context: JobContext, progress: MigrationProgress) -> None:
    """Show how much of the memory is written."""
    known = progress.total > 0
    fraction = min(1.0, 1 - progress.remaining / progress.total) if known else None
    context.progress(Progress(fraction=fraction, text="writing memory", detail=progress.to_json()))


def write(host: Host, actor: VmActor) -> Step:
    async def do(context: JobContext) -> None:
        machine = actor.present()
        if actor.record.state is not VmState.SAVING:
            await context.remember(was_running=actor.record.state is not VmState.PAUSED)
            await actor.set(state=VmState.SAVING)
        path = host.resources.saved_path(actor.record.config)
        result = await machine.save_to(path, lambda p: save_progress(context, p))
        if result.end is not MigrationEnd.COMPLETED:
            raise QemuFailed(actor.subject, f"its memory could not be saved: {result.text or result.end}")

    async def undo(context: JobContext) -> None:
        if actor.record.state is VmState.SAVED:
            return
        path = host.resources.saved_path(actor.record.config)
        host.resources.discard_saved(path)
        host.resources.discard_saved(path + PARTIAL)
        if actor.machine is None or actor.record.state is not VmState.SAVING:
            return
        await stop_writing(actor.subject, actor.machine)
        run = bool(context.job.data.get("was_running", True))
        if run:
            await actor.machine.run()
        await actor.set(state=VmState.RUNNING if run else VmState.PAUSED)

    return Step("write", do, undo)


async def stop_writing(subject: str, machine: Machine) -> None:
    """Make QEMU give the transfer up, which it goes on with when the daemon that began it has died; at its end it would
    stop a guest that has been let go on. TimedOut when it does not."""
    await machine.cancel_migration()
    for _ in range(LOOKS):
        if (await machine.migration_state()).status not in WRITING:
            return
        await asyncio.sleep(LOOK_AGAIN)
    raise TimedOut(subject, "its QEMU does not give up writing its memory", "turn it off if it stays so")


def end(host: Host, actor: VmActor) -> Step:
    """From the record "saved" on there is no way back: QEMU ends, even if the daemon dies before it did."""

    async def do(context: JobContext) -> None:
        context.no_return()
        if actor.record.state is VmState.SAVING:
            path = host.resources.saved_path(actor.record.config)
            await actor.set(durable=True, state=VmState.SAVED, saved=path)
        await end_machine(host, actor)
        await host.resources.release(actor.record.config)

    return Step("end", do)


def steps(host: Host, actor: VmActor, _params: Params) -> Sequence[Step]:
    return (write(host, actor), end(host, actor))


async def resume_at(_host: Host, actor: VmActor, _job: Job) -> str | None:
    """Recorded as saved: finish ending its QEMU."""
    return "end" if actor.record.state is VmState.SAVED else None


OPERATION = Operation("vm.save", "save", frozenset({VmState.RUNNING, VmState.PAUSED}), steps, resume_at)
