"""Stop a daemon exactly at a named step of a job, from outside its process.

A directory is the whole interface. `DIR/KIND:STEP:EDGE.stop` (slashes in the name as colons, for example
"vm.migrate:switch-over:before.stop") makes the daemon stand still there; it tells so by making the same name with
".here", and goes on when the ".stop" file is gone. A daemon that is killed meanwhile leaves both; `clear` removes them.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from hostler.model.errors import TimedOut


class Failpoints:
    """Both ends of that directory: `hook` is for the daemon, the rest for the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _file(self, where: str, edge: str, kind: str) -> Path:
        return self._directory / f"{where.replace('/', ':')}:{edge}.{kind}"

    async def hook(self, where: str, edge: str) -> None:
        """Called by the daemon around each step."""
        stop = self._file(where, edge, "stop")
        if not stop.exists():
            return
        self._file(where, edge, "here").touch()
        while stop.exists():  # noqa: ASYNC110 - the other end is another process
            await asyncio.sleep(0.005)

    def arm(self, where: str, edge: str = "before") -> None:
        """The next time the daemon comes there it stands still."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file(where, edge, "stop").touch()

    def wait_reached(self, where: str, edge: str = "before", timeout: float = 60.0) -> None:
        """Wait until it stands there. TimedOut if it does not come."""
        here = self._file(where, edge, "here")
        end = time.monotonic() + timeout
        while not here.exists():
            if time.monotonic() > end:
                raise TimedOut(f"failpoint {where} {edge}", f"was not reached within {timeout} s")
            time.sleep(0.005)

    def clear(self) -> None:
        """Let everything go on and forget what was reached."""
        for file in self._directory.glob("*") if self._directory.is_dir() else []:
            file.unlink(missing_ok=True)
