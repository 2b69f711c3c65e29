"""Lets guests go on by themselves that were stopped because their storage was full, or out of reach.

    critical, no-space  --more than the reserve is free where its disk is--> resumed
    critical, io-error  --every disk that failed is on a storage system, which answers again--> resumed

A reconciler: it takes no wish as input, only looks how things are, again and again. A guest stopped that way has lost
nothing: QEMU keeps the request that failed, and repeats it when the guest goes on. Resumed too early it stops again at
once, hence the reserve (model.pool.reserve), one guest after the other, and longer and longer pauses for one that
keeps failing.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operations.pause import RESUME
from hostler.model.disk import Disk
from hostler.model.errors import HostlerError
from hostler.model.job import JobState
from hostler.model.pool import reserve
from hostler.model.vm import CriticalReason, VmState
from hostler.storage.pools import filesystem
from hostler.storage.pools.lane import Lane

log = structlog.get_logger()

ROUND = 2.0
"""Seconds between two looks. One without a guest that waits costs microseconds."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
"""Seconds until a guest is resumed again that was stopped again soon after."""
CALM = 60.0
"""Seconds without another stop after which the pauses begin anew."""
LOOK = 5.0
RESUME_PATIENCE = 30.0


@dataclass(slots=True)
class _Past:
    """When a guest was resumed, and how long it waits the next time."""

    resumed: float
    pause: float


class RoomKeeper:
    """The task that looks after them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._past: dict[str, _Past] = {}
        self._lanes: dict[str, Lane] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look from now on."""
        self._task = asyncio.create_task(self._run(), name="room")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # the top of a task that must outlive any single fault
                log.exception("room.fault")
            await asyncio.sleep(ROUND)

    async def look(self) -> None:
        """One round: resume whoever can go on, one after the other, each judged by what the one before it has left."""
        waiting = [actor for actor in self._host.actors.values() if waits(actor)]
        for actor in sorted(waiting, key=lambda actor: actor.record.name):
            try:
                if self._is_due(actor) and await self._can_go_on(actor):
                    await self._resume(actor)
            except HostlerError as error:
                log.info("room.later", vm=actor.record.id, why=str(error))
        for gone in self._past.keys() - self._host.actors.keys():
            del self._past[gone]

    def _is_due(self, actor: VmActor) -> bool:
        past = self._past.get(actor.record.id)
        return past is None or asyncio.get_running_loop().time() >= past.resumed + past.pause

    async def _can_go_on(self, actor: VmActor) -> bool:
        """Whether every disk that failed could take what it refused."""
        machine, record = actor.machine, actor.record
        if machine is None:
            return False
        failed = await machine.io_failed()
        disks = [disk for disk in record.config.disks if disk.id in failed]
        if len(disks) != len(failed) or not disks:
            return False  # a disk that the record does not know: nobody can tell
        for disk in disks:
            if not await (self._has_room(disk) if failed[disk.id] == "nospace" else self._answers(disk)):
                return False
        return True

    async def _has_room(self, disk: Disk) -> bool:
        """For a file, by its file system; how much a storage system has left only the next try tells."""
        if not disk.source.local:
            return await self._answers(disk)
        directory = os.path.dirname(disk.source.path)
        lane = self._lanes.setdefault(directory, Lane(f"directory {directory}"))
        usage = await lane.run(lambda: filesystem.usage(directory), LOOK)
        return usage.free is not None and usage.free > reserve(usage)

    async def _answers(self, disk: Disk) -> bool:
        """Whether the storage systems behind it are there and what they were. A failing local disk is for people."""
        layers = list(disk.source.layers())
        if not any(layer.networked for layer in layers):
            return False
        for layer in layers:
            await self._host.places.verify(layer, f"disk {disk.id}")
        return True

    async def _resume(self, actor: VmActor) -> None:
        now, vm_id = asyncio.get_running_loop().time(), actor.record.id
        past = self._past.get(vm_id)
        calm = past is None or now - past.resumed > past.pause + CALM
        pause = FIRST_PAUSE if calm or past is None else min(past.pause * 2, LONGEST_PAUSE)
        self._past[vm_id] = _Past(now, pause)
        job = await RESUME.begin(self._host, actor, "hostlerd")
        ended = await self._host.jobs.wait(job.id, RESUME_PATIENCE)
        log.info("room.resumed", vm=vm_id, outcome=ended.state, done=ended.state is JobState.DONE)


def waits(actor: VmActor) -> bool:
    """Whether a VM stands still because of its storage, and is nobody's."""
    record = actor.record
    return (
        record.state is VmState.CRITICAL
        and record.reason in (CriticalReason.NO_SPACE, CriticalReason.IO_ERROR)
        and record.job is None
        and record.handed_to is None
        and actor.machine is not None
    )
