"""QMP as far as a storage daemon needs it: one JSON object a line over a unix socket (qemu's docs/interop/qmp-spec).

Small and own: the `qemu.qmp` library belongs to the package that drives VMs, and one short conversation needs neither
its reconnecting nor its event queues. A QMP server talks to one client at a time; a second one waits for its greeting.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic import JsonValue

DEADLINE = 30.0
"""Seconds for one command, and for the connection with its greeting. Closing an image flushes it first."""
_AGAIN = 0.005
_LINE = 4 * 1024 * 1024


class QmpGone(Exception):
    """Nobody answers: not running, ended in the middle, or no answer in time."""


class QmpRefused(Exception):
    """The command failed; the text is the server's."""


class QmpLines:
    """A conversation. Made with `conversation`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []

    async def execute(self, command: str, **arguments: JsonValue) -> Any:
        """The command's return value; argument names with "_" for "-". QmpRefused, QmpGone."""
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        try:
            async with asyncio.timeout(DEADLINE):
                self._writer.write(json.dumps(message).encode() + b"\n")
                await self._writer.drain()
                while True:
                    answer = await self._next()
                    if "event" in answer:
                        self._events.append(answer)
                        continue
                    if "error" in answer:
                        raise QmpRefused(str(answer["error"].get("desc", "")))
                    return answer.get("return")
        except (TimeoutError, OSError) as error:
            raise QmpGone(f"no answer to {command}") from error

    async def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name, past ones of this conversation included. QmpGone."""
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    for index, event in enumerate(self._events):
                        if event["event"] == name:
                            return dict(self._events.pop(index).get("data", {}))
                    message = await self._next()
                    if "event" in message:
                        self._events.append(message)
        except (TimeoutError, OSError) as error:
            raise QmpGone(f"no event {name}") from error

    async def _next(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            message = json.loads(line) if line else None
        except ValueError as error:  # not JSON, or a line without end
            raise QmpGone("it does not speak QMP") from error
        if not isinstance(message, dict):
            raise QmpGone("it ended the conversation")
        return message

    async def greet(self) -> None:
        """Greeting and capabilities, the beginning of every conversation."""
        try:
            async with asyncio.timeout(DEADLINE):
                await self._next()
        except (TimeoutError, OSError) as error:
            raise QmpGone("no greeting") from error
        await self.execute("qmp_capabilities")


@asynccontextmanager
async def conversation(path: str, pid: int | None = None) -> AsyncIterator[QmpLines]:
    """Talk to the QMP server on that socket. QmpGone when nobody answers there, or another process than `pid`: the
    socket's directory may belong to somebody who puts a link in its place."""
    try:
        async with asyncio.timeout(DEADLINE):
            connected = await _connect(path)
            if pid is not None and peer_pid(connected) != pid:
                connected.close()
                raise QmpGone(f"another process listens on {path}")
            reader, writer = await asyncio.open_unix_connection(sock=connected, limit=_LINE)
    except (TimeoutError, OSError) as error:
        raise QmpGone(f"cannot connect to {path}") from error
    try:
        qmp = QmpLines(reader, writer)
        await qmp.greet()
        yield qmp
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _connect(path: str) -> socket.socket:
    """A connected socket. A unix socket whose queue is full (QEMU's holds one) refuses with EAGAIN, which asyncio takes
    for "under way" and then reads from a socket that was never connected; hence this loop."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        while True:
            try:
                connecting.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_AGAIN)
                continue
            return connecting
    except BaseException:
        connecting.close()
        raise


def peer_pid(connected: socket.socket) -> int:
    """The process at the other end of a connected unix socket."""
    size = struct.calcsize("3i")
    pid, _, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid)
