"""The pause meter as a child of an asyncio program, so that nothing the program does disturbs the measuring.

async with PauseMeter.echo("10.0.0.2") as meter:
    await meter.hearing()
    ...                        # move the guest
    report = await meter.report()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from hostler.model.errors import InternalError, TimedOut
from hostler.testing.pausereport import Hole, PauseReport

DEADLINE = 30.0


class PauseMeter:
    """One measuring process. `port` is where it hears beats; `prefix` a command that starts others ("ip netns exec
    NAME"), for a place in another network."""

    def __init__(self, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self._arguments = arguments
        self._prefix = prefix
        self._process: asyncio.subprocess.Process
        self._heard: set[int] = set()
        self._output = ""
        self.port = 0

    @classmethod
    def echo(
        cls,
        address: str,
        interval_ms: float = 2,
        tcp: bool = False,
        port: int | None = None,
        prefix: Sequence[str] = (),
    ) -> Self:
        """Ask a guest that has an address; `port` where it is reached through another than its own."""
        at = ["--port", str(port)] if port else []
        return cls([address, "--interval", str(interval_ms), *at, *(["--tcp"] if tcp else [])], prefix)

    @classmethod
    def beats(cls, port: int = 0, host: str = "127.0.0.1") -> Self:
        """Hear a guest that sends by itself; 0 takes a free port."""
        return cls(["--beats", str(port), "--host", host])

    @classmethod
    def ticks(cls, *sockets: str | Path, interval_ms: float = 2) -> Self:
        """Hear ticks on serial sockets; those of targets need not exist yet. QEMU serves one client per socket."""
        return cls(["--ticks", *map(str, sockets), "--interval", str(interval_ms)])

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._prefix,
            *(sys.executable, "-m", "hostler.testing.pausemeter", "--json", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._end)
            self.port = int((await self._word("ready")).split()[1])
            undo.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()

    async def _word(self, wanted: str, deadline: float = DEADLINE) -> str:
        """The meter's next line that begins with `wanted`."""
        assert self._process.stderr is not None
        try:
            async with asyncio.timeout(deadline):
                while line := (await self._process.stderr.readline()).decode():
                    if line.startswith("hearing"):
                        self._heard.add(int(line.split()[1]))
                    if line.startswith(wanted):
                        return line
                    self._output = line.strip()
        except TimeoutError as error:
            where = f"heard {sorted(self._heard)} before" if self._heard else "heard nothing at all"
            raise TimedOut("pause meter", f"did not say {wanted!r} within {deadline:g} s, {where}") from error
        raise InternalError("pause meter", f"ended: {self._output}")

    async def hearing(self, way: int = 0, deadline: float = 60.0) -> None:
        """Until the first sign of life by that way: 0 is the first serial socket or sender, 1 the next.
        TimedOut after `deadline` seconds, InternalError when the meter ended."""
        if way not in self._heard:
            await self._word(f"hearing {way}", deadline)

    async def next(self, deadline: float = 60.0) -> None:
        """Until a sign of life that comes after this call. TimedOut after `deadline` seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"?")
        await self._word("next", deadline)

    async def report(self) -> PauseReport:
        """End the measuring and judge it."""
        try:
            output, words = await asyncio.wait_for(self._process.communicate(b""), DEADLINE)
        except TimeoutError as error:
            raise TimedOut("pause meter", "did not end") from error
        try:
            found = json.loads(output)
        except ValueError as error:
            raise InternalError("pause meter", f"gave no report: {words.decode(errors='replace')[-300:]}") from error
        holes = tuple(Hole(**hole) for hole in found.pop("gaps"))
        return PauseReport(gaps=holes, **found)
