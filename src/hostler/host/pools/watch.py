"""Looks at every pool now and then: tells when one gets low, full, or out of reach, and follows libraries."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from hostler.host.events import EventHub
from hostler.host.pools.service import Pools
from hostler.model.errors import HostlerError, InUse, NotFound
from hostler.model.pool import PoolKind, PoolScan, PoolState
from hostler.storage.volumes import VolumeService

log = structlog.get_logger()

ROUND = 15.0
"""Seconds between two looks at every pool."""


class PoolWatch:
    """The task that looks."""

    def __init__(self, pools: Pools, service: VolumeService, events: EventHub) -> None:
        self._pools = pools
        self._service = service
        self._events = events
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Watch the pools from now on."""
        self._task = asyncio.create_task(self._watch(), name="pools")

    async def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # the top of a task that must outlive any single fault
                log.exception("pool.watch-fault")
            await asyncio.sleep(ROUND)

    async def look(self) -> None:
        """One round: how every pool is, and what is new in libraries."""
        await self._pools.assign()
        for view in await self._pools.list():
            if view.kind is PoolKind.LIBRARY and view.state is not PoolState.UNREACHABLE:
                await self._follow(view.name)

    async def _follow(self, name: str) -> None:
        """A library's volumes are what lies in its directory: new media appear, removed ones go (unless a VM has them,
        which shows as missing)."""
        try:
            report = await self._pools.scan(name, PoolScan(adopt=True), by="hostlerd")
            for gone in report.missing:
                with contextlib.suppress(InUse, NotFound):
                    await self._service.delete(gone, keep_file=True)
                    self._events.publish("volume", gone, None)
        except HostlerError as error:
            log.warning("pool.scan-failed", pool=name, why=str(error))
