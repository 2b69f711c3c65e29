r"""One VM, one actor: the single task that changes a VM's record, and the one queue through which it hears of anything.

    requests (begin a job, change the record) --\
                                                 >-- one queue --> the actor's task --> store, event to watchers
    QEMU's events, QEMU is gone ----------------/

At most one job holds a VM. While one does, the job's own steps say which state the VM is in (through `set`), and QEMU's
events are only noted; when none does, each event makes the actor settle: ask QEMU how things are and record that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from hostler.host.events import EventHub
from hostler.host.hypervisor import Machine
from hostler.host.settle import Verdict, verdict_gone, verdict_running
from hostler.model.errors import Busy, HostlerError, NotFound, QemuFailed, TimedOut
from hostler.model.machine import MachineEvent
from hostler.model.vm import HAS_PROCESS, TRANSITIONS, CriticalReason, VmRecord, VmState
from hostler.store.contract import Check, CheckFailed, Delete, Put, Store, Transaction

log = structlog.get_logger()
T = TypeVar("T")

SETTLING_EVENTS = frozenset(
    {"STOP", "RESUME", "BLOCK_IO_ERROR", "GUEST_PANICKED", "RESET", "SUSPEND", "WAKEUP", "HOSTLER_EVENTS_LOST"}
)
"""Events after which the actor asks QEMU how things are. The last one says that some were missed."""

MAY_HAVE_PROCESS = HAS_PROCESS | {VmState.CRITICAL}

NEEDS_A_JOB = HAS_PROCESS - {VmState.RUNNING, VmState.PAUSED}
"""States on the way to another one. Without a job that is under way nobody would lead out of them, and no operation
begins in them: a VM whose QEMU does not answer must not stay there, or it could not even be turned off."""

SETTLE_AFTER = 0.05
"""Seconds after a success until the actor looks for itself: whoever asked has the answer by then."""

Released = Callable[[VmRecord], Awaitable[None]]
"""Called when a VM's QEMU is gone and its host resources are to be released."""


def vm_key(vm_id: str) -> str:
    """Where a VM's record is in the store."""
    return f"vm/{vm_id}"


class VmActor:
    """Owns one VM's record. Every method that changes it runs in the actor's own task, in order."""

    def __init__(self, store: Store, events: EventHub, record: VmRecord, revision: int, released: Released) -> None:
        self._store = store
        self._events = events
        self._record = record
        self._revision = revision
        self._released = released
        self._queue: asyncio.Queue[tuple[Callable[[], Awaitable[Any]], asyncio.Future[Any] | None]] = asyncio.Queue()
        self._task = asyncio.create_task(self._main(), name=f"vm {record.id}")
        self._listener: asyncio.Task[None] | None = None
        self._goodbye = False
        self._last_output = ""
        self._deleted = False
        self.machine: Machine | None = None
        self.silent = False
        """Whether there is a QEMU that does not answer, so that nobody can tell how the VM is."""
        self.gone = asyncio.Event()
        """Set while there is no QEMU."""
        self.gone.set()

    @property
    def record(self) -> VmRecord:
        """The VM as it is now."""
        return self._record

    @property
    def subject(self) -> str:
        """How errors name this VM."""
        return f"vm {self._record.name}"

    # the queue

    async def _main(self) -> None:
        while not (self._deleted and self._queue.empty()):
            action, reply = await self._queue.get()
            try:
                result = await action()
            except Exception as error:  # the actor must outlive any single request; the asker gets the error
                if reply is None or reply.done():
                    log.exception("vm.actor-fault", vm=self._record.id)
                else:
                    reply.set_exception(error)
            else:
                if reply is not None and not reply.done():
                    reply.set_result(result)

    async def _ask(self, action: Callable[[], Awaitable[T]]) -> T:
        if self._task.done():  # the VM is deleted: nobody else changes anything any more
            return await action()
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((action, reply))
        return await reply

    def _tell(self, action: Callable[[], Awaitable[None]]) -> None:
        self._queue.put_nowait((action, None))

    # changing the record

    async def set(self, durable: bool = False, extra: Transaction | None = None, **changes: object) -> VmRecord:
        """Change fields of the record; a new `state` must be a legal one. `extra`: writes and checks of others (claims)
        that belong to the same transaction; its CheckFailed passes through with nothing changed."""

        async def action() -> VmRecord:
            return await self._write(self._record.but(**changes), durable, extra)

        return await self._ask(action)

    async def change(
        self, edit: Callable[[VmRecord], VmRecord], extra: Transaction | None = None, durable: bool = False
    ) -> VmRecord:
        """Change the record by a function of what it is at that moment."""

        async def action() -> VmRecord:
            return await self._write(edit(self._record), durable, extra)

        return await self._ask(action)

    async def hold(self, job_id: str, check: Callable[[VmRecord], None]) -> VmRecord:
        """Give the VM to a job, if none holds it and `check` (which raises) agrees."""

        async def action() -> VmRecord:
            self._refuse_if_held()
            check(self._record)
            return await self._write(self._record.but(job=job_id), False, None)

        return await self._ask(action)

    async def let_go(self, job_id: str, as_wished: bool = False) -> None:
        """The job has ended: take the VM back and see how it is. `as_wished`: it succeeded, so its own word for the
        state is believed for now, and nobody waits for the look."""

        async def action() -> None:
            if self._record.job == job_id and not self._deleted:
                await self._write(self._record.but(job=None), False, None)
                if as_wished:
                    asyncio.get_running_loop().call_later(SETTLE_AFTER, self._tell, self._settle)
                else:
                    await self._settle()

        await self._ask(action)

    async def delete(self, extra: Transaction | None = None) -> None:
        """Remove the record. The actor stays for whoever still holds it, but writes no more."""

        async def action() -> None:
            writes = [Delete(vm_key(self._record.id)), *(extra.writes if extra else ())]
            await self._store.commit(Transaction(writes, extra.checks if extra else (), durable=True))
            self._deleted = True
            self._events.publish("vm", self._record.id, None)

        await self._ask(action)

    def _refuse_if_held(self) -> None:
        if self._deleted:
            raise NotFound(self.subject, "was deleted meanwhile")
        if self._record.job is not None:
            raise Busy(
                self.subject,
                f"another operation is under way (job {self._record.job})",
                f"wait for it with 'hostler job watch {self._record.job[:8]}', or cancel it",
                job=self._record.job,
            )

    async def _write(self, record: VmRecord, durable: bool, extra: Transaction | None) -> VmRecord:
        old, new = self._record.state, record.state
        if old is not new and new not in TRANSITIONS[old]:
            raise AssertionError(f"{self.subject}: {old} -> {new} is no legal transition")
        if self._deleted:
            return self._record
        writes = [Put(vm_key(record.id), record.to_json()), *(extra.writes if extra else ())]
        checks = [Check(vm_key(record.id), self._revision), *(extra.checks if extra else ())]
        try:
            self._revision = await self._store.commit(Transaction(writes, checks, durable))
        except (TimedOut, CheckFailed) as error:
            if isinstance(error, CheckFailed) and error.key != vm_key(record.id):
                raise
            await self._read_back(record, error)
        self._record = record
        self._events.publish("vm", record.id, record)
        return record

    async def _read_back(self, wanted: VmRecord, error: Exception) -> None:
        """A write whose outcome is unknown: look. Returns if it was done; otherwise nothing was changed."""
        entry = await self._store.get(vm_key(wanted.id))
        if entry is not None:
            self._revision = entry.revision
            if entry.value == wanted.to_json():
                return
        if isinstance(error, TimedOut):
            raise error
        raise Busy(self.subject, "its record was changed by somebody else", "try again") from error

    # the machine

    def attach(self, machine: Machine) -> None:
        """From now on this machine is the VM's; its events come to the actor."""
        self.machine = machine
        self.silent = False
        self._goodbye = False
        self.gone.clear()
        self._listener = asyncio.create_task(self._listen(machine), name=f"events of vm {self._record.id}")

    def present(self) -> Machine:
        """The VM's machine. QemuFailed when its QEMU is gone."""
        if self.machine is None:
            raise QemuFailed(self.subject, "its QEMU is not there", "see 'hostler vm show' for the reason", gone=True)
        return self.machine

    def note_last_output(self, output: str) -> None:
        """What the VM's QEMU wrote before it ended while no daemon listened."""
        self._last_output = output

    def expect_end(self) -> None:
        """QEMU is about to end because somebody asked for it: its end is no surprise."""
        self._goodbye = True

    async def _listen(self, machine: Machine) -> None:
        async for event in machine.events():
            self._tell(lambda event=event: self._heard(event))  # type: ignore[misc]
        output = await machine.wait_gone()
        self._tell(lambda: self._lost(machine, output))

    async def _heard(self, event: MachineEvent) -> None:
        log.debug("vm.event", vm=self._record.id, qemu_event=event.name)
        if event.name == "SHUTDOWN":
            self._goodbye = True
        elif event.name in SETTLING_EVENTS:
            await self._settle()

    async def _lost(self, machine: Machine, output: str) -> None:
        if self.machine is not machine:
            return
        self.machine = None
        self._last_output = output
        self.gone.set()
        log.info("vm.qemu-gone", vm=self._record.id, expected=self._goodbye, state=self._record.state)
        if self._record.job is None:
            await self._take(verdict_gone(self._record, self._goodbye, output))

    async def _settle(self) -> None:
        """See how things are and record it. Does nothing while a job holds the VM."""
        if self._record.job is not None or self._deleted:
            return
        machine = self.machine
        if machine is None:
            if self._record.state in MAY_HAVE_PROCESS and not self.silent:
                await self._take(verdict_gone(self._record, self._goodbye, self._last_output))
            return
        try:
            status = await machine.status()
            trouble = await machine.io_failed() if status.value == "io-error" else {}
        except HostlerError as error:
            log.info("vm.settle-later", vm=self._record.id, why=str(error))  # mostly QEMU is going: `_lost` follows
            if isinstance(error, TimedOut) and self._record.state in NEEDS_A_JOB:
                await self._take(Verdict(VmState.CRITICAL, CriticalReason.INCONSISTENT, "its QEMU does not answer"))
            return
        await self._take(verdict_running(status, trouble))

    async def _take(self, verdict: Verdict) -> None:
        record = self._record
        if verdict.state not in TRANSITIONS[record.state] and verdict.state is not record.state:
            text = verdict.text or f"it was {record.state}, but its QEMU is {verdict.state}"
            verdict = Verdict(VmState.CRITICAL, verdict.reason or CriticalReason.INCONSISTENT, text)
        gone = verdict.state is VmState.OFF and record.state is not VmState.OFF
        changes: dict[str, object] = {"state": verdict.state, "reason": verdict.reason, "reason_text": verdict.text}
        if gone:
            changes["process"] = None
        if any(getattr(record, key) != value for key, value in changes.items()):
            log.info("vm.settled", vm=record.id, found=verdict.state, was=record.state, reason=verdict.reason)
            await self._write(record.but(**changes), False, None)
        if gone:
            await self._released(self._record)

    async def settle(self) -> VmRecord:
        """See how things are and record it; returns the record."""

        async def action() -> VmRecord:
            await self._settle()
            return self._record

        return await self._ask(action)

    async def close(self) -> None:
        """The daemon stops: leave the VM alone."""
        for task in (self._task, self._listener):
            if task is not None:
                task.cancel()
        await asyncio.gather(self._task, *([self._listener] if self._listener else []), return_exceptions=True)
        if self.machine is not None:
            await self.machine.close()
