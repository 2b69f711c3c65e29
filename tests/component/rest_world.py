"""A real API server for tests: unix socket and HTTPS, real TLS, with a small stand-in for the application behind it,
so that what is tested is the edge and nothing else."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostler.api.rest.app import create_app
from hostler.api.rest.listeners import Listeners
from hostler.api.rest.server import RestServer
from hostler.host.events import EventHub
from hostler.identity.audit import AuditTrail
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.gate import Identity
from hostler.identity.tls import Trust
from hostler.identity.tokens import TokenService
from hostler.model.base import utc_now
from hostler.model.errors import NotFound
from hostler.model.host import Peer
from hostler.model.job import Job, JobState
from hostler.model.limits import PROFILES, Limits, Profile
from hostler.model.migration import IncomingPhase, IncomingStatus
from hostler.model.requests import DiskAdd, ShutdownRequest, VmCreate
from hostler.model.vm import VmConfig, VmRecord
from hostler.store.sqlite import SqliteStore

PATIENCE = 30.0
"""Seconds for anything that must happen; a loaded machine is slow."""


@dataclass
class StandIn:
    """The application's functions as far as these tests call them. `calls` is what came through."""

    directory: Path
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    jobs_by_id: dict[str, Job] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    events: EventHub = field(default_factory=EventHub)
    limits: Limits = PROFILES[Profile.HOSTLER]

    @property
    def vms(self) -> StandIn:
        return self

    @property
    def jobs(self) -> StandIn:
        return self

    @property
    def incoming(self) -> StandIn:
        return self

    def list(self) -> list[VmRecord]:
        return [record("web1"), record("web2")]

    def get(self, ref: str) -> VmRecord | Job:
        if ref in self.jobs_by_id:
            return self.jobs_by_id[ref]
        if ref == "broken":
            raise RuntimeError("secret insides")
        if ref != "web1":
            raise NotFound(f"vm {ref}", "there is no such VM on this host", "did you mean 'web1'?", near="web1")
        return record("web1")

    async def create(self, request: VmCreate, by: str, dry_run: bool) -> VmRecord:
        self.calls.append(("create", request, by, dry_run))
        return record(request.name)

    async def act(self, ref: str, action: str, by: str) -> Job:
        self.calls.append(("act", ref, action, by))
        return self._job(f"vm.{action}")

    async def shutdown(self, ref: str, request: ShutdownRequest, by: str) -> Job:
        self.calls.append(("shutdown", ref, request, by))
        return self._job("vm.shutdown")

    async def attach_disk(self, ref: str, request: DiskAdd, by: str, dry_run: bool) -> Job | VmRecord:
        self.calls.append(("attach", ref, request, by, dry_run))
        return record(ref) if dry_run else self._job("vm.attach-disk")

    async def wait(self, job_id: str, timeout: float) -> Job:
        self.calls.append(("wait", job_id, timeout))
        try:
            async with asyncio.timeout(timeout):
                await self.over.wait()
        except TimeoutError:
            return self.jobs_by_id[job_id]
        finally:
            self.calls.append(("waited", job_id))
        return self.jobs_by_id[job_id].but(state=JobState.DONE)

    async def screenshot(self, ref: str) -> bytes:
        return b"\x89PNG " + ref.encode()

    def serial_socket(self, ref: str) -> str:
        return str(self.directory / f"{ref}.serial")

    def vnc_socket(self, ref: str) -> str:
        return str(self.directory / f"{ref}.vnc")

    async def accept(self, migration_id: str, peer_id: str) -> IncomingStatus:
        self.calls.append(("accept", migration_id, peer_id))
        return IncomingStatus(phase=IncomingPhase.ACCEPTED)

    def _job(self, kind: str) -> Job:
        job = Job(id=f"j{next(_NUMBERS)}", kind=kind, target="web1", created=utc_now(), state=JobState.RUNNING)
        self.jobs_by_id[job.id] = job
        return job


_NUMBERS = itertools.count(1)


def record(name: str) -> VmRecord:
    return VmRecord(config=VmConfig(id=f"id-{name}", name=name, machine="pc-q35-7.2", cpu_model="qemu64-v1"))


@dataclass
class World:
    app: StandIn
    server: RestServer
    store: SqliteStore
    identity: Identity
    host: HostIdentity
    directory: Path
    unix: Path
    port: int

    @property
    def tokens(self) -> TokenService:
        return self.identity.tokens

    def audit(self) -> list[dict[str, Any]]:
        path = self.directory / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def pinned(self) -> ssl.SSLContext:
        """A client that knows the server's certificate and has none of its own."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=self.host.certificate)
        return context

    async def connect(self, context: ssl.SSLContext | None = None) -> Connection:
        """Over TLS with that context, or over the unix socket."""
        async with asyncio.timeout(PATIENCE):
            if context is None:
                return Connection(*await asyncio.open_unix_connection(self.unix))
            return Connection(*await asyncio.open_connection("127.0.0.1", self.port, ssl=context))

    async def ask(
        self, method: str, path: str, body: Any = None, context: ssl.SSLContext | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and parsed answer of one request on a connection of its own."""
        connection = await self.connect(context)
        try:
            data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            return await connection.ask(method, path, data, **headers)
        finally:
            await connection.close()


class Connection:
    """HTTP/1.1 by hand, so that a test can also do what no client library does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        await self.send(method, path, body, **headers)
        return await self.answer()

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: hostler", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"] if body else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()

    async def answer(self) -> tuple[int, Any]:
        async with asyncio.timeout(PATIENCE):
            status, headers = await self.head()
            content = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return status, json.loads(content) if "json" in headers.get("content-type", "") else content

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value for name, value in pairs}

    async def close(self) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(PATIENCE):
                await self.writer.wait_closed()
        except (OSError, ssl.SSLError):
            pass


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    """A server on a short path (a unix socket's has at most 107 bytes) that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as made:
        directory = Path(made)
        directory.chmod(0o755)
        store = await SqliteStore.open(directory / "state" / "hostler.db")
        host = load_or_create(directory / "identity", "test")
        identity = Identity(Trust(host), TokenService(store), AuditTrail(directory / "audit.jsonl"))
        app = StandIn(directory)
        listeners = Listeners(directory / "api.sock", "127.0.0.1:0")
        server = RestServer(create_app(app, identity), listeners, identity.trust.server_context())  # type: ignore[arg-type]
        await server.start()
        port = int((listeners.https_address or "").rsplit(":", 1)[1])
        try:
            yield World(app, server, store, identity, host, directory, directory / "api.sock", port)
        finally:
            await server.stop()
            identity.audit.close()
            await store.close()


def peer_of(identity: HostIdentity, name: str) -> Peer:
    return Peer(
        id=identity.host_id,
        name=name,
        address="127.0.0.1:1",
        fingerprint=identity.fingerprint,
        certificate=identity.certificate,
    )
