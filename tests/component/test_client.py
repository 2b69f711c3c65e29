"""The client against a real API server: answers, errors, deadlines, TLS, events."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_host import PATIENCE, RunningHost, running_host

from hostler.client import calls
from hostler.client.async_client import AsyncClient
from hostler.client.client import Client
from hostler.client.target import Target
from hostler.model.errors import (
    Busy,
    Cancelled,
    HostlerError,
    InternalError,
    NotAuthenticated,
    NotFound,
    NotPermitted,
    PeerUnreachable,
    TimedOut,
)
from hostler.model.principal import Role
from hostler.model.requests import (
    DiskAdd,
    InspectRequest,
    JoinRequest,
    MigrateRequest,
    NicAdd,
    ShutdownRequest,
    TokenCreate,
    VmChange,
    VmCreate,
    VolumeCreate,
    VolumeRegister,
)
from hostler.model.units import GiB
from hostler.model.vm import VmState

pytestmark = pytest.mark.component


@pytest.fixture
def host() -> Iterator[RunningHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def client(host: RunningHost) -> Iterator[Client]:
    with Client(host.target) as connected:
        yield connected


def test_every_group(client: Client, host: RunningHost) -> None:
    client.vms.create(VmCreate(name="web1"))
    assert client.vms.start("web1", wait=PATIENCE).is_over
    assert client.vms.get("web1").state is VmState.RUNNING
    assert client.vms.change("web1", VmChange(notes="hello")).config.notes == "hello"
    assert client.vms.check_disk("web1", DiskAdd(volume="/srv/a")).config.disks[0].source.path == "/srv/a"
    assert client.vms.attach_disk("web1", DiskAdd(volume="/srv/a"), wait=PATIENCE).is_over
    assert [disk.id for disk in client.vms.get("web1").config.disks] == ["disk0"]
    assert client.vms.detach_disk("web1", "disk0", timeout=3, wait=PATIENCE).params == {"timeout": 3.0}
    assert client.vms.add_nic("web1", NicAdd()).config.nics[0].id == "nic0"
    assert client.vms.remove_nic("web1", "nic0").config.nics == ()
    assert client.vms.screenshot("web1").startswith(b"\x89PNG")
    assert client.vms.check_migration("web1", MigrateRequest(host="beta")).possible
    assert client.vms.migrate("web1", MigrateRequest(host="beta"), wait=PATIENCE).kind == "vm.migrate"
    assert client.vms.shutdown("web1", ShutdownRequest(timeout=9), wait=PATIENCE).params["timeout"] == 9
    assert [vm.config.name for vm in client.vms.list()] == ["web1"]
    assert client.volumes.create(VolumeCreate(name="data", size=GiB), wait=PATIENCE).is_over
    assert client.volumes.register(VolumeRegister(name="old", path="/srv/old")).path == "/srv/old"
    assert client.volumes.inspect(InspectRequest(path="/x")).size == GiB
    assert client.volumes.get("data").size == GiB
    assert client.volumes.delete("old", keep_file=True).kept == ("/srv/old",)
    assert [volume.name for volume in client.volumes.list()] == ["data"]
    assert client.hosts.this().name == "alpha"
    assert [view.name for view in client.hosts.list()] == ["alpha", "beta"]
    assert client.hosts.invite().token == "hstj_secret"
    assert client.hosts.join(JoinRequest(invitation="abc")).name == "beta"
    client.hosts.remove("beta")
    assert (host.app.hosts.joined, host.app.hosts.removed) == (["abc"], ["beta"])
    assert client.hosts.limits().vm_vcpus == 255
    token = client.tokens.create(TokenCreate(name="t", role=Role.VIEWER))
    assert [view.id for view in client.tokens.list()] == [token.id]
    client.tokens.revoke("t")
    assert client.tokens.list() == []
    assert client.version().version
    job = client.jobs.list(target="web1")[0]
    assert client.jobs.get(job.id) == job
    assert client.vms.delete("web1").kept == ()


def test_an_error_is_the_one_the_host_raised(client: Client) -> None:
    client.vms.create(VmCreate(name="web1"))
    with pytest.raises(NotFound) as missing:
        client.vms.get("wob1")
    assert (missing.value.object, missing.value.advice) == ("vm wob1", "did you mean 'web1'?")


def test_names_of_all_kinds_reach_the_host(client: Client) -> None:
    for name in ("näme", "with blank", "a?b#c%d&e=f", "+"):
        client.vms.create(VmCreate(name=name))
        assert client.vms.get(name).config.name == name


def test_finish_waits_and_raises_what_went_wrong(client: Client, host: RunningHost) -> None:
    client.vms.create(VmCreate(name="web1"))
    host.app.jobs.held = True
    job = client.vms.start("web1")
    assert not job.is_over
    with pytest.raises(TimedOut) as late:
        client.jobs.finish(job, timeout=0.1)
    assert late.value.details["job"] == job.id
    host.app.jobs.failure = Busy("vm web1", "is busy", "wait")
    threading.Timer(0.1, lambda: host.do(host.app.jobs.end(job.id))).start()
    seen: list[str] = []
    with pytest.raises(Busy):
        client.jobs.finish(job, timeout=PATIENCE, on_change=lambda now: seen.append(str(now.state)))
    assert seen[-1] == "failed"
    cancelled = client.vms.start("web1")
    client.jobs.cancel(cancelled.id)
    with pytest.raises(Cancelled):
        client.jobs.finish(cancelled, timeout=PATIENCE)


def test_events_follow_changes(client: Client, host: RunningHost) -> None:
    events = client.events(kind="vm")
    publisher = threading.Thread(target=_publish_until, args=(host, stop := threading.Event()))
    publisher.start()
    try:
        event = next(events)
    finally:
        stop.set()
        publisher.join()
        events.close()  # type: ignore[attr-defined]
    assert (event.kind, event.key) == ("vm", "id-web1")


def _publish_until(host: RunningHost, stop: threading.Event) -> None:
    """The client's generator subscribes at its first `next`, so one event alone could come too early."""
    while not stop.wait(0.05):
        host.loop.call_soon_threadsafe(host.app.events.publish, "job", "j", None)
        host.loop.call_soon_threadsafe(host.app.events.publish, "vm", "id-web1", None)


async def test_the_asyncio_client_sends_the_same_calls(host: RunningHost) -> None:
    async with AsyncClient(host.target) as client:
        await client.send(calls.vm_create(VmCreate(name="web1")))
        host.app.jobs.held = True
        job = await client.send(calls.vm_act("web1", "start"))
        finishing = asyncio.create_task(client.finish(job, PATIENCE))
        await asyncio.to_thread(host.do, host.app.jobs.end(job.id))
        assert (await finishing).state == "done"
        with pytest.raises(NotFound):
            await client.send(calls.vm("nope"))
        host.app.jobs.held = True
        with pytest.raises(TimedOut):
            await client.finish(await client.send(calls.vm_act("web1", "start")), 0.1)
        stop = threading.Event()
        publisher = asyncio.create_task(asyncio.to_thread(_publish_until, host, stop))
        async with contextlib.aclosing(client.events("vm")) as events:  # type: ignore[type-var]
            assert (await anext(events)).key == "id-web1"
        stop.set()
        await publisher


# who cannot be reached


class Silent:
    """Listens, takes what comes, and never answers; or hangs up at once."""

    def __init__(self, path: Path, *, hang_up: bool = False) -> None:
        self.received = threading.Event()
        self._hang_up = hang_up
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(ConnectionError):
                if connection.recv(65536):
                    self.received.set()
            if self._hang_up:
                connection.close()
            else:
                self._open.append(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE)
        for connection in self._open:
            connection.close()


@pytest.fixture
def short(host: RunningHost) -> Path:
    return host.socket.parent / "other.sock"


def test_nobody_listens(tmp_path: Path) -> None:
    with Client(Target(socket=str(tmp_path / "none"))) as client, pytest.raises(PeerUnreachable) as error:
        client.vms.list()
    assert error.value.details == {"sent": False}
    assert "hostlerd" in error.value.advice


def test_a_dead_socket(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short))
    with Client(Target(socket=str(short))) as client, pytest.raises(PeerUnreachable) as error:
        client.vms.list()
    assert (error.value.cause, error.value.details) == ("no connection: connection refused", {"sent": False})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every socket")
def test_a_forbidden_socket(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(short))
        short.chmod(0)
        with Client(Target(socket=str(short))) as client, pytest.raises(NotPermitted):
            client.vms.list()


def test_no_answer_is_unknown(short: Path) -> None:
    silent = Silent(short)
    try:
        with Client(Target(socket=str(short)), deadline=0.2) as client, pytest.raises(TimedOut) as error:
            client.vms.start("web1")
    finally:
        silent.close()
    assert error.value.details == {"sent": True}
    assert silent.received.is_set()


def test_a_broken_connection_is_unknown(short: Path) -> None:
    silent = Silent(short, hang_up=True)
    try:
        with Client(Target(socket=str(short))) as client, pytest.raises(PeerUnreachable) as error:
            client.vms.start("web1")
    finally:
        silent.close()
    assert error.value.details == {"sent": True}


async def test_the_same_from_asyncio(short: Path) -> None:
    async with AsyncClient(Target(socket=str(short))) as client:
        with pytest.raises(PeerUnreachable) as error:
            await client.send(calls.vms())
    assert error.value.details == {"sent": False}
    silent = Silent(short)
    try:
        async with AsyncClient(Target(socket=str(short)), deadline=0.2) as client:
            with pytest.raises(TimedOut) as late:
                await client.send(calls.vm_act("web1", "start"))
    finally:
        silent.close()
    assert late.value.details == {"sent": True}


def test_an_answer_that_is_not_ours(short: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short))
    listener.listen()

    def answer() -> None:
        for status, body in ((b"502 Bad Gateway", b"<html>oops"), (b"200 OK", b"[{]"), (b"409 X", b'{"code":"new"}')):
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(65536):
                        head = b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
                        connection.sendall(head + body)
                        break

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Client(Target(socket=str(short))) as client:
            for part in ("answered 502", "not what this client expects", "answered 409"):
                with pytest.raises(InternalError, match=part):
                    client.vms.list()
    finally:
        thread.join(PATIENCE)
        listener.close()


def test_a_kept_connection_that_the_host_closed_is_not_used(short: Path) -> None:
    """As after a restart of the daemon: a request that changes something must not be lost on a dead connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short))
    listener.listen()
    closed = [threading.Event(), threading.Event()]
    body = b'{"version":"1"}'

    def answer() -> None:
        for event in closed:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(65536):
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                        break
            event.set()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Client(Target(socket=str(short))) as client:
            for event in closed:
                assert client.raw(calls.vm_act("web1", "start")) == body
                assert event.wait(PATIENCE)
    finally:
        thread.join(PATIENCE)
        listener.close()


# https


def test_https_with_a_pinned_certificate_and_a_token(host: RunningHost) -> None:
    token = host.do(host.tokens.create(TokenCreate(name="t", role=Role.VIEWER))).secret
    pinned = Target(url=host.url, token=token, fingerprint=host.identity.fingerprint)
    with Client(pinned) as client:
        assert client.hosts.this().name == "alpha"
        with pytest.raises(NotPermitted):
            client.vms.create(VmCreate(name="web1"))
    unknown = Target(url=host.url, token="hstl_no", fingerprint=host.identity.fingerprint)
    with Client(unknown) as client, pytest.raises(NotAuthenticated):
        client.vms.list()


def test_another_certificate_never_sees_the_token(host: RunningHost) -> None:
    for target in (Target(url=host.url, token="t", fingerprint="00" * 32), Target(url=host.url, token="t")):
        with Client(target) as client, pytest.raises(NotAuthenticated) as error:
            client.vms.list()
        assert error.value.details == {"sent": False}


async def test_asyncio_pins_too(host: RunningHost) -> None:
    async with AsyncClient(Target(url=host.url, token="t", fingerprint="00" * 32)) as client:
        with pytest.raises(NotAuthenticated, match="pinned is 0000") as error:
            await client.send(calls.vms())
    assert error.value.details == {"sent": False}


def test_a_ca_file(host: RunningHost, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(host.identity.certificate)
    token = host.do(host.tokens.create(TokenCreate(name="t", role=Role.VIEWER))).secret
    port = host.url.rsplit(":", 1)[1]
    with Client(Target(url=f"https://localhost:{port}", token=token, ca_file=str(authority))) as client:
        assert client.hosts.this().name == "alpha"
    with pytest.raises(HostlerError, match="CA file"):
        Client(Target(url=host.url, ca_file=str(tmp_path / "none.pem")))
