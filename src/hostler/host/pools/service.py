"""Pools as the host's users see them: made, looked at, scanned, watched; and where a new volume goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog

from hostler.host.events import EventHub
from hostler.host.pools.scan import scan
from hostler.host.pools.views import view_of
from hostler.model.base import utc_now
from hostler.model.disk import SourceKind
from hostler.model.errors import Busy, HostLacks, HostlerError, InUse, InvalidInput, NotFound, WrongState
from hostler.model.pool import (
    DEFAULT_POOL,
    Connection,
    Discover,
    Pool,
    PoolChange,
    PoolCreate,
    PoolKind,
    PoolScan,
    PoolSecrets,
    PoolState,
    PoolView,
    ScanReport,
    StorageTarget,
)
from hostler.model.views import Deleted
from hostler.model.volume import Volume, VolumeState
from hostler.storage.pools import filesystem
from hostler.storage.pools.book import PoolBook
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.pools.drivers import driver_of
from hostler.storage.pools.iscsi import discover
from hostler.storage.volumes import VolumeService
from hostler.storage.waiting import in_thread
from hostler.store.table import Row

log = structlog.get_logger()

INITIATORS = "iqn.2008-11.org.linux-kvm:"
"""What the names of hosts as initiators begin with: the name space of QEMU's own default name (block/iscsi.c)."""

Paths = Callable[[], Iterable[str]]


class Pools:
    """The application functions about pools. `in_use`: the paths that disks of this host's VMs name."""

    def __init__(
        self, book: PoolBook, service: VolumeService, events: EventHub, directory: Path, host_id: str, in_use: Paths
    ) -> None:
        self._book = book
        self._service = service
        self._events = events
        self._directory = directory
        self._real_directory = str(directory)
        self._host_id = host_id
        self._in_use = in_use
        self._drivers: dict[str, tuple[Pool, PoolSecrets, PoolDriver]] = {}
        self._seen: dict[str, PoolView] = {}
        self._scanning = asyncio.Lock()

    # coming and going

    async def recover(self) -> None:
        """Before anything else: the pool `default` is there, and volumes made before there were pools are in theirs."""
        try:
            await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
            if DEFAULT_POOL not in {row.id for row in await self._book.rows()}:
                pool = Pool(name=DEFAULT_POOL, kind=PoolKind.DIRECTORY, path=str(self._directory), created=utc_now())
                await self._book.add(pool, PoolSecrets())
            self._real_directory = await asyncio.to_thread(os.path.realpath, self._directory)
            await self.assign()
        except (HostlerError, OSError) as error:  # a full disk must not keep the daemon from looking after its VMs
            log.error("pool.default-not-made", why=str(error))

    async def assign(self) -> None:
        """Every volume that is a file is in the pool whose directory it lies in, also after it was moved."""
        for volume in await self._service.records():
            if volume.kind is not SourceKind.VOLUME or volume.state is not VolumeState.READY:
                continue
            pool = await self.pool_at(volume.path)
            name = pool.name if pool is not None else ""
            if volume.pool != name:
                with contextlib.suppress(NotFound, Busy):  # deleted or changed meanwhile: the next round sees it
                    await self._service.amend(volume.name, pool=name)

    # looking

    async def list(self) -> Sequence[PoolView]:
        """Every pool, by name, as it is now. One that hangs costs a few seconds, and no other one waits for it."""
        volumes = await self._service.records()
        return await asyncio.gather(*(self._view(row.value, volumes) for row in await self._book.rows()))

    async def get(self, name: str) -> PoolView:
        """One pool as it is now."""
        return await self._view((await self._book.get(name)).value, await self._service.records())

    async def _view(self, pool: Pool, volumes: Sequence[Volume]) -> PoolView:
        driver = await self.driver(pool)
        health = await driver.check()
        mine = [v for v in volumes if v.pool == pool.name]
        features, allocated = None, 0
        if health.state is not PoolState.UNREACHABLE:
            with contextlib.suppress(HostlerError):  # it hangs since: said at the next look
                features = await driver.features()
                allocated = await driver.allocated(mine)
        secret = await self._book.secrets(pool.name) != PoolSecrets()
        view = view_of(pool, health, features, mine, allocated, secret, utc_now())
        self._tell(view)
        return view

    def _tell(self, view: PoolView) -> None:
        """Tell whoever listens when a pool has changed for better or worse."""
        before = self._seen.get(view.name)
        self._seen[view.name] = view
        known = before is None or before.state is view.state
        if known and (before is None or bool(before.warnings) == bool(view.warnings)):
            return
        log.info("pool.state", pool=view.name, state=view.state, why=view.text, warnings=[*view.warnings])
        self._events.publish("pool", view.name, view)

    async def driver(self, pool: Pool) -> PoolDriver:
        """The driver of a pool, kept while its record stays: one that hangs must be remembered."""
        secrets = await self._book.secrets(pool.name)
        kept = self._drivers.get(pool.name)
        if kept is None or kept[0] != pool or kept[1] != secrets:
            kept = (pool, secrets, driver_of(pool, secrets))
            self._drivers[pool.name] = kept
        return kept[2]

    async def named(self, name: str) -> PoolDriver:
        """The driver of the pool of that name. NotFound."""
        return await self.driver((await self._book.get(name)).value)

    async def reach(self, name: str) -> tuple[Connection, PoolSecrets]:
        """How QEMU reaches that network pool now, and with which secrets. Errors of the storage system, HostLacks for a
        pool that is none."""
        driver = await self.named(name)
        connection = await driver.connection()
        if connection is None:
            raise HostLacks(f"pool {name}", "is a directory of this host, no network pool", "look at the pool")
        return connection, await self._book.secrets(name)

    async def pool_at(self, path: str) -> Pool | None:
        """The pool of files in whose directory `path` lies; None when there is none."""
        directory = os.path.dirname(path)
        for row in await self._book.rows():
            own = row.id == DEFAULT_POOL and directory == self._real_directory
            if row.value.in_files and (own or directory == row.value.path):
                return row.value
        return None

    # changing

    async def create(self, request: PoolCreate, by: str) -> PoolView:
        """A new pool. It must answer, unless `unchecked`. AlreadyExists, NotFound, NotPermitted, InvalidInput."""
        pool = await self._planned(request)
        secrets = secrets_of(request, PoolSecrets())
        driver_of(pool, secrets)  # refuses certificates that nobody could use
        await self._refuse_same_place(pool)
        if not request.unchecked:
            await self._require_answer(pool, secrets)
        await self._book.add(pool, secrets)
        log.info("pool.created", pool=pool.name, kind=pool.kind, where=pool.where, by=by)
        view = await self.get(pool.name)
        self._events.publish("pool", pool.name, view)
        return view

    async def _planned(self, request: PoolCreate) -> Pool:
        path, mount = "", ""
        if request.path is not None:
            given = request.path
            path, mount = await in_thread(
                f"pool {request.name}", lambda: (os.path.realpath(given), filesystem.mount_point(given))
            )
        return Pool(
            name=request.name,
            kind=request.kind,
            path=path,
            mount=mount,
            portals=request.portals,
            target=request.target or "",
            initiator=request.initiator or (f"{INITIATORS}{self._host_id}" if request.target else ""),
            chap_user=request.chap_user or "",
            exports=request.exports,
            tls=request.tls is not None,
            tls_hostname=request.tls_hostname or "",
            warn_at=request.warn_at,
            notes=request.notes,
            created=utc_now(),
        )

    async def _refuse_same_place(self, pool: Pool) -> None:
        for row in await self._book.rows():
            other = row.value
            same_files = pool.in_files and other.in_files and pool.path == other.path
            if same_files or (not pool.in_files and (pool.target, pool.portals) == (other.target, other.portals)):
                raise InUse(f"pool {pool.name}", f"its place is pool {row.id!r} already", f"use {row.id!r}")

    async def _require_answer(self, pool: Pool, secrets: PoolSecrets) -> None:
        health = await driver_of(pool, secrets).check()
        if health.state is PoolState.UNREACHABLE:
            raise HostLacks(
                f"pool {pool.name}", f"does not answer: {health.text}", "make it reachable, or give --unchecked"
            )

    async def change(self, name: str, request: PoolChange, by: str) -> PoolView:
        """Change its settings. New ways or secrets must be answered."""
        row = await self._book.get(name)
        pool, secrets = changed(row.value, request), await self._book.secrets(name)
        replaced = secrets_of(request, secrets)
        if replaced != secrets or pool.portals != row.value.portals:
            await self._require_answer(pool, replaced)
        await self._book.change(row, pool, replaced if replaced != secrets else None)
        log.info("pool.changed", pool=name, by=by, fields=sorted(request.model_fields_set))
        view = await self.get(name)
        self._events.publish("pool", name, view)
        return view

    async def delete(self, name: str, by: str, dry_run: bool = False) -> Deleted:
        """Forget a pool; what is in it stays. InUse while volumes in it are on record, except for a library's, which
        are forgotten with it."""
        row = await self._book.get(name)
        if name == DEFAULT_POOL:
            raise WrongState(f"pool {name}", "is the host's own", "every host keeps it")
        volumes = [v for v in await self._service.records() if v.pool == name]
        if volumes and row.value.kind is not PoolKind.LIBRARY:
            raise InUse(
                f"pool {name}",
                f"has {len(volumes)} volumes, such as {volumes[0].name}",
                "delete them first, or forget them with 'hostler volume delete --keep-file'",
                holder=volumes[0].name,
            )
        outcome = Deleted(id=name, kept=(row.value.where,))
        if not dry_run:
            for volume in volumes:
                await self._service.delete(volume.name, keep_file=True)
            await self._forget(row)
            log.info("pool.deleted", pool=name, by=by)
        return outcome

    async def _forget(self, row: Row[Pool]) -> None:
        await self._book.remove(row)
        self._drivers.pop(row.id, None)
        self._seen.pop(row.id, None)
        self._events.publish("pool", row.id, None)

    async def discover(self, request: Discover) -> Sequence[StorageTarget]:
        """The iSCSI targets that one of these portals tells of."""
        return await discover(request)

    # scanning

    async def scan(self, name: str, request: PoolScan, by: str) -> ScanReport:
        """What is in a pool that no record knows, what is on record and gone, what was left half made; and, where
        asked, volumes made of the first and the last removed."""
        driver = await self.named(name)
        async with self._scanning:  # two at once would adopt the same file twice
            report = await scan(driver, self._service, frozenset(self._in_use()), request)
        for volume in report.adopted if not request.dry_run else ():
            self._events.publish("volume", volume.name, volume)
        if report.adopted or report.deleted:
            log.info("pool.scanned", pool=name, by=by, adopted=len(report.adopted), deleted=len(report.deleted))
        return report


def changed(pool: Pool, request: PoolChange) -> Pool:
    """The pool with what the request says."""
    words = {"warn_at": request.warn_at, "notes": request.notes, "portals": request.portals or None}
    access = {"chap_user": request.chap_user, "initiator": request.initiator}
    if pool.in_files and (request.portals or any(access.values())):
        raise InvalidInput(f"pool {pool.name}", "is a directory: it has no portals and no CHAP", "leave them out")
    if pool.kind is not PoolKind.ISCSI and any(access.values()):
        raise InvalidInput(f"pool {pool.name}", "CHAP and initiator names are for iSCSI", "leave them out")
    if request.tls is not None and pool.kind is not PoolKind.NBD:
        raise InvalidInput(f"pool {pool.name}", "TLS is for NBD", "leave it out")
    tls = {"tls": True} if request.tls is not None else {}
    return pool.but(**{k: v for k, v in {**words, **access, **tls}.items() if v is not None})


def secrets_of(request: PoolCreate | PoolChange, before: PoolSecrets) -> PoolSecrets:
    """The secrets with those of the request in place of the old ones."""
    changes: dict[str, object] = {}
    if request.chap_secret is not None:
        changes["chap_secret"] = request.chap_secret
    if request.tls is not None:
        changes |= dict(request.tls)
    return before.but(**changes)
