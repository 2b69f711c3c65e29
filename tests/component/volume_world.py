"""Volumes with everything that works on them, on real files and with the real qemu-img, without VMs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler.host.events import EventHub
from hostler.host.jobs import JobRunner
from hostler.host.pools.places import Places
from hostler.host.pools.service import Pools
from hostler.host.volumes.operations.base import Tools
from hostler.host.volumes.users import VolumeUsers
from hostler.host.volumes.work import VolumeWork
from hostler.model.disk import ImageFormat
from hostler.model.job import Job, JobState
from hostler.model.limits import PROFILES, Profile
from hostler.model.volume import Volume
from hostler.storage.changes import VolumeChanges
from hostler.storage.claims import ClaimBook
from hostler.storage.pools.book import PoolBook
from hostler.storage.volumes import VolumeService
from hostler.store.sqlite import SqliteStore

PATIENCE = 60.0


@dataclass
class VolumeWorld:
    store: SqliteStore
    service: VolumeService
    claims: ClaimBook
    jobs: JobRunner
    work: VolumeWork
    where: Path

    async def volume(self, source: Path, format: ImageFormat, name: str = "v") -> Volume:
        """A volume with the content of a raw image."""
        return await self.service.create_from(name, str(source), format, source_format=ImageFormat.RAW)

    async def end(self, job: Job) -> Job:
        """The job when it is over."""
        ended = await self.jobs.wait(job.id, PATIENCE)
        assert ended.is_over, ended
        return ended

    async def done(self, job: Job) -> dict[str, Any]:
        """The result of a job that must succeed."""
        ended = await self.end(job)
        assert ended.state is JobState.DONE, ended.error
        assert ended.result is not None
        assert await self.store.list("claim/") == []
        return ended.result


@asynccontextmanager
async def volume_world(directory: Path, where: Path | None = None) -> AsyncIterator[VolumeWorld]:
    """As a daemon puts it together. `where`: the volume directory."""
    store = await SqliteStore.open(directory / "state/hostler.db")
    where = where or directory / "volumes"
    events, claims = EventHub(), ClaimBook(store)
    service = VolumeService(store, where, PROFILES[Profile.HOSTLER], claims)
    jobs = JobRunner(store, events)
    pools = Pools(PoolBook(store), service, events, where, "this", tuple)
    tools = Tools(VolumeChanges(store, service), VolumeUsers({}, claims, service), events)
    work = VolumeWork(tools, claims, jobs, pools, Places(pools, service, tuple))
    try:
        await service.recover()
        await pools.recover()
        for job in await jobs.load():
            await work.recover(job)
        yield VolumeWorld(store, service, claims, jobs, work, where)
    finally:
        await jobs.close()
        events.close()
        await store.close()
