"""Pools of LUNs. They are made on the storage system; here they are found, told apart by what they call themselves, and
opened by QEMU's own initiator (no kernel driver, nothing appears in /dev)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import HostlerError, InvalidInput, NotFound, NotPermitted, TimedOut
from hostler.model.pool import (
    Connection,
    Discover,
    Features,
    Found,
    Health,
    Leftover,
    Pool,
    PoolKind,
    PoolSecrets,
    PoolState,
    StorageTarget,
    Usage,
)
from hostler.model.volume import Volume
from hostler.storage.pools import scsi
from hostler.storage.pools.contract import DEADLINE, SCAN_DEADLINE, Contents
from hostler.storage.pools.iscsi_wire import Login, Refused, Session, session
from hostler.storage.waiting import within

DEFAULT_INITIATOR = "iqn.2008-11.org.linux-kvm:hostler"
"""For discovery, which asks for no particular name; pools have their host's own."""


class IscsiPool:
    """The LUNs of one target."""

    def __init__(self, pool: Pool, secrets: PoolSecrets) -> None:
        self._pool = pool
        self._login = Login(pool.initiator or DEFAULT_INITIATOR, pool.target, pool.chap_user, secrets.chap_secret)

    @property
    def pool(self) -> Pool:
        """Its record."""
        return self._pool

    async def check(self) -> Health:
        """Log in and look at every LUN."""
        begun = time.monotonic()
        try:
            async with within(self._subject, DEADLINE), self._session() as (opened, _):
                latency = time.monotonic() - begun
                found = await self._luns(opened)
        except HostlerError as error:
            return Health(state=PoolState.UNREACHABLE, text=error.cause)
        usage = Usage(capacity=sum(f.size for f in found))
        return Health(state=PoolState.READY, latency=latency, usage=usage)

    async def usage(self) -> Usage:
        """What its LUNs hold. What the storage system could give beyond that it does not tell."""
        found = (await self.scan(frozenset())).found
        return Usage(capacity=sum(f.size for f in found))

    async def features(self) -> Features | None:
        """No file system."""
        return None

    async def scan(self, known: frozenset[str]) -> Contents:
        """Every LUN that is a disk."""
        async with within(self._subject, SCAN_DEADLINE), self._session() as (opened, _):
            found = await self._luns(opened)
        return Contents([f for f in found if f.path not in known])

    def place(self, name: str, format: ImageFormat) -> str:
        """LUNs are made on the storage system."""
        raise InvalidInput(
            f"pool {self._pool.name}", f"makes no {format} volume {name}: its volumes are LUNs", "make a LUN there"
        )

    async def find(self, path: str) -> Found:
        """The LUN whose number stands in `path`, by whichever portal answers."""
        number = lun_of(path, self._pool)
        async with within(self._subject, DEADLINE), self._session() as (opened, _):
            lun = await scsi.describe(opened, number, self._pool.target)
        if lun is None:
            raise NotFound(f"LUN {number} of {self._pool.target}", "is not there", "look at the storage system")
        return self._found(lun)

    async def present(self, volumes: Sequence[Volume]) -> dict[str, Found]:
        """By number; whether it is still the same one is for the caller to compare."""
        numbers = {f.path.rpartition("/")[2]: f for f in (await self.scan(frozenset())).found}
        pairs = ((v.path, numbers.get(v.path.rpartition("/")[2])) for v in volumes)
        return {path: found for path, found in pairs if found is not None}

    async def allocated(self, volumes: Sequence[Volume]) -> int:
        """A LUN counts whole: how full a thin one is only its storage system knows."""
        return sum(v.size for v in volumes)

    async def remove_leftover(self, leftover: Leftover) -> None:
        """There are none."""
        raise InvalidInput(f"pool {self._pool.name}", f"{leftover.path} is no file", "nothing is to be done")

    async def connection(self) -> Connection | None:
        """By the first portal that lets us in now."""
        async with within(self._subject, DEADLINE), self._session() as (_, portal):
            return Connection(
                pool=self._pool.name,
                kind=PoolKind.ISCSI,
                portal=portal,
                initiator=self._login.initiator,
                user=self._login.user,
            )

    # inside

    @property
    def _subject(self) -> str:
        return f"pool {self._pool.name}"

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[tuple[Session, str]]:
        """With the first portal that answers. A refusal of the log-in is final: the others would say the same."""
        failures: list[HostlerError] = []
        share = DEADLINE / len(self._pool.portals) * 0.9
        async with AsyncExitStack() as stack:
            for portal in self._pool.portals:
                try:
                    async with asyncio.timeout(share):
                        opened = await stack.enter_async_context(session(portal, self._login))
                except NotPermitted:
                    raise
                except TimeoutError:
                    failures.append(TimedOut(f"iSCSI portal {portal}", f"{portal} does not answer"))
                except HostlerError as error:
                    failures.append(error)
                else:
                    yield opened, portal
                    return
            first = failures[0]
            cause = "; ".join(f"{f.object}: {f.cause}" for f in failures)
            raise type(first)(self._subject, cause, first.advice or "look at the network and the storage system")

    async def _luns(self, opened: Session) -> list[Found]:
        try:
            numbers = await scsi.luns(opened)
        except Refused as error:
            raise NotFound(self._subject, f"does not list its LUNs ({error})", "look at the storage system") from error
        described = [await scsi.describe(opened, number, self._pool.target) for number in numbers]
        return [self._found(lun) for lun in described if lun is not None]

    def _found(self, lun: scsi.Lun) -> Found:
        return Found(
            name=f"{self._pool.name}-lun{lun.number}",
            path=f"iscsi://{self._pool.portals[0]}/{self._pool.target}/{lun.number}",
            kind=SourceKind.ISCSI,
            size=lun.size,
            allocated=lun.size,
            identity=lun.name,
        )


def lun_of(path: str, pool: Pool) -> int:
    """The number in iscsi://PORTAL/TARGET/NUMBER. NotFound for a path of another target."""
    place, _, number = path.rpartition("/")
    if not place.endswith(f"/{pool.target}") or not number.isascii() or not number.isdigit() or int(number) > 0x3FFF:
        raise NotFound(f"path {path}", f"is no LUN of {pool.target}", "list them with 'hostler pool scan'")
    return int(number)


async def discover(request: Discover) -> Sequence[StorageTarget]:
    """The targets that the first portal which answers tells of."""
    initiator = request.initiator or DEFAULT_INITIATOR
    login = Login(initiator, None, request.chap_user or "", request.chap_secret or "")
    failures: list[HostlerError] = []
    for portal in request.portals:
        try:
            async with within(f"iSCSI portal {portal}", DEADLINE), session(portal, login) as opened:
                found = await opened.targets()
        except HostlerError as error:
            failures.append(error)
        else:
            return [StorageTarget(target=name, portals=tuple(portals)) for name, portals in sorted(found.items())]
    raise failures[0]
