"""The steps that start and restore share: admit and claim, prepare the host, launch QEMU."""

from __future__ import annotations

from collections.abc import Callable

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.steps import JobContext, Step
from hostler.model.disk import Disk
from hostler.model.errors import Busy
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.store.contract import CheckFailed

Edit = Callable[[VmRecord], VmRecord]


def _as_it_is(record: VmRecord) -> VmRecord:
    return record


CLAIM_TRIES = 5
"""Claims are compare-and-swap; a few losses in a row mean somebody else is quicker each time, not that it is broken."""


async def claim(host: Host, actor: VmActor, disks: tuple[Disk, ...], edit: Edit = _as_it_is) -> None:
    """Change the record and claim those disks in one transaction. `edit` gets the record as it is at that moment, so
    that a change somebody else makes meanwhile is not lost. InUse names the holder."""
    for left in reversed(range(CLAIM_TRIES)):
        extra = await host.claims.plan_claim(actor.record.id, disks, actor.record.generation)
        try:
            await actor.change(edit, extra)
            return
        except CheckFailed as error:
            if not left:
                raise outrun(actor) from error


async def unclaim(
    host: Host, actor: VmActor, disks: tuple[Disk, ...] | None = None, edit: Edit = _as_it_is, **changes: object
) -> None:
    """Change the record, by `edit` and then the fields named, and give those claims up (all of the VM's when None)."""
    ids = None if disks is None else [d.id for d in disks]
    for left in reversed(range(CLAIM_TRIES)):
        extra = await host.claims.plan_release(actor.record.id, ids)
        try:
            await actor.change(lambda now: edit(now).but(**changes), extra)
            return
        except CheckFailed as error:
            if not left:
                raise outrun(actor) from error


def outrun(actor: VmActor) -> Busy:
    """Others were quicker each time."""
    return Busy(actor.subject, "others claim its disks at the same moment", "try again")


def reserve(host: Host, actor: VmActor, state: VmState, back: VmState) -> Step:
    """Admit the VM to this host, take its waiting configuration, claim its disks, enter `state`. The undos of a launch
    leave a VM alone that runs: it has been launched."""

    async def do(_context: JobContext) -> None:
        record = actor.record
        config = record.next_config if record.next_config is not None and back is VmState.OFF else record.config
        await host.volumes.check_disks(config.disks)
        await host.volumes.check_kernel(config.kernel)

        def edit(now: VmRecord) -> VmRecord:
            """What changes at once (its name, say) may have changed since `config` was read."""
            waiting = now.next_config is not None and back is VmState.OFF
            latest = now.next_config if waiting and now.next_config is not None else now.config
            return now.but(
                config=latest.but(disks=config.disks),
                next_config=None if waiting else now.next_config,
                state=state,
                reason=None,
                reason_text="",
            )

        with host.admitting(config):
            await claim(host, actor, config.disks, edit)

    async def undo(_context: JobContext) -> None:
        if actor.record.state is not state:
            return
        if back is VmState.OFF:
            await unclaim(host, actor, state=back)
        elif actor.record.saved is not None:
            await actor.set(state=back)

    return Step("reserve", do, undo)


def prepare(host: Host, actor: VmActor) -> Step:
    """Make run directory, access rights, taps and exports."""

    async def do(context: JobContext) -> None:
        await host.resources.prepare(actor.record.config)

    async def undo(context: JobContext) -> None:
        if actor.record.state is not VmState.RUNNING:
            await host.resources.release(actor.record.config)

    return Step("prepare", do, undo)


def launch(host: Host, actor: VmActor, incoming: bool = False) -> Step:
    """Start QEMU with the guest stopped."""

    async def do(_context: JobContext) -> None:
        if actor.machine is None:
            spec = host.resources.spec(actor.record.config, incoming=incoming)
            actor.attach(await host.hypervisor.launch(spec))
        await actor.set(process=actor.present().process)

    async def undo(_context: JobContext) -> None:
        if actor.record.state is not VmState.RUNNING:
            await end_machine(host, actor)

    return Step("launch", do, undo)


async def end_machine(host: Host, actor: VmActor, at_once: bool = False) -> None:
    """End the VM's QEMU, whether or not we ever got hold of it; harmless when there is none. `at_once`: kill it. That
    is for one whose guest and disks are elsewhere already: it has nothing left to write, and one whose exports are
    closed would wait for them for seconds."""
    actor.expect_end()
    config: VmConfig = actor.record.config
    if actor.machine is not None and not at_once:
        await actor.machine.quit()
        await actor.gone.wait()
    await host.hypervisor.kill_leftovers(config.id, str(host.paths.vm_run(config.id)))
    if actor.machine is not None:
        await actor.gone.wait()
    await actor.set(process=None)
