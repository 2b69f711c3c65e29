"""The target's side of a move: prepare, accept, refuse, and tidy up after a source that is gone.

    PREPARED --accept--> ACCEPTED --the source confirms--> (forgotten)
    PREPARED --refuse, QEMU dies, the source gave up--> REFUSED --after REMEMBER--> (forgotten)

The record is written before the guest may run. A refused move stays known for a while, so that a late "accept" meets a
definite no; a move that is not known at all is a definite no as well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import structlog

from hostler.cluster.check import blockers_at_target
from hostler.cluster.handover import SourceWord, target_may_refuse
from hostler.cluster.luggage import arrive, leave
from hostler.cluster.peers import PeerBook
from hostler.cluster.target_view import look
from hostler.host.actor import VmActor, vm_key
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.roster import Roster
from hostler.host.steps import StepHook
from hostler.model.errors import Blocked, HostlerError, NotPermitted, PeerRefused, QemuFailed
from hostler.model.migration import (
    Blocker,
    Incoming,
    IncomingPhase,
    IncomingRequest,
    IncomingStatus,
)
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.store.contract import ABSENT, Check, CheckFailed, Delete, Put, Transaction

log = structlog.get_logger()

REMEMBER = 3600.0
"""Seconds a refused move stays known."""
PATIENCE = 30.0
"""Seconds without a word from the source after which a target gives up a move that has not fully arrived."""
ROUND = 5.0
"""Seconds between two rounds of the reconciler."""


def key_of_moved(vm_id: str) -> str:
    """Where the note "this VM moved to that host" is in the store."""
    return f"moved/{vm_id}"


def _key(move_id: str) -> str:
    return f"incoming/{move_id}"


class Guest:
    """One move to this host while it is under way."""

    def __init__(self, record: Incoming) -> None:
        self.record = record
        self.machine: Machine | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.lock = asyncio.Lock()
        self.address = ""
        self.ended = 0.0
        self.tidying = False


def _own(guest: Guest, peer_id: str) -> None:
    if guest.record.source != peer_id:
        raise NotPermitted(f"move {guest.record.id}", "belongs to another host")


class IncomingService:
    """Every move to this host."""

    def __init__(
        self, host: Host, roster: Roster, peers: PeerBook, listen_address: str, hook: StepHook | None = None
    ) -> None:
        self._host = host
        self._roster = roster
        self._peers = peers
        self._listen_address = listen_address
        self._hook = hook
        self._guests: dict[str, Guest] = {}
        self._accepting: set[asyncio.Task[IncomingStatus]] = set()
        self._reconciler: asyncio.Task[None] | None = None

    # looking

    async def check(self, request: IncomingRequest, peer_id: str) -> list[Blocker]:
        """Everything that stands in the way of this move here."""
        self._peers.heard(peer_id)
        return blockers_at_target(request, await look(self._host, request, self._pending_records()))

    def _pending_records(self) -> list[Incoming]:
        return [g.record for g in self._guests.values() if g.record.phase is IncomingPhase.PREPARED or g.tidying]

    async def status(self, move_id: str, peer_id: str) -> IncomingStatus:
        """Where a move stands. An unknown one is refused: it can never run here."""
        self._peers.heard(peer_id)
        guest = self._guests.get(move_id)
        if guest is None:
            return IncomingStatus(phase=IncomingPhase.REFUSED, text="this host does not know the move")
        _own(guest, peer_id)
        return await self._status(guest)

    async def _status(self, guest: Guest) -> IncomingStatus:
        record, loaded = guest.record, False
        if record.phase is IncomingPhase.PREPARED and guest.machine is not None:
            with contextlib.suppress(HostlerError):  # a QEMU that is dying has not loaded anything we could use
                loaded = await guest.machine.loaded()
        return IncomingStatus(phase=record.phase, loaded=loaded, address=guest.address, text=record.text)

    def coming(self) -> list[VmConfig]:
        """The VMs that are on their way here."""
        return [record.config for record in self._pending_records()]

    # changing

    async def prepare(self, request: IncomingRequest, peer_id: str) -> IncomingStatus:
        """Check, record, launch a QEMU that waits for the stream. Repeating it for the same move is harmless."""
        self._peers.heard(peer_id)
        known = self._guests.get(request.id)
        if known is not None:
            _own(known, peer_id)
            return await self._status(known)
        blockers = await self.check(request, peer_id)
        if blockers:
            raise Blocked(
                f"vm {request.config.name}",
                "; ".join(b.text for b in blockers),
                next((b.advice for b in blockers if b.advice), ""),
                blockers=[b.to_json() for b in blockers],
            )
        record = Incoming(
            id=request.id,
            config=request.config,
            next_config=request.next_config,
            luggage=request.luggage,
            generation=request.generation,
            source=peer_id,
            run=request.run,
        )
        guest = Guest(record)
        self._guests[record.id] = guest
        async with guest.lock:
            try:
                await self._host.store.commit(Transaction([Put(_key(record.id), record.to_json())]))
                await self._launch(guest, request)
            except BaseException as error:  # also when cancelled; raised again
                await self._end(guest, f"it could not be prepared: {error}")
                raise
            return await self._status(guest)

    async def _launch(self, guest: Guest, request: IncomingRequest) -> None:
        host, config = self._host, request.config
        await host.resources.prepare(config, placeholder=True)
        machine = await host.hypervisor.launch(host.resources.spec(config, incoming=True))
        self._adopt(guest, machine)
        guest.address = await machine.listen(request.settings, request.secret, self._listen_address)

    def _adopt(self, guest: Guest, machine: Machine) -> None:
        guest.machine = machine
        guest.watcher = asyncio.create_task(self._watch(guest, machine), name=f"incoming {guest.record.id}")

    async def _watch(self, guest: Guest, machine: Machine) -> None:
        """A QEMU that dies while it waits (a broken stream ends it) means: refused."""
        output = await machine.wait_gone()
        async with guest.lock:
            if guest.record.phase is IncomingPhase.PREPARED:
                guest.machine = None
                await self._end(guest, f"its QEMU ended here: {output.strip()[-500:]}")

    async def accept(self, move_id: str, peer_id: str) -> IncomingStatus:
        """The source has given the VM to us: record it as ours, then let it run. PeerRefused is a definite no. Once
        begun it is finished, whether or not the caller still listens."""
        self._peers.heard(peer_id)
        task = asyncio.create_task(self._accept(move_id, peer_id), name=f"accept {move_id}")
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        return await asyncio.shield(task)

    async def _accept(self, move_id: str, peer_id: str) -> IncomingStatus:
        guest = self._guests.get(move_id)
        if guest is None:
            raise PeerRefused(f"move {move_id}", "is not known here")
        _own(guest, peer_id)
        async with guest.lock:
            if guest.record.phase is IncomingPhase.PREPARED:
                await self._require_loaded(guest)
                await self._record_accepted(guest)
            if guest.record.phase is not IncomingPhase.ACCEPTED:
                raise PeerRefused(f"move {move_id}", guest.record.text or "was refused")
            return IncomingStatus(phase=IncomingPhase.ACCEPTED)

    async def _require_loaded(self, guest: Guest) -> None:
        """Refuses for good a move whose state is not all here: what cannot run must not be accepted."""
        status = await self._status(guest)
        if not status.loaded:
            await self._end(guest, "its state has not fully arrived")

    async def _record_accepted(self, guest: Guest) -> None:
        if guest.record.phase is not IncomingPhase.PREPARED:
            return
        host, machine, config = self._host, guest.machine, guest.record.config
        assert machine is not None
        if self._hook is not None:
            await self._hook("incoming/accept", "before")
        accepted = guest.record.but(phase=IncomingPhase.ACCEPTED)
        vm = VmRecord(
            config=config,
            next_config=guest.record.next_config,
            state=VmState.MIGRATING,
            generation=guest.record.generation,
            checkpoint=guest.record.luggage.now,
            process=machine.process,
        )
        claims = await host.claims.plan_claim(config.id, config.disks, vm.generation)
        records = [Put(_key(accepted.id), accepted.to_json()), Put(vm_key(vm.id), vm.to_json())]
        writes = [*records, Delete(key_of_moved(vm.id)), *claims.writes, *await arrive(host, accepted)]
        try:
            checks = [Check(vm_key(vm.id), ABSENT), *claims.checks]
            revision = await host.store.commit(Transaction(writes, checks, durable=True))
        except CheckFailed as error:
            await self._end(guest, f"the VM or one of its disks was taken here meanwhile ({error.key})")
            return
        guest.record = accepted
        host.moved.pop(config.id, None)
        if guest.watcher is not None:
            guest.watcher.cancel()
        actor = self._roster.arrive(vm, revision, machine)
        if self._hook is not None:
            await self._hook("incoming/accept", "after")
        try:
            await machine.status()
        except QemuFailed:
            await self._take_no_more(guest, actor)
            return
        await self._roster.finish_arrival(actor, guest.record.run)

    async def _take_no_more(self, guest: Guest, actor: VmActor) -> None:
        """Its QEMU died between the record and the order to run: the guest has certainly not run here, so the source,
        which still has it all, may go on. Recorded before it is told."""
        host = self._host
        refused = guest.record.but(phase=IncomingPhase.REFUSED, text="its QEMU died here before it could run")
        gone = await leave(host, actor.record.id)
        await actor.delete(Transaction([Put(_key(refused.id), refused.to_json()), *gone]))
        guest.record = refused
        await host.claims.release(actor.record.id)
        host.actors.pop(actor.record.id, None)
        guest.ended = asyncio.get_running_loop().time()
        await self._tidy(guest)

    async def refuse(self, move_id: str, peer_id: str) -> IncomingStatus:
        """The source gives up (or, once accepted, confirms that it has finished): end it here, or forget it."""
        self._peers.heard(peer_id)
        guest = self._guests.get(move_id)
        if guest is None:
            return IncomingStatus(phase=IncomingPhase.REFUSED, text="this host does not know the move")
        _own(guest, peer_id)
        async with guest.lock:
            if guest.record.phase is IncomingPhase.PREPARED:
                await self._end(guest, "the source gave up")
            elif guest.record.phase is IncomingPhase.ACCEPTED:
                await self._forget(guest)
            return IncomingStatus(phase=guest.record.phase, text=guest.record.text)

    async def _end(self, guest: Guest, text: str) -> None:
        """Record the refusal first: from then on it can never run here. Then tidy."""
        host, record = self._host, guest.record
        refused = record.but(phase=IncomingPhase.REFUSED, text=text)
        await host.store.commit(Transaction([Put(_key(record.id), refused.to_json())], durable=True))
        guest.record = refused
        guest.ended = asyncio.get_running_loop().time()
        log.info("move.refused", move=record.id, vm=record.config.id, why=text)
        await self._tidy(guest)

    async def _tidy(self, guest: Guest) -> None:
        """Remove what is left of a refused move. While it lasts no other move of the VM to here may begin."""
        guest.tidying = True
        try:
            await _remove(self._host, guest, _expected(self._guests.values(), guest))
        finally:
            guest.tidying = False

    async def _forget(self, guest: Guest) -> None:
        await self._host.store.commit(Transaction([Delete(_key(guest.record.id))]))
        self._guests.pop(guest.record.id, None)

    # surviving

    async def recover(self) -> None:
        """After a restart, once the VMs are adopted: find the QEMUs that wait here, finish what was accepted."""
        for entry in await self._host.store.list("incoming/"):
            guest = Guest(Incoming.model_validate(entry.value))
            guest.ended = asyncio.get_running_loop().time()
            self._guests[guest.record.id] = guest
        for guest in list(self._guests.values()):
            record = guest.record
            if record.phase is IncomingPhase.REFUSED:
                await self._tidy(guest)  # it may have been killed between the word and the deed
            elif record.phase is IncomingPhase.PREPARED:
                await self._recover_prepared(guest)
            elif record.phase is IncomingPhase.ACCEPTED and record.config.id in self._host.actors:
                actor = self._host.actors[record.config.id]
                if actor.machine is not None and actor.record.state is VmState.MIGRATING and not actor.record.job:
                    await self._roster.finish_arrival(actor, record.run)
        self._reconciler = asyncio.create_task(self._reconcile(), name="incoming reconciler")

    async def _recover_prepared(self, guest: Guest) -> None:
        config = guest.record.config
        machine: Machine | None = None
        with contextlib.suppress(HostlerError):
            machine = await self._host.hypervisor.adopt(config.id, str(self._host.paths.vm_run(config.id)))
        async with guest.lock:
            if machine is None:
                await self._end(guest, "its QEMU was gone when the daemon came back")
            else:
                self._adopt(guest, machine)

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(ROUND)
            for guest in list(self._guests.values()):
                try:
                    await self._reconcile_one(guest)
                except Exception:  # one bad move must not keep the others from being tidied
                    log.exception("move.reconcile-failed", move=guest.record.id)

    async def _reconcile_one(self, guest: Guest) -> None:
        if guest.record.phase is IncomingPhase.REFUSED:
            if asyncio.get_running_loop().time() - guest.ended > REMEMBER:
                await self._forget(guest)
            return
        if self._peers.silent_for(guest.record.source) < ROUND:
            return
        word = await self._ask_source(guest)
        if guest.record.phase is IncomingPhase.ACCEPTED:
            if word is not None and (word.over or not word.known):
                await self._forget(guest)
            return
        async with guest.lock:
            if guest.record.phase is not IncomingPhase.PREPARED:
                return
            loaded = (await self._status(guest)).loaded
            silent = self._peers.silent_for(guest.record.source)
            if target_may_refuse(word, loaded, silent, PATIENCE):
                await self._end(guest, "the source has given the move up" if word else "the source is silent")

    async def _ask_source(self, guest: Guest) -> SourceWord | None:
        try:
            said = await self._peers.link(guest.record.source).outgoing(guest.record.id)
        except HostlerError:
            return None
        return SourceWord(known=said.known, over=said.over, given=said.owner == self._host.facts.id)

    async def close(self) -> None:
        """The daemon stops: leave the QEMUs waiting; the next daemon finds them."""
        watchers = [g.watcher for g in self._guests.values()]
        tasks = [t for t in (self._reconciler, *watchers, *self._accepting) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _remove(host: Host, guest: Guest, expected: bool) -> None:
    """End the QEMU of a refused move and remove what it had. `expected`: another move brings the same VM."""
    config = guest.record.config
    if guest.watcher is not None and guest.watcher is not asyncio.current_task():
        guest.watcher.cancel()
    with contextlib.suppress(HostlerError):
        if guest.machine is not None:
            await guest.machine.quit()
    guest.machine = None
    if config.id in host.actors or expected:
        return  # what is there belongs to a VM of ours, or to one that is coming
    await host.hypervisor.kill_leftovers(config.id, str(host.paths.vm_run(config.id)))
    # Its access rights stay: they are the source's as much as ours, on the same files and for the same user.
    await host.resources.release(config, moved=True, forget=True)


def _expected(guests: Iterable[Guest], guest: Guest) -> bool:
    """Whether another move of the same VM is under way to here."""
    others = [g.record for g in guests if g is not guest and g.record.phase is IncomingPhase.PREPARED]
    return any(record.config.id == guest.record.config.id for record in others)
