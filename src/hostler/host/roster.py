"""Which VMs there are here: how one gets its actor, and what happens when one arrives or its QEMU ends by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.model.errors import HostlerError
from hostler.model.vm import CriticalReason, VmRecord, VmState

log = structlog.get_logger()


class Roster:
    """Adds VMs to the host, and sees to those whose QEMU ended or came from elsewhere."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._background: set[asyncio.Task[None]] = set()

    def add(self, record: VmRecord, revision: int) -> VmActor:
        """Give a stored record its actor."""
        actor = VmActor(self._host.store, self._host.events, record, revision, self._released)
        self._host.actors[record.id] = actor
        self._host.events.publish("vm", record.id, record)
        return actor

    async def _released(self, record: VmRecord) -> None:
        """A VM's QEMU ended without a job of ours: give back what it held."""
        try:
            await self._host.resources.release(record.config)
            await self._host.claims.release(record.id)
        except (HostlerError, OSError) as error:
            log.warning("vm.release-failed", vm=record.id, why=str(error))

    def arrive(self, record: VmRecord, revision: int, machine: Machine) -> VmActor:
        """A VM has come here with its machine; its record is stored already."""
        actor = self.add(record, revision)
        actor.attach(machine)
        return actor

    async def finish_arrival(self, actor: VmActor, run: bool) -> None:
        """Let an accepted VM run (or stay paused), and tell the network where it is now."""
        machine = actor.machine
        assert machine is not None
        try:
            await self._host.resources.open_exports(actor.record.config)
            if run:
                await machine.run()
        except HostlerError as error:
            log.error("vm.arrival-trouble", vm=actor.record.id, why=str(error))
            text = f"it has arrived but could not go on: {error.object}: {error.cause}; 'hostler vm resume' tries again"
            await actor.set(state=VmState.CRITICAL, reason=CriticalReason.IO_ERROR, reason_text=text)
            return
        self._later(self._settle_arrival(actor, machine))

    async def _settle_arrival(self, actor: VmActor, machine: Machine) -> None:
        try:
            await machine.announce()
        except HostlerError as error:
            log.warning("vm.announce-failed", vm=actor.record.id, why=str(error))
        await actor.settle()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """The daemon stops: leave every VM alone, and its QEMU running."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for actor in self._host.actors.values():
            await actor.close()
