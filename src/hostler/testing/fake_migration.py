"""Migration of the fake QEMU: the states, events and counters of the real one, over real sockets and files.

    source: setup --> active --> (STOP) --> completed | failed | cancelled (RESUME)
    target: setup (listening) --> active --> completed | (ends itself)

On the wire: a line with a digest of the key, the other side's "go", as many zero bytes as a real empty guest's memory
takes, a line with the run state, and the other side's "loaded".
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from hostler.model.machine import RunStatus
from hostler.testing.fake_blocks import Arguments, QmpError

if TYPE_CHECKING:
    from hostler.testing.fake_machine import FakeMachine

StartTask = Callable[[Coroutine[Any, Any, None]], None]

RAM = 84_484_096
"""What the real one reports as `total` for 64 MiB and its video memory."""
STREAM = 845_064
"""Bytes an empty guest of 64 MiB takes on the wire."""

_TICK = 0.02
_CAPABILITIES = (
    "events",
    "return-path",
    "late-block-activate",
    "multifd",
    "pause-before-switchover",
    "dirty-bitmaps",
)
_BUSY = ("setup", "active", "cancelling")


class _Failed(Exception):
    """A migration broke off; the text is QEMU's `error-desc`."""


class FakeMigration:
    """The migrations of one fake QEMU."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self._capabilities = dict.fromkeys(_CAPABILITIES, False)
        self._parameters: dict[str, JsonValue] = {"max-bandwidth": 128 * 1024**2, "tls-creds": ""}
        self._status: str | None = None
        self._transferred = 0
        self._error = ""
        self._port: int | None = None
        self.autostart = False
        """Whether the guest runs as soon as its state has arrived (`cont` before that)."""

    # commands

    def set_capabilities(self, arguments: Arguments) -> JsonValue:
        self._refuse_while_busy()
        for item in cast(list[Arguments], arguments["capabilities"]):
            name = str(item["capability"])
            if name not in self._capabilities:
                raise QmpError(f"Parameter 'capability' does not accept value '{name}'")
            self._capabilities[name] = bool(item["state"])
        return {}

    def set_parameters(self, arguments: Arguments) -> JsonValue:
        self._parameters.update(arguments)
        return {}

    def query(self) -> JsonValue:
        info: dict[str, JsonValue] = {}
        if self._port is not None and self._status in (None, "setup"):
            info["socket-address"] = [
                {"port": str(self._port), "ipv4": True, "host": "127.0.0.1", "type": "inet"},
            ]
            return info
        if self._status is not None:
            info["status"] = self._status
        if self._status == "failed" and self._error:
            info["error-desc"] = self._error
        if self._status in ("active", "cancelling", "completed") and not self._machine.incoming:
            info |= _counters(self._transferred, self._status == "completed")
        return info

    def migrate(self, uri: str) -> JsonValue:
        self._refuse_while_busy()
        kind, _, rest = uri.partition(":")
        if kind == "fd":
            fd = self._machine.take_fd(rest)
            self._set("setup")
            send = self._save(fd) if stat.S_ISREG(os.fstat(fd).st_mode) or _is_device(fd) else self._send_over(fd)
        elif kind == "tcp":
            self._set("setup")
            send = self._connect_and_send(rest)
        else:
            raise QmpError("Parameter 'uri' expects a valid migration protocol")
        self._machine.start(self._outgoing(send))
        return {}

    def cancel(self) -> JsonValue:
        if self._status in ("setup", "active", "pre-switchover"):
            self._set("cancelling")
        return {}

    def listen(self, uri: str) -> JsonValue:
        if not self._machine.incoming:
            raise QmpError("'-incoming' was not specified on the command line")
        if self._port is not None:
            raise QmpError("The incoming migration has already been started")
        kind, _, rest = uri.partition(":")
        self._set("setup")
        if kind == "fd":
            self._machine.start(self._load(self._machine.take_fd(rest)))
            return {}
        listener = socket.create_server((rest.rpartition(":")[0].strip("[]"), 0))
        self._port = listener.getsockname()[1]
        self._machine.start(self._serve(listener))
        return {}

    # source

    async def _outgoing(self, send: Coroutine[Any, Any, None]) -> None:
        was_running = self._machine.status is RunStatus.RUNNING
        self._transferred, self._error = 0, ""
        try:
            await send
        except (_Failed, OSError, EOFError) as error:
            self._error = str(error)
            self._set("cancelled" if self._status == "cancelling" else "failed")
            if was_running:
                self._machine.set_running()

    async def _save(self, fd: int) -> None:
        with os.fdopen(fd, "wb", buffering=0) as file:
            self._set("active")
            await self._pump(lambda part: asyncio.to_thread(_write_all, file.fileno(), part))
            if self._capabilities["pause-before-switchover"]:
                await _pause(self, self._machine)
            self._finish(lambda line: _write_all(file.fileno(), line))
        self._complete()

    async def _connect_and_send(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError as error:
            raise _Failed(f"Failed to connect to '{address}': {os.strerror(error.errno or 0)}") from error
        await self._send(reader, writer)

    async def _send_over(self, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        await self._send(*await asyncio.open_connection(sock=sock))

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(self._digest().encode() + b"\n")
            if not await self._unless_cancelled(reader.readline()):
                raise _Failed("TLS handshake failed: The TLS connection was non-properly terminated.")
            self._set("active")
            await self._pump(lambda part: _write_out(writer, part))
            self._finish(writer.write)
            await writer.drain()
            if self._capabilities["return-path"] and not await self._unless_cancelled(reader.readline()):
                raise _Failed("Unable to read from socket: Connection reset by peer")
            self._complete()
        finally:
            writer.close()

    async def _pump(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send the memory at the bandwidth that is set."""
        self._machine.emit("MIGRATION_PASS", {"pass": 1})
        part = max(1, int(int(cast(int, self._parameters["max-bandwidth"])) * _TICK))
        while self._transferred < STREAM:
            size = min(part, STREAM - self._transferred)
            await write(bytes(size))
            self._transferred += size
            await asyncio.sleep(_TICK if part < STREAM else 0)
            self._raise_if_cancelled()

    def _finish(self, write: Callable[[bytes], object]) -> None:
        """Stop the guest and send the rest."""
        was_running = self._machine.status is RunStatus.RUNNING
        self._machine.stop(RunStatus.FINISH_MIGRATE)
        self._machine.emit("MIGRATION_PASS", {"pass": 2})
        write(b"\n" + json.dumps({"running": was_running}).encode() + b"\n")

    def _complete(self) -> None:
        self._machine.blocks.release()
        self._machine.status = RunStatus.POSTMIGRATE
        self._set("completed")

    async def _unless_cancelled(self, line: Coroutine[Any, Any, bytes]) -> bytes:
        task = asyncio.ensure_future(line)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_TICK)
                self._raise_if_cancelled()
            return task.result()
        finally:
            task.cancel()

    def _raise_if_cancelled(self) -> None:
        if self._status == "cancelling":
            raise _Failed("")

    # target

    async def _serve(self, listener: socket.socket) -> None:
        done = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if await self._receive(reader, writer):
                    done.set()
            finally:
                writer.close()

        # Started by the machine, so that its death ends them too.
        server = await asyncio.start_server(lambda r, w: self._machine.start(accept(r, w)), sock=listener)
        async with server:
            await done.wait()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Take one connection; False when it was none of ours."""
        try:
            if (await reader.readline()).decode("ascii", "replace").strip() != self._digest():
                return False
        except (_Failed, OSError):
            return False
        self._set("active")
        writer.write(b"go\n")
        try:
            await reader.readexactly(STREAM + 1)
            self._arrived(await reader.readuntil(b"\n"))
            writer.write(b"loaded\n")
            await writer.drain()
        except (OSError, EOFError, ValueError):
            self._broken_off()
        return True

    async def _load(self, fd: int) -> None:
        self._set("active")
        with os.fdopen(fd, "rb") as file:
            content = file.read()
        await asyncio.sleep(0)
        try:
            if len(content) < STREAM or content[:STREAM].strip(b"\0"):
                raise ValueError("not a saved state")
            self._arrived(content[STREAM:].strip())
        except ValueError:
            self._broken_off()

    def _arrived(self, line: bytes) -> None:
        json.loads(line)
        self._machine.status = RunStatus.PAUSED
        self._set("completed")
        if self.autostart:
            self._machine.cont()

    def _broken_off(self) -> None:
        """QEMU 7.2 ends itself when an incoming stream is not whole."""
        self._set("failed")
        self._machine.die()

    # both

    def _set(self, status: str) -> None:
        self._status = status
        if self._capabilities["events"]:
            self._machine.emit("MIGRATION", {"status": status})

    def _digest(self) -> str:
        """What stands for the TLS handshake."""
        name = str(self._parameters["tls-creds"])
        key = self._machine.key_of(name) if name else "plain"
        if key is None:
            raise _Failed(f"No TLS credentials with id '{name}'")
        return hashlib.sha256(key.encode()).hexdigest()

    def _refuse_while_busy(self) -> None:
        if self._status in _BUSY and not self._machine.incoming:
            raise QmpError("There's a migration process in progress")


def _counters(transferred: int, completed: bool) -> dict[str, JsonValue]:
    ram: dict[str, JsonValue] = {
        "total": RAM,
        "remaining": 0 if completed else RAM * (STREAM - transferred) // STREAM,
        "transferred": transferred,
        "dirty-sync-count": 2 if completed else 1,
        "dirty-pages-rate": 0,
        "page-size": 4096,
        "mbps": 1000.0,
    }
    times: dict[str, JsonValue] = {"total-time": 30, "setup-time": 1}
    return {"ram": ram} | times | ({"downtime": 20} if completed else {"expected-downtime": 20})


def _is_device(fd: int) -> bool:
    return stat.S_ISCHR(os.fstat(fd).st_mode)


async def _write_out(writer: asyncio.StreamWriter, part: bytes) -> None:
    writer.write(part)
    await writer.drain()


def _write_all(fd: int, data: bytes) -> None:
    """Write, or fail in QEMU's words."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise _Failed(f"Unable to write to file: {os.strerror(error.errno or errno.EIO)}") from error


async def _pause(migration: FakeMigration, machine: FakeMachine) -> None:
    """Stop the guest and wait to be told to go on."""
    machine.stop(RunStatus.FINISH_MIGRATE)
    migration._set("pre-switchover")
    while migration._status == "pre-switchover":  # noqa: ASYNC110 - several things change the status
        await asyncio.sleep(_TICK)
    migration._raise_if_cancelled()


def go_on(migration: FakeMigration, arguments: Arguments) -> JsonValue:
    """After the pause."""
    if migration._status != arguments["state"]:
        raise QmpError(f"Migration not in expected state: {arguments['state']}")
    migration._set("device")
    return {}
