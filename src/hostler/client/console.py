"""The serial port of a VM, through the API's websocket, and the bridge between it and a terminal."""

from __future__ import annotations

import os
import select
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect, unix_connect

from hostler.client import calls, wire
from hostler.client.target import Target
from hostler.model.errors import HostlerError, InUse, NotFound, NotPermitted, PeerUnreachable, WrongState

ESCAPE = 0x1D
"""Ctrl-]: as telnet and virsh do, since no guest needs it."""
_BLOCK = 4096
_CLOSE_CODES: dict[int, type[HostlerError]] = {4401: NotPermitted, 4403: NotPermitted, 4404: NotFound, 4409: InUse}
"""Close codes of the API: 4000 + the HTTP status it would have been."""
_NORMAL = frozenset({1000, 1001})


class SerialConsole:
    """A connection to a VM's serial port. One client at a time: InUse for a second one."""

    def __init__(self, target: Target, vm: str, deadline: float = wire.DEADLINE) -> None:
        """Connects. `deadline` in seconds."""
        self._vm = vm
        self._open = ExitStack()
        self._socket = _connect(self._open, target, vm, deadline)

    def receive(self, timeout: float | None = None) -> bytes:
        """What the guest wrote next; b"" when the VM went away. TimeoutError after `timeout` s."""
        try:
            data = self._socket.recv(timeout=timeout)
        except ConnectionClosed as closed:
            self._ended(closed)
            return b""
        return data.encode() if isinstance(data, str) else data

    def send(self, data: bytes) -> None:
        """Type something."""
        try:
            self._socket.send(data)
        except ConnectionClosed as closed:
            self._ended(closed)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ended(self, closed: ConnectionClosed) -> None:
        """Raises unless the connection ended because the VM did."""
        code = closed.rcvd.code if closed.rcvd else None
        if code in _NORMAL:
            return
        reason = (closed.rcvd.reason if closed.rcvd else "") or "the connection to the host broke"
        kind = _CLOSE_CODES.get(code or 0, PeerUnreachable)
        raise kind(f"console of vm {self._vm}", reason, _advice(kind)) from closed


def _advice(kind: type[HostlerError]) -> str:
    return {
        InUse: "close the other console first",
        NotFound: "see: hostler vm list",
        NotPermitted: "ask for a token with the role operator",
    }.get(kind, "connect again")


def _connect(stack: ExitStack, target: Target, vm: str, deadline: float) -> ClientConnection:
    path, extra = calls.serial_path(vm), wire.headers(target)
    extra.pop("accept")
    try:
        if target.socket is not None:
            uri = f"ws://hostler{path}"
            opening = unix_connect(
                target.socket, uri, additional_headers=extra, open_timeout=deadline, compression=None
            )
            return stack.enter_context(opening)
        assert target.url is not None
        uri = "wss" + target.url.removeprefix("https") + path
        opening = connect(
            uri,
            ssl=wire.tls_context(target),
            additional_headers=extra,
            open_timeout=deadline,
            compression=None,
            proxy=None,
        )
        return stack.enter_context(opening)
    except InvalidStatus as refused:
        raise _refusal(refused, vm) from refused
    except (OSError, TimeoutError, InvalidHandshake) as error:
        raise wire.no_connection(error, target) from error


def _refusal(refused: InvalidStatus, vm: str) -> HostlerError:
    status, body = refused.response.status_code, refused.response.body
    try:
        wire.check(status, bytes(body), f"console of vm {vm}")
    except HostlerError as error:
        if "status" not in error.details:  # the host said why, as a Problem
            return error
    kind: type[HostlerError] = {403: NotPermitted, 404: NotFound, 409: InUse}.get(status, WrongState)
    return kind(f"console of vm {vm}", f"the host refused it ({status})", "is the vm running? see: hostler vm show")


def bridge(console: SerialConsole, read_fd: int, write_fd: int, escape: int = ESCAPE) -> str:
    """Couples the console with two file descriptors until the escape character is typed, the input ends or the VM goes
    away; says which, as a sentence for people. The terminal must be in raw mode already.
    """
    wake_read, wake_write = os.pipe()
    failure: list[HostlerError] = []

    def from_guest() -> None:
        try:
            while data := console.receive():
                _write_all(write_fd, data)
        except HostlerError as error:
            failure.append(error)
        finally:
            os.write(wake_write, b"x")

    reader = threading.Thread(target=from_guest, name="console", daemon=True)
    reader.start()
    try:
        text = _from_person(console, read_fd, wake_read, escape)
    finally:
        console.close()
        reader.join(5)
        os.close(wake_read)
        if not reader.is_alive():
            os.close(wake_write)
    if failure and text == "":
        raise failure[0]
    return text or "the vm has ended"


def _from_person(console: SerialConsole, read_fd: int, wake_fd: int, escape: int) -> str:
    """Sends what is typed; "" when the guest's side ended first."""
    while True:
        ready, _, _ = select.select([read_fd, wake_fd], [], [])
        if wake_fd in ready:
            return ""
        typed = os.read(read_fd, _BLOCK)
        before, found, _ = typed.partition(bytes([escape]))
        if before:
            console.send(before)
        if found:
            return "left the console, the vm runs on"
        if not typed:
            return "the input has ended"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
