"""The guest agent, as far as Hostler needs it: is it there, shut down, please, and hold your file systems still.

The agent speaks JSON lines like QMP, over a serial port that keeps no connection: what an earlier client did not read
is still in the pipe, and nobody answers where no agent runs. So each call first synchronises: 0xFF makes the agent drop
a half-received command, and its answer to guest-sync-delimited follows a 0xFF, with our random number in it
(qga/qapi-schema.json). The guest is not trusted: what it may send is bounded in size and time.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from pydantic import JsonValue

from hostler.model.errors import GuestRefused
from hostler.qemu.connector import connect_to

DEADLINE: Final = 2.0
"""Seconds the agent may take to answer."""

THAW_DEADLINE: Final = 60.0
"""Seconds during which a thaw is tried: an agent in the middle of a freeze answers only when that is over."""
THAW_ANSWER: Final = 10.0
_THAW_PAUSE: Final = 0.5

_REFUSAL_WAIT: Final = 0.5
"""Seconds to wait for a refusal of guest-shutdown, which has no answer when it succeeds."""

_LIMIT: Final = 64 * 1024
"""Bytes in one answer; ours are below 100."""

_MOST_ANSWERS: Final = 100
"""Stale answers that are skipped while synchronising."""


class _Gone(GuestRefused):
    """Nobody listens at the socket: not even QEMU."""


class GuestAgent:
    """The agent of one VM, behind QEMU's socket `path`. One call at a time: QEMU lets in one client."""

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._name = name
        self._lock = asyncio.Lock()
        self._answered = False

    async def ping(self) -> None:
        """Returns when the agent answers; GuestRefused when it does not within 2 s."""
        async with self._session() as (reader, writer):
            await self._call(reader, writer, {"execute": "guest-ping"})

    async def shutdown(self) -> None:
        """Ask the guest to shut down; returns once the agent has taken the request. GuestRefused when no agent answers
        within 2 s, or when it refuses."""
        async with self._session() as (reader, writer):
            _send(writer, {"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}})
            with suppress(TimeoutError, OSError, EOFError):
                async with asyncio.timeout(_REFUSAL_WAIT):
                    await writer.drain()
                    self._refuse_if_error(_parse(await reader.readuntil(b"\n")))

    async def freeze(self, deadline: float) -> int:
        """Flush and freeze the guest's file systems, within `deadline` seconds; how many. GuestRefused when no agent
        answers or when it refuses; then, and when this is cancelled, they are thawed again."""
        asked = False
        try:
            async with self._session() as (reader, writer):
                asked = True
                frozen = await self._call(reader, writer, {"execute": "guest-fsfreeze-freeze"}, deadline)
        except BaseException:
            if asked:
                await asyncio.shield(self._thaw_quietly())
            raise
        return frozen if isinstance(frozen, int) else 0

    async def thaw(self) -> None:
        """Thaw them. Tried for THAW_DEADLINE seconds where the agent answers, or ever did: a guest that is frozen
        cannot go on. GuestRefused when that fails; harmless when nothing is frozen, without an agent, without QEMU."""
        clock = asyncio.get_running_loop().time
        end = clock() + THAW_DEADLINE
        while True:
            try:
                async with self._session() as (reader, writer):
                    await self._call(reader, writer, {"execute": "guest-fsfreeze-thaw"}, THAW_ANSWER)
                return
            except _Gone:
                return
            except GuestRefused as error:
                if not self._answered:
                    return
                if clock() > end:
                    cause = f"its file systems may still be frozen: {error.cause}"
                    raise GuestRefused(self._name, cause, "reset the VM if it does not go on by itself") from error
            await asyncio.sleep(_THAW_PAUSE)

    async def _thaw_quietly(self) -> None:
        with suppress(GuestRefused):
            await self.thaw()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with self._lock:
            reader, writer = await self._open()
            try:
                await self._synchronise(reader, writer)
                self._answered = True
                yield reader, writer
            finally:
                writer.transport.abort()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(DEADLINE):
                return await asyncio.open_unix_connection(sock=connect_to(self._path), limit=_LIMIT)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _Gone(self._name, "its QEMU is gone") from error
        except OSError as error:  # TimeoutError is one
            raise self._nobody() from error

    async def _synchronise(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = secrets.randbelow(2**53)
        try:
            async with asyncio.timeout(DEADLINE):
                writer.write(b"\xff")
                _send(writer, {"execute": "guest-sync-delimited", "arguments": {"id": number}})
                await writer.drain()
                for _ in range(_MOST_ANSWERS):
                    await reader.readuntil(b"\xff")
                    if _parse(await reader.readuntil(b"\n")) == {"return": number}:
                        return
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise self._nobody() from error
        raise self._nobody()

    async def _call(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        command: dict[str, JsonValue],
        deadline: float = DEADLINE,
    ) -> JsonValue:
        try:
            async with asyncio.timeout(deadline):
                _send(writer, command)
                await writer.drain()
                answer = _parse(await reader.readuntil(b"\n"))
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise self._nobody(deadline) from error
        self._refuse_if_error(answer)
        return answer.get("return")

    def _refuse_if_error(self, answer: dict[str, JsonValue]) -> None:
        error = answer.get("error")
        if isinstance(error, dict):
            raise GuestRefused(self._name, f"its guest agent refused: {str(error.get('desc', ''))[:200]}")

    def _nobody(self, deadline: float = DEADLINE) -> GuestRefused:
        return GuestRefused(
            self._name,
            f"no guest agent answered within {deadline:g} s",
            "install qemu-guest-agent in the guest, or do without it",
        )


def _send(writer: asyncio.StreamWriter, command: dict[str, JsonValue]) -> None:
    writer.write(json.dumps(command).encode() + b"\n")


def _parse(line: bytes) -> dict[str, JsonValue]:
    """The answer; {} for what is not one (a guest may send anything)."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
