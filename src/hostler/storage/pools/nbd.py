"""Pools of exports of another machine's NBD server, over TLS. The server decides what is exported; here it is found."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import HostlerError, InvalidInput, NotFound
from hostler.model.pool import (
    Connection,
    Features,
    Found,
    Health,
    Leftover,
    Pool,
    PoolKind,
    PoolSecrets,
    PoolState,
    Refused,
    Usage,
)
from hostler.model.volume import Volume
from hostler.storage.pools.contract import DEADLINE, SCAN_DEADLINE, Contents
from hostler.storage.pools.iscsi_wire import portal_parts
from hostler.storage.pools.nbd_wire import Export, Server, connected, tls_context
from hostler.storage.waiting import within


class NbdPool:
    """The exports of one server."""

    def __init__(self, pool: Pool, secrets: PoolSecrets) -> None:
        self._pool = pool
        self._host, self._port = portal_parts(pool.portals[0])
        self._context = _context(pool, secrets) if pool.tls else None

    @property
    def pool(self) -> Pool:
        """Its record."""
        return self._pool

    async def check(self) -> Health:
        """Connect, prove each other's certificates, look at every export."""
        begun = time.monotonic()
        try:
            async with self._server(DEADLINE) as server:
                latency = time.monotonic() - begun
                exports, _ = await self._exports(server)
        except HostlerError as error:
            return Health(state=PoolState.UNREACHABLE, text=error.cause)
        return Health(state=PoolState.READY, latency=latency, usage=Usage(capacity=sum(e.size for e in exports)))

    async def usage(self) -> Usage:
        """What its exports hold."""
        return Usage(capacity=sum(f.size for f in (await self.scan(frozenset())).found))

    async def features(self) -> Features | None:
        """No file system that we see."""
        return None

    async def scan(self, known: frozenset[str]) -> Contents:
        """Every export."""
        async with self._server(SCAN_DEADLINE) as server:
            exports, refused = await self._exports(server)
        found = (self._found(export) for export in exports)
        return Contents([f for f in found if f.path not in known], refused)

    def place(self, name: str, format: ImageFormat) -> str:
        """Exports are made on the server."""
        raise InvalidInput(
            f"pool {self._pool.name}", f"makes no {format} volume {name}: its volumes are exports", "make one there"
        )

    async def find(self, path: str) -> Found:
        """The export whose name stands in `path`."""
        name = export_of(path, self._pool)
        async with self._server(DEADLINE) as server:
            export = await server.export(name)
        if export is None:
            raise NotFound(f"export {name}", f"is not there on {self._pool.portals[0]}", "look at the server")
        return self._found(export)

    async def present(self, volumes: Sequence[Volume]) -> dict[str, Found]:
        """By name."""
        there = {f.path: f for f in (await self.scan(frozenset())).found}
        return {v.path: there[v.path] for v in volumes if v.path in there}

    async def allocated(self, volumes: Sequence[Volume]) -> int:
        """An export counts whole."""
        return sum(v.size for v in volumes)

    async def remove_leftover(self, leftover: Leftover) -> None:
        """There are none."""
        raise InvalidInput(f"pool {self._pool.name}", f"{leftover.path} is no file", "nothing is to be done")

    async def connection(self) -> Connection | None:
        """To the server, which need not answer now: QEMU says it as clearly."""
        return Connection(
            pool=self._pool.name,
            kind=PoolKind.NBD,
            portal=self._pool.portals[0],
            tls_hostname=self._pool.tls_hostname,
        )

    # inside

    @asynccontextmanager
    async def _server(self, deadline: float) -> AsyncIterator[Server]:
        hostname = self._pool.tls_hostname or self._host
        async with (
            within(f"pool {self._pool.name}", deadline),
            connected(self._host, self._port, self._context, hostname) as server,
        ):
            yield server

    async def _exports(self, server: Server) -> tuple[list[Export], list[Refused]]:
        names = self._pool.exports or await server.names()
        exports: list[Export] = []
        refused: list[Refused] = []
        for name in names:
            if not name or not name.isascii() or not name.isprintable() or " " in name:
                refused.append(Refused(path=self._path(name), why="its name cannot stand in an address"))
            elif (export := await server.export(name)) is not None:
                exports.append(export)
        return exports, refused

    def _path(self, name: str) -> str:
        return f"nbd://{self._pool.portals[0]}/{name}"

    def _found(self, export: Export) -> Found:
        return Found(
            name=export.name,
            path=self._path(export.name),
            kind=SourceKind.NBD,
            size=export.size,
            allocated=export.size,
        )


def export_of(path: str, pool: Pool) -> str:
    """The name in nbd://HOST:PORT/NAME. NotFound for a path of another server."""
    prefix = f"nbd://{pool.portals[0]}/"
    if not path.startswith(prefix) or path == prefix:
        raise NotFound(f"path {path}", f"is no export of {pool.portals[0]}", "list them with 'hostler pool scan'")
    return path.removeprefix(prefix)


def _context(pool: Pool, secrets: PoolSecrets) -> ssl.SSLContext:
    try:
        return tls_context(secrets)
    except (ssl.SSLError, ValueError) as error:
        why = str(getattr(error, "reason", None) or error).replace("_", " ").lower()
        raise InvalidInput(
            f"pool {pool.name}", f"its certificates cannot be used: {why}", "give PEM files and a key without password"
        ) from error
