"""A QEMU without a machine: a QMP server with run states, block graph, devices and migration, and failures on request.

It keeps the same contract as QEMU 7.2 (tests/component/test_qmp_contract.py runs against both): its error texts and
classes, the order of events and replies, one client at a time, descriptors over SCM_RIGHTS. What no test of ours looks
at, it has not: an unknown command is refused as QEMU refuses it.

    fake = FakeQmp(path); await fake.start(); ...; await fake.stop()
    fake.inject("device_add", Failure.HANG)
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from pydantic import JsonValue

from hostler.testing.fake_blocks import QmpError
from hostler.testing.fake_machine import COMMANDS, FakeMachine


class Failure(StrEnum):
    """What can be made to happen to a command."""

    REFUSE = "refuse"
    """An error reply; nothing was done."""
    HANG = "hang"
    """Nothing is done and no reply ever comes."""
    DIE_BEFORE = "die-before"
    """QEMU dies without having done it."""
    DIE_AFTER = "die-after"
    """QEMU dies when it has done it, without a reply."""


@dataclass(frozen=True, slots=True)
class _Injection:
    failure: Failure
    text: str


class FakeQmp:
    """One fake QEMU, listening on a unix socket."""

    def __init__(self, path: str, *, incoming: bool = False) -> None:
        """`incoming`: as if started with `-incoming defer`."""
        self.path = path
        self.machine = FakeMachine(incoming=incoming, emit=self.emit, die=self._die, start=self._start_task)
        self._injections: dict[str, deque[_Injection]] = {}
        self._listener: socket.socket | None = None
        self._client: _Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._dead = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._start_task(self._accept(self._listener))

    async def stop(self) -> None:
        """End as QEMU does when it is killed: every connection breaks, every lock is free. Harmless when repeated."""
        self._die()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def inject(self, command: str, failure: Failure, text: str = "injected failure", times: int = 1) -> None:
        """Make the next `times` calls of a command fail. `text`: QEMU's words where it refuses."""
        self._injections.setdefault(command, deque()).extend([_Injection(failure, text)] * times)

    def pending(self, command: str) -> int:
        """How many of the failures asked for have not happened yet."""
        return len(self._injections.get(command, ()))

    def emit(self, event: str, data: dict[str, JsonValue] | None = None) -> None:
        """Send an event to the client, if there is one."""
        now = time.time()
        stamp: dict[str, JsonValue] = {"seconds": int(now), "microseconds": int(now % 1 * 1_000_000)}
        message: dict[str, JsonValue] = {"timestamp": stamp, "event": event}
        if data:
            message["data"] = data
        if self._client is not None and self._client.ready:
            self._client.send(message)

    async def wait_dead(self) -> None:
        """Returns when it has ended, whoever ended it."""
        await self._dead.wait()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _die(self) -> None:
        self._dead.set()
        self.machine.release()
        if self._client is not None:
            self._client.close()
        if self._listener is not None:
            self._listener.close()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        """One client after the other, as QEMU's character device does."""
        loop = asyncio.get_running_loop()
        while not self._dead.is_set():
            sock, _ = await loop.sock_accept(listener)
            self._client = _Client(sock)
            try:
                await self._client.serve(self._answer)
            finally:
                self._client.close()
                self._client = None

    def _answer(self, client: _Client, request: dict[str, JsonValue]) -> None:
        name = str(request.get("execute", request.get("exec-oob")))
        injected = self._next_injection(name)
        reply: dict[str, JsonValue] = {"id": request["id"]} if "id" in request else {}
        if injected is not None and injected.failure is Failure.HANG:
            return
        try:
            if injected is not None and injected.failure is Failure.REFUSE:
                raise QmpError(injected.text)
            if injected is None or injected.failure is Failure.DIE_AFTER:
                reply["return"] = self._execute(client, name, request.get("arguments") or {})
        except QmpError as error:
            reply["error"] = {"class": error.error_class, "desc": error.desc}
        if injected is not None and injected.failure is not Failure.REFUSE:
            self._die()
            return
        client.send(reply)
        self.machine.blocks.after_reply()
        if self.machine.quitting:
            self._die()

    def _next_injection(self, name: str) -> _Injection | None:
        waiting = self._injections.get(name)
        return waiting.popleft() if waiting else None

    def _execute(self, client: _Client, name: str, arguments: JsonValue) -> JsonValue:
        if name == "qmp_capabilities":
            client.ready = True
            return {}
        if not client.ready:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        command = COMMANDS.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        given = arguments if isinstance(arguments, dict) else {}
        command.check(given)
        if name == "getfd":
            return self.machine.keep_fd(str(given["fdname"]), client.take_fd())
        return command.run(self.machine, given)


class _Client:
    """One connection: reads requests and descriptors, writes replies."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fds: list[int] = []
        self._text = ""
        self.ready = False

    async def serve(self, answer: Callable[[_Client, dict[str, JsonValue]], None]) -> None:
        """Greet, then answer until the other side has gone."""
        version: JsonValue = {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}
        self.send({"QMP": {"version": version, "capabilities": ["oob"]}})
        with suppress(OSError):
            while await self._receive():
                for request in self._requests():
                    answer(self, request)

    def send(self, message: dict[str, JsonValue]) -> None:
        """Write one message. The messages of a test fit into the socket's buffer."""
        with suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\r\n")

    def take_fd(self) -> int:
        """The descriptor that came last."""
        if not self._fds:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self._fds.pop()

    def close(self) -> None:
        """Close the connection and what nobody took."""
        while self._fds:
            os.close(self._fds.pop())
        self._sock.close()

    async def _receive(self) -> bool:
        """Read what is there; False at the end."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(self._sock, lambda: None if readable.done() else readable.set_result(None))
        try:
            await readable
        finally:
            if self._sock.fileno() >= 0:
                loop.remove_reader(self._sock)
        data, fds, _, _ = socket.recv_fds(self._sock, 65536, 4)
        self._fds += fds
        self._text += data.decode()
        return bool(data)

    def _requests(self) -> list[dict[str, JsonValue]]:
        """The complete requests received so far."""
        found: list[dict[str, JsonValue]] = []
        decoder = json.JSONDecoder()
        while self._text.strip():
            self._text = self._text.lstrip()
            try:
                request, end = decoder.raw_decode(self._text)
            except ValueError:
                break
            found.append(request)
            self._text = self._text[end:]
        return found
