"""The serial line to a micro guest as a client has it: requests with ids, answers, events, connections that break.

A guest that moves has its serial line elsewhere: `move_to` gives the new place, and requests under way are sent there
again with the same id, which the guest answers once (see `guest/serial.c`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from pydantic import JsonValue

from hostler.model.errors import GuestRefused, TimedOut

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Message = dict[str, JsonValue]

RETRY = 0.05
"""Seconds between attempts to connect."""
ASK_AGAIN = 1.0
"""Seconds after which an unanswered request is sent again: a guest that is not up yet drops what it is sent."""
LINE_LIMIT = 1 << 20
"""Bytes of one answer: the list of 256 disks takes about 64 KiB."""


def unix(path: str | Path) -> Connect:
    """Connects to QEMU's serial socket."""
    return lambda: asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)


class GuestLink:
    """Use as `async with GuestLink(unix(path)) as link`. Not bound to one connection; lost ones are made again."""

    def __init__(self, connect: Connect, name: str = "guest") -> None:
        self.name = name
        self._connect = connect
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._queues: set[asyncio.Queue[Message]] = set()
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._prefix = secrets.token_hex(4)

    async def __aenter__(self) -> GuestLink:
        self._task = asyncio.create_task(self._keep_connected(), name=f"serial of {self.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def move_to(self, connect: Connect) -> None:
        """The guest's line is somewhere else from now on."""
        self._connect = connect
        if self._writer is not None:
            self._writer.close()

    async def request(self, *words: object, deadline: float = 30.0) -> JsonValue:
        """Send a command and return its result. GuestRefused with the guest's reason; TimedOut after `deadline` s."""
        id = f"{self._prefix}{next(self._numbers)}"
        answer = asyncio.get_running_loop().create_future()
        self._waiting[id] = answer
        try:
            async with asyncio.timeout(deadline):
                message = await self._ask(f"{id} {' '.join(map(str, words))}", answer)
        except TimeoutError as error:
            raise TimedOut(f"guest {self.name}", f"no answer to {words[0]!s} within {deadline:g} s") from error
        finally:
            del self._waiting[id]
        if message.get("ok") is not True:
            raise GuestRefused(f"guest {self.name}", f"{words[0]!s}: {message.get('error')}")
        return message.get("result")

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[asyncio.Queue[Message]]:
        """Every event and tick from now on, each with `at`, the arrival on this process's monotonic clock."""
        queue: asyncio.Queue[Message] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    async def _ask(self, line: str, answer: asyncio.Future[Message]) -> Message:
        while True:
            await self._connected.wait()
            # The line before it ends whatever half a line an earlier connection left in the guest.
            self._send(f"\n{line}\n")
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(answer), ASK_AGAIN)

    def _send(self, text: str) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(text.encode())

    async def _keep_connected(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, self._writer = await self._connect()
                try:
                    self._connected.set()
                    await self._read_lines(reader)
                finally:
                    self._connected.clear()
                    self._writer.close()
                    self._writer = None
            await asyncio.sleep(RETRY)

    async def _read_lines(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self._take(line)

    def _take(self, line: bytes) -> None:
        """An answer goes to who waits for it; anything else that is JSON, or the guest's words, to the listeners."""
        try:
            message = json.loads(line)
        except ValueError:
            message = {"word": line.decode(errors="replace").strip()}
        if not isinstance(message, dict):
            return
        waiting = self._waiting.get(str(message.get("id")))
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        if "id" not in message:
            message["at"] = asyncio.get_running_loop().time()
            for queue in self._queues:
                queue.put_nowait(message)
