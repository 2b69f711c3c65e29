"""The storage part of `./run demo`: what happens to a running VM's disk while its guest writes and a client listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hostler.client.client import Client
from hostler.model.backup_requests import BackupChoice, BackupList, BackupRun
from hostler.model.checkpoint_requests import CheckpointCreate
from hostler.model.disk import ImageFormat
from hostler.model.disk_requests import DiskGrow, DiskMove
from hostler.model.errors import InternalError
from hostler.model.job import Job
from hostler.model.units import MiB, format_size
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import LabHost

if TYPE_CHECKING:
    from hostler.testing.demo import Demo

T = TypeVar("T")

DISK, SERIAL = "disk0", "EXTRA"
SIZE = 8 * MiB
GROWN = 96 * MiB
TRIES = 200
"""Looks of the guest at its disk, every 50 ms, until it has the new size."""
FIRST, SECOND = 7, 8
"""Seeds of the patterns that the guest writes before and after the checkpoint."""


class StorageSteps:
    """Move, grow, checkpoint, back up, merge; each step looks whether the guest's data is still what it wrote."""

    def __init__(self, demo: Demo, vm: str, host: LabHost, serial: GuestSerial) -> None:
        self._demo = demo
        self._vm = vm
        self._host = host
        self._serial = serial

    async def run(self) -> None:
        """Everything. The guest has written the first pattern."""
        await self._move()
        await self._grow()
        await self._checkpoint_and_back_up()
        await self._merge()

    async def _ask(self, work: Callable[[Client], Job]) -> Job:
        def ask() -> Job:
            with self._host.client() as client:
                return client.jobs.finish(work(client), timeout=120)

        job = await asyncio.to_thread(ask)
        assert job.ended is not None
        return job

    def _measure(self, job: Job, what: str, key: str) -> None:
        assert job.ended is not None
        self._demo.figures.add(what, key, (job.ended - job.created).total_seconds() * 1000)

    async def _verify(self, seed: int, after: str, offset: int = 0) -> None:
        verdict = await self._serial.verify(SERIAL, seed=seed, size=SIZE, offset=offset)
        if verdict.bad_sectors:
            raise InternalError(f"vm {self._vm}", f"{verdict.bad_sectors} sectors of its disk are wrong after {after}")

    async def _move(self) -> None:
        place = self._demo.shared / "fast"
        place.mkdir(mode=0o755)
        self._demo.step(
            "moving the disk to other storage, in another format, while the guest has it open",
            f"hostler disk move {self._vm} {DISK} --to {place} --format raw",
        )
        request = DiskMove(to=str(place), format=ImageFormat.RAW)
        job = await self._ask(lambda c: c.disks.move(self._vm, DISK, request, wait=60))
        self._measure(job, "disk moved to other storage: command until all is done", "disk_move")
        await self._verify(FIRST, "the move of its disk")

    async def _grow(self) -> None:
        self._demo.step("making the disk larger", f"hostler disk grow {self._vm} {DISK} {format_size(GROWN)}")
        job = await self._ask(lambda c: c.disks.grow(self._vm, DISK, DiskGrow(size=GROWN), wait=60))
        self._measure(job, "disk made larger: command until all is done", "disk_grow")
        for _ in range(TRIES):
            seen = (await self._serial.wait_disk(SERIAL)).size
            if seen == GROWN:
                break
            await asyncio.sleep(0.05)
        else:
            raise InternalError(f"vm {self._vm}", f"its guest sees {seen} bytes, not the {GROWN} of the larger disk")
        self._demo.say(f"    the guest sees {format_size(seen)}")

    async def _checkpoint_and_back_up(self) -> None:
        self._demo.step("a checkpoint; then the guest writes on", f"hostler checkpoint create {self._vm} --name before")
        job = await self._ask(lambda c: c.checkpoints.create(self._vm, CheckpointCreate(name="before"), wait=60))
        self._measure(job, "checkpoint: command until all is done", "checkpoint")
        await self._serial.write(SERIAL, seed=SECOND, size=SIZE, offset=SIZE)
        place = self._demo.directory / "backups"
        place.mkdir(mode=0o700)
        self._demo.step("two backups, the second with what changed only", f"hostler backup run {self._vm} --to {place}")
        request = BackupRun(directory=str(place))
        await self._ask(lambda c: c.backups.run(self._vm, request, wait=60))
        await self._serial.write(SERIAL, seed=SECOND, size=MiB, offset=SIZE)
        job = await self._ask(lambda c: c.backups.run(self._vm, request, wait=60))
        self._measure(job, "incremental backup: command until all is done", "backup")
        await self._ask(lambda c: c.backups.verify(_last(c, place), wait=60))
        self._demo.say("    the second backup is verified by its checksums")

    async def _merge(self) -> None:
        self._demo.step(
            "deleting the checkpoint: its layers are merged while the guest runs",
            f"hostler checkpoint delete {self._vm} before",
        )
        job = await self._ask(lambda c: c.checkpoints.delete(self._vm, "before", wait=60))
        self._measure(job, "checkpoint deleted and merged: command until all is done", "merge")
        await self._verify(FIRST, "the merge")
        await self._verify(SECOND, "the merge", offset=SIZE)
        self._demo.say(f"    {2 * SIZE // MiB} MiB verified, nothing lost")


def _last(client: Client, place: Path) -> BackupChoice:
    newest = max(client.backups.list(BackupList(directory=str(place))), key=lambda b: b.created)
    return BackupChoice(directory=str(place), backup=newest.id)
