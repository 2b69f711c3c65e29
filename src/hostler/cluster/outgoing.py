"""The source's side of a move, as the steps of a job. The decisions are in `handover`; this carries them out.

    check -> prepare-target -> pre-copy -> switch-over -> resume -> clean-up
    |<------------- can be cancelled ---->|

Everything up to the end of pre-copy is undone by letting our own QEMU go on and telling the target to refuse. With
switch-over the record says that the VM is the target's; from there it only goes forward, or is taken back when the
target definitely refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog
from pydantic import JsonValue

from hostler.cluster.handover import Answer, Owner, Qemu, SourceAction, source_asks, source_recovers
from hostler.cluster.incoming import key_of_moved
from hostler.cluster.luggage import files_of, leave, luggage, shared_layers
from hostler.cluster.peers import PeerBook, PeerLink, never_sent
from hostler.cluster.target_view import inodes_of
from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import end_machine
from hostler.host.steps import JobContext, Step
from hostler.model.base import utc_now
from hostler.model.disk import SourceKind
from hostler.model.errors import Blocked, HostlerError, PeerRefused, PeerUnreachable, QemuFailed, TimedOut
from hostler.model.job import Job, Progress, StepState
from hostler.model.machine import MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import (
    IncomingPhase,
    IncomingRequest,
    MigrationMode,
    MigrationProgress,
    MigrationSettings,
    Phase,
)
from hostler.model.vm import CriticalReason, VmState
from hostler.store.contract import Put, Transaction

log = structlog.get_logger()

SENDING = frozenset({"setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug"})
"""QEMU's migration states (qapi/migration.json) in which the guest's fate is still open."""
HEARTBEAT = 2.0
"""Seconds between two words to the target during pre-copy; it gives up after 30 s without one."""
PATIENCE = 15.0
"""Seconds of silence of the target after which a transfer is given up. A stream into a cut network does not end by
itself, and the guest may stand still meanwhile."""
RETRY_FIRST, RETRY_MOST = 0.05, 2.0
"""Seconds between attempts to reach the target after the hand-over: at once at first, then gently."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move: its parts, so that the steps are small.  `secret` is a fresh 256-bit key as hex."""

    host: Host
    peers: PeerBook
    actor: VmActor
    target: str
    settings: MigrationSettings
    secret: str

    @property
    def link(self) -> PeerLink:
        """The link to the target."""
        return self.peers.link(self.target)

    async def request(self, move_id: str, run: bool) -> IncomingRequest:
        """What the target is asked to prepare."""
        record = self.actor.record
        config = record.config
        kinds = (SourceKind.VOLUME, SourceKind.CHAIN)
        paths = [s.path for d in config.disks for s in d.source.layers() if s.kind in kinds]
        takes = await luggage(self.host, record)
        return IncomingRequest(
            id=move_id,
            config=config,
            next_config=record.next_config,
            luggage=takes,
            generation=record.generation + 1,
            settings=self.settings,
            accelerator=self.host.facts.accelerator.kind,
            secret=self.secret,
            run=run,
            inodes=await asyncio.to_thread(inodes_of, [*paths, *files_of(takes)]),
            boot_id=self.host.facts.boot_id,
        )


def was_running(context: JobContext) -> bool:
    """Whether the guest ran when the move began."""
    return bool(context.job.data.get("run", True))


def check(move: Move) -> Step:
    """Ask the target for everything that stands in the way."""

    async def do(context: JobContext) -> None:
        run = move.actor.record.state is VmState.RUNNING
        blockers = [*await shared_layers(move.host, move.actor.record)]
        blockers += await move.link.check(await move.request(context.job.id, run))
        if blockers:
            raise Blocked(
                move.actor.subject,
                f"cannot move to {move.peers.get(move.target).name}: " + "; ".join(b.text for b in blockers),
                next((b.advice for b in blockers if b.advice), ""),
                blockers=[b.to_json() for b in blockers],
            )
        await context.remember(run=run)

    return Step(Phase.CHECK, do)


def prepare_target(move: Move) -> Step:
    """The target launches a QEMU that waits for the stream."""

    async def do(context: JobContext) -> None:
        context.progress(Progress(text="preparing the target"))
        status = await move.link.prepare(await move.request(context.job.id, was_running(context)))
        if status.phase is not IncomingPhase.PREPARED:
            raise PeerRefused(move.actor.subject, status.text or "the target refused")
        await context.remember(address=status.address)

    async def undo(context: JobContext) -> None:
        """Tell the target; if it does not hear, it asks us, and gives up by itself."""
        with contextlib.suppress(HostlerError):
            await move.link.refuse(context.job.id)

    return Step(Phase.PREPARE, do, undo)


def pre_copy(move: Move) -> Step:
    """Copy memory while the guest runs, to the end: after it both QEMUs stand still and the target has everything."""

    async def do(context: JobContext) -> None:
        actor = move.actor
        machine = actor.present()
        await actor.set(state=VmState.MIGRATING)
        if await _sent_already(move, machine, context.job.id):
            return
        if move.settings.mode is MigrationMode.QUICK:
            await machine.stop()
        try:
            result = await _send(move, context)
        except QemuFailed:
            if not await _lost_but_sent(move, context.job.id):
                raise
            return
        if result.end is not MigrationEnd.COMPLETED:
            raise QemuFailed(actor.subject, f"the transfer of its memory {result.end}: {result.text}".rstrip(": "))
        show_end(context, result)

    async def undo(context: JobContext) -> None:
        await go_on(move, run=was_running(context))

    return Step(Phase.PRE_COPY, do, undo)


async def _sent_already(move: Move, machine: Machine, move_id: str) -> bool:
    """Whether an earlier attempt of the same move has sent everything."""
    state = await machine.migration_state()
    return state.status == "completed" and await target_has_it_all(move.peers, move.target, move_id)


async def _lost_but_sent(move: Move, move_id: str) -> bool:
    """Our QEMU failed in the middle: whether it is dead and the target has everything, so that the guest lives on
    there."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(move.actor.gone.wait(), 2.0)
    if move.actor.machine is None and await target_has_it_all(move.peers, move.target, move_id):
        log.warning("move.source-died-after-sending", move=move_id, vm=move.actor.record.id)
        return True
    return False


async def _send(move: Move, context: JobContext) -> MigrationResult:
    """Send the whole state while watching the target. Whatever ends it early (cancelled, the target silent), the
    transfer is stopped before this returns."""
    machine = move.actor.machine
    assert machine is not None
    address = str(context.job.data["address"])
    sending = asyncio.create_task(
        machine.migrate_to(address, move.settings, move.secret, lambda p: show(context, p)), name="migrate"
    )
    watching = asyncio.create_task(_target_silent(move, context.job.id), name="watch the target")
    try:
        await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            return sending.result()
        raise PeerUnreachable(
            move.actor.subject,
            f"{move.peers.get(move.target).name} has not answered for {PATIENCE:.0f} s; the VM stays here",
            "check the network between the hosts, then move it again",
        )
    finally:
        watching.cancel()
        if not sending.done():
            with contextlib.suppress(HostlerError):
                await machine.cancel_migration()
            await asyncio.wait({sending}, timeout=30)


async def _target_silent(move: Move, move_id: str) -> None:
    """Returns when the target has said nothing for PATIENCE. The asking tells the target that we are there, and keeps
    the connection warm for the hand-over."""
    clock = asyncio.get_running_loop()
    heard = clock.time()
    while clock.time() - heard < PATIENCE:
        try:
            await move.link.status(move_id)
            heard = clock.time()
        except HostlerError as error:
            log.info("move.target-silent", move=move_id, why=str(error))
        await asyncio.sleep(HEARTBEAT)


def show(context: JobContext, progress: MigrationProgress) -> None:
    """Progress for people: how much is there, and how it will go on."""
    fraction = None
    if progress.total:
        fraction = max(0.0, min(1.0, 1 - progress.remaining / progress.total))
    context.progress(
        Progress(fraction=fraction, text=f"copying memory, round {progress.rounds}", detail=progress.to_json())
    )


def show_end(context: JobContext, result: MigrationResult) -> None:
    """The last word on the transfer: what QEMU counted."""
    last = MigrationProgress.model_validate(context.job.progress.detail)
    told = {"status": "completed", "remaining": 0, "downtime": result.downtime, "expected_pause": None}
    sent = {"transferred": result.transferred or last.transferred, "elapsed": result.total_time or last.elapsed}
    detail = last.but(**told, **sent, remaining_time=None).to_json()
    context.progress(Progress(fraction=1.0, text="handing it over", detail=detail))


async def go_on(move: Move, run: bool) -> None:
    """Ours again (or still): let our own QEMU go on as before. Harmless when it does already, or is dead."""
    actor = move.actor
    machine = actor.machine
    if actor.record.handed_to is not None:
        return  # it is the target's: whatever failed here, this QEMU must not run
    if machine is not None:
        with contextlib.suppress(HostlerError):  # it is dying: the actor hears of it and settles
            await _stop_sending(machine)
            await move.host.resources.open_exports(actor.record.config)
            status = await machine.status()
            if run and status is not RunStatus.RUNNING:
                await machine.run()
    if actor.record.state is VmState.MIGRATING:
        await actor.set(state=VmState.RUNNING if run else VmState.PAUSED)


async def _stop_sending(machine: Machine) -> None:
    """Cancel whatever transfer is under way and wait until QEMU has let go of it (a session that has just been adopted
    has missed the event, so this looks)."""
    await machine.cancel_migration()
    for _ in range(1500):
        if (await machine.migration_state()).status not in SENDING:
            return
        await asyncio.sleep(0.02)


def switch_over(move: Move) -> Step:
    """Record, durably, that the VM is the target's now. The point of no return."""

    async def do(context: JobContext) -> None:
        context.no_return()
        record = move.actor.record
        await move.host.resources.close_exports(record.config)
        if record.handed_to is None:
            target = move.peers.get(move.target).id
            await move.actor.set(durable=True, handed_to=target, generation=record.generation + 1)

    return Step(Phase.SWITCH_OVER, do)


def resume(move: Move) -> Step:
    """Tell the target to let it run, until it says yes or definitely no."""

    async def do(context: JobContext) -> None:
        delay = RETRY_FIRST
        while True:
            answer, text = await ask_to_accept(move, context.job.id)
            alive = Qemu.COMPLETE if move.actor.machine is not None else Qemu.DEAD
            action = source_asks(alive, answer)
            if action is SourceAction.FINISH:
                return
            if action is not SourceAction.ASK:
                await take_back(move, was_running(context))
                raise PeerRefused(
                    move.actor.subject,
                    f"the target did not take it over: {text}",
                    "it runs on here; see the target's log" if alive is Qemu.COMPLETE else "start it again",
                )
            await _tell_pending(move, context, text)
            await asyncio.sleep(delay)
            delay = min(delay * 2, RETRY_MOST)

    return Step(Phase.RESUME, do)


async def ask_to_accept(move: Move, move_id: str) -> tuple[Answer, str]:
    """The target's answer: yes, definitely no, or nothing."""
    try:
        status = await move.link.accept(move_id)
    except (PeerUnreachable, TimedOut) as error:
        log.info("move.no-answer", move=move_id, why=str(error), sent=not never_sent(error))
        return Answer.SILENT, error.cause
    except PeerRefused as error:
        # Only the target's own, reasoned refusal is definite. One that the link made of an internal or access error
        # says nothing about whether the VM was accepted before.
        return (Answer.SILENT if "code" in error.details else Answer.REFUSED), error.cause
    except HostlerError as error:
        log.warning("move.odd-answer", move=move_id, why=str(error))
        return Answer.SILENT, error.cause
    return (Answer.ACCEPTED if status.phase is IncomingPhase.ACCEPTED else Answer.SILENT), status.text


async def _tell_pending(move: Move, context: JobContext, text: str) -> None:
    name = move.peers.get(move.target).name
    context.progress(Progress(text=f"handed over to {name}, waiting for its confirmation: {text}"))
    if move.actor.record.reason is None:
        await move.actor.set(
            reason=CriticalReason.HANDOVER_PENDING,
            reason_text=f"{name} owns it now but has not confirmed; asking again until it answers",
        )


async def take_back(move: Move, run: bool) -> None:
    """The target definitely refused: ours again, with a generation above the one it was offered."""
    record = move.actor.record
    await move.actor.set(durable=True, handed_to=None, generation=record.generation + 1, reason=None, reason_text="")
    await go_on(move, run)


def clean_up(move: Move) -> Step:
    """End our QEMU, forget the VM but for a note where it went, and let the target forget the move."""

    async def do(context: JobContext) -> None:
        actor, host = move.actor, move.host
        await end_machine(host, actor, at_once=True)
        await host.resources.release(actor.record.config, moved=True, forget=True)
        peer = move.peers.get(move.target)
        note: dict[str, JsonValue] = {
            "host": peer.id,
            "host_name": peer.name,
            "name": actor.record.name,
            "at": utc_now().isoformat(),
        }
        gone = await leave(host, actor.record.id)
        await actor.delete(Transaction([Put(key_of_moved(actor.record.id), note), *gone]))
        await host.claims.release(actor.record.id)
        host.actors.pop(actor.record.id, None)
        host.moved[actor.record.id] = (actor.record.name, peer.name)
        with contextlib.suppress(HostlerError):  # it may forget later: its own reconciler sees to it
            await move.link.refuse(context.job.id)

    return Step(Phase.CLEAN_UP, do)


def steps(move: Move) -> Sequence[Step]:
    """The whole move. Once the VM is given away every step is tried until it succeeds, or the VM is taken back."""

    def given() -> bool:
        return move.actor.record.handed_to is not None

    return (
        check(move),
        prepare_target(move),
        pre_copy(move),
        *(replace(step, insist=given) for step in (switch_over(move), resume(move), clean_up(move))),
    )


async def target_has_it_all(peers: PeerBook, target: str, move_id: str) -> bool:
    """Whether the target holds the whole state. False also where it cannot be asked."""
    try:
        status = await peers.link(target).status(move_id)
    except HostlerError:
        return False
    return status.phase is IncomingPhase.PREPARED and status.loaded


async def resume_at(peers: PeerBook, actor: VmActor, job: Job) -> str | None:
    """After a crash: the step to go on with, or None to unwind (see `handover.source_recovers`)."""
    given = actor.record.handed_to is not None
    if given:
        begun = {s.name for s in job.steps if s.state is not StepState.PENDING}
        return Phase.CLEAN_UP if Phase.CLEAN_UP in begun else Phase.RESUME
    qemu = Qemu.LIVE if actor.machine is not None else Qemu.DEAD
    answer = Answer.SILENT
    if qemu is Qemu.DEAD and await target_has_it_all(peers, str(job.params["target"]), job.id):
        answer = Answer.LOADED
    action = source_recovers(Owner.KEEPING, qemu, answer)
    return Phase.SWITCH_OVER if action is SourceAction.GIVE else None


def operation(peers: PeerBook) -> Operation:
    """The operation `vm.migrate`. Its parameters: target (peer id) and settings; its secret lives in memory only."""

    def build(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
        settings = MigrationSettings.model_validate(params["settings"])
        return steps(Move(host, peers, actor, str(params["target"]), settings, secrets.token_hex(32)))

    async def recover(_host: Host, actor: VmActor, job: Job) -> str | None:
        return await resume_at(peers, actor, job)

    return Operation("vm.migrate", "move", frozenset({VmState.RUNNING, VmState.PAUSED}), build, recover)
