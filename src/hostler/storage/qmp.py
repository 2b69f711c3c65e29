"""QMP as far as a storage daemon needs it: one JSON object a line over a unix socket (qemu's docs/interop/qmp-spec).

Small and own: the `qemu.qmp` library belongs to the package that drives VMs, and one short conversation needs neither
its reconnecting nor its event queues. A QMP server talks to one client at a time; a second one waits for its greeting.

A storage daemon has opened an image that its guest wrote, so it may be hostile: what it says is bounded in length and
number, and whatever makes no sense is QmpGone.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from pydantic import JsonValue

DEADLINE = 30.0
"""Seconds for one command, and for the connection with its greeting. Closing an image flushes it first."""
_AGAIN = 0.005
_LINE = 256 * 1024
"""Bytes of a line; the longest answers (lists of a handful of block nodes) have some 10 KiB."""
_MESSAGES = 1000
"""Messages in one conversation, which has a dozen as a rule; a busy export adds a few events of failed I/O."""
_WANTED = "BLOCK_EXPORT_DELETED"
_KEPT = 16
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a malformed answer raises; RecursionError is json's for one that is nested too deeply."""


class QmpGone(Exception):
    """Nobody answers: not running, ended in the middle, or no answer in time."""


class QmpRefused(Exception):
    """The command failed; the text is the server's."""


class QmpLines:
    """A conversation. Made with `conversation`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._left = _MESSAGES

    async def execute(self, command: str, **arguments: JsonValue) -> Any:
        """The command's return value; argument names with "_" for "-". QmpRefused, QmpGone."""
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        try:
            async with asyncio.timeout(DEADLINE):
                self._writer.write(json.dumps(message).encode() + b"\n")
                await self._writer.drain()
                while True:
                    answer = await self._next()
                    if "error" in answer:
                        raise QmpRefused(_reason(answer["error"]))
                    if "event" not in answer:
                        return answer.get("return")
                    self._keep(answer)
        except (TimeoutError, OSError) as error:
            raise QmpGone(f"no answer to {command}") from error

    async def event(self, name: Literal["BLOCK_EXPORT_DELETED"]) -> dict[str, Any]:
        """The data of the next such event, past ones of this conversation included; others are not kept. QmpGone."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not self._events:
                    self._keep(await self._next())
        except (TimeoutError, OSError) as error:
            raise QmpGone(f"no event {name}") from error
        data = self._events.popleft().get("data")
        return data if isinstance(data, dict) else {}

    def _keep(self, message: dict[str, Any]) -> None:
        if message.get("event") == _WANTED:
            self._events.append(message)

    async def _next(self) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise QmpGone("it talks without end")
        try:
            line = await self._reader.readline()
            message = json.loads(line) if line else None
        except (ValueError, RecursionError) as error:  # not JSON, or a line without end
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


def _reason(error: object) -> str:
    """What a refusal says, cut to what people read."""
    return str(error.get("desc", "") if isinstance(error, dict) else error)[:1000]


@asynccontextmanager
async def conversation(path: str, pid: int | None = None) -> AsyncIterator[QmpLines]:
    """Talk to the QMP server on that socket. QmpGone when nobody answers there, or another process than `pid`: the
    socket's directory may belong to somebody who puts a link in its place. Also when reading its answers inside the
    block fails because they are not what they should be."""
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
    except _NONSENSE as error:
        raise QmpGone(f"its answers make no sense: {type(error).__name__}") from error
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
