"""QMP without anything between: a socket and JSON lines. For tests of what lies below our own session, and as the
measure our session is held against."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from pydantic import JsonValue

DEADLINE = 60.0
"""Seconds for each answer; long, because tests run on loaded machines."""


class RawQmp:
    """A QMP connection: `async with RawQmp(path) as qmp: await qmp.ask("query-status")`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._events: list[Mapping[str, JsonValue]] = []
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path, limit=2**24)
        await self._line()
        await self.ask("qmp_capabilities")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def ask(self, command: str, **arguments: JsonValue) -> JsonValue:
        """The answer's `return`. ConnectionError when QEMU is gone, RuntimeError with its text when it refuses."""
        request = {"execute": command, "arguments": {name.replace("_", "-"): v for name, v in arguments.items()}}
        self._writer.write(json.dumps(request).encode() + b"\n")
        await self._writer.drain()
        while True:
            answer = await self._line()
            if "error" in answer:
                raise RuntimeError(str(answer["error"]))
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    async def event(self, name: str, **data: JsonValue) -> None:
        """Return once an event of that name, with at least that data, has come since the connection was made."""
        while True:
            for event in self._events:
                found = event.get("data", {})
                if event["event"] == name and isinstance(found, dict) and data.items() <= found.items():
                    return
            self._events.append(await self._line())

    async def _line(self) -> Mapping[str, JsonValue]:
        async with asyncio.timeout(DEADLINE):
            line = await self._reader.readline()
        if not line:
            raise ConnectionError(f"{self._path}: closed by QEMU")
        answer: dict[str, JsonValue] = json.loads(line)
        return answer
