"""The serial console through the API's websocket, and its bridge to a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_host import PATIENCE, RunningHost, running_host

from hostler.client.client import Client
from hostler.client.console import SerialConsole, bridge
from hostler.client.target import Target
from hostler.model.errors import (
    InUse,
    NotAuthenticated,
    NotFound,
    PeerUnreachable,
    WrongState,
)
from hostler.model.principal import Role
from hostler.model.requests import (
    TokenCreate,
    VmCreate,
)

pytestmark = pytest.mark.component


@pytest.fixture
def host() -> Iterator[RunningHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def client(host: RunningHost) -> Iterator[Client]:
    with Client(host.target) as connected:
        yield connected


class Guest:
    """What QEMU is to the host: a unix socket that echoes in upper case; b"bye" ends it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):
                while (data := connection.recv(4096)) and data != b"bye":
                    connection.sendall(data.upper())

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE)


@pytest.fixture
def guest(host: RunningHost, client: Client) -> Iterator[Guest]:
    client.vms.create(VmCreate(name="web1"))
    found = Guest(host.app.vms.serial_socket("web1"))
    yield found
    found.close()


def test_console(host: RunningHost, guest: Guest) -> None:
    with SerialConsole(host.target, "web1") as console:
        console.send(b"hello")
        assert console.receive(PATIENCE) == b"HELLO"
        with SerialConsole(host.target, "web1") as second, pytest.raises(InUse, match="another client"):
            second.receive(PATIENCE)
        console.send(b"bye")
        assert console.receive(PATIENCE) == b""


def test_console_over_https(host: RunningHost, guest: Guest) -> None:
    token = host.do(host.tokens.create(TokenCreate(name="t", role=Role.OPERATOR))).secret
    with SerialConsole(Target(url=host.url, token=token, fingerprint=host.identity.fingerprint), "web1") as console:
        console.send(b"hello")
        assert console.receive(PATIENCE) == b"HELLO"
    with pytest.raises(NotAuthenticated):
        SerialConsole(Target(url=host.url, token=token, fingerprint="00" * 32), "web1")


def test_console_of_a_vm_that_is_not_there(host: RunningHost, client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        SerialConsole(host.target, "nope")
    client.vms.create(VmCreate(name="web1"))
    with pytest.raises(WrongState):
        SerialConsole(host.target, "web1")
    with pytest.raises(PeerUnreachable):
        SerialConsole(Target(socket=str(tmp_path / "none")), "web1")


@pytest.fixture
def pipes() -> Iterator[Any]:
    ends = [*os.pipe(), *os.pipe()]
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.parametrize(
    ("typed", "text"), [(b"abc\x1dxyz", "left the console, the vm runs on"), (b"bye", "the vm has ended")]
)
def test_bridge(host: RunningHost, guest: Guest, pipes: list[int], typed: bytes, text: str) -> None:
    read_in, write_in, read_out, write_out = pipes
    os.write(write_in, b"hello")
    with SerialConsole(host.target, "web1") as console:
        ended: list[str] = []
        thread = threading.Thread(target=lambda: ended.append(bridge(console, read_in, write_out)))
        thread.start()
        assert select.select([read_out], [], [], PATIENCE)[0], "the console wrote nothing"
        assert os.read(read_out, 5) == b"HELLO"
        os.write(write_in, typed)
        thread.join(PATIENCE)
    assert ended == [text]


def test_bridge_ends_with_its_input(host: RunningHost, guest: Guest, pipes: list[int]) -> None:
    read_in, write_in, _, write_out = pipes
    os.close(write_in)
    with SerialConsole(host.target, "web1") as console:
        assert bridge(console, read_in, write_out) == "the input has ended"
