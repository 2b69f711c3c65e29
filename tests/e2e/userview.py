"""What the tests of this tier have in common: somebody at a shell who types `hostler`, and what is left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hostler.model.errors import ErrorCode
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import LabHost

T = TypeVar("T")
PATIENCE = 90.0
PROGRAM = (sys.executable, "-m", "hostler.cli")


class User:
    """`user("vm", "list")` runs the command with --json and returns what it printed."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.env = {**os.environ, "HOSTLER_HOST": host.socket}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command as it ended, in whatever way."""
        return subprocess.run(
            [*PROGRAM, *words], env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def __call__(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert done.returncode == 0, (words, done.returncode, done.stderr, done.stdout, self.host.tail())
        return json.loads(done.stdout) if done.stdout else None

    def refused(self, code: ErrorCode, exit_code: int, *words: str) -> dict[str, Any]:
        """The error of a command that must fail in exactly this way, and explain itself."""
        done = self.run(*words, "--json")
        said = f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.host.tail(1500)}"
        assert done.returncode == exit_code, said
        problem: dict[str, Any] = json.loads(done.stderr)
        assert problem["code"] == code, said
        assert problem["object"] and problem["cause"] and not problem["cause"].endswith("."), said
        assert "Traceback" not in done.stderr and "Errno" not in done.stderr, said
        return problem

    def until_state(self, vm: str, state: str) -> None:
        """Look again and again until the VM is in that state by itself."""
        end = time.monotonic() + PATIENCE
        while (found := self("vm", "show", vm)["state"]) != state:
            assert time.monotonic() < end, f"{vm} is {found}, not {state}"

    @contextlib.contextmanager
    def on_terminal(self, *words: str) -> Iterator[Terminal]:
        """The command with a terminal of its own."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**self.env, "COLUMNS": "200", "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            process.wait()
            os.close(ours)


class Terminal:
    """A command that runs on a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._unread = b""

    def type(self, text: bytes) -> None:
        os.write(self._fd, text)

    def read_until(self, text: bytes, ask: bytes = b"") -> bytes:
        """What is written until `text` appears, and that; `ask` is typed again every second until then."""
        end, again = time.monotonic() + PATIENCE, 0.0
        while text not in self._unread:
            assert time.monotonic() < end, f"{text!r} did not come, only {self._unread!r}"
            if ask and time.monotonic() >= again:
                self.type(ask)
                again = time.monotonic() + 1
            if select.select([self._fd], [], [], 0.2)[0]:
                self._read(text)
        found, _, self._unread = self._unread.partition(text)
        return found + text

    def _read(self, wanted: bytes) -> None:
        try:
            self._unread += os.read(self._fd, 65536)
        except OSError as error:  # the command has ended
            raise AssertionError(f"ended without {wanted!r}: {self._unread!r}") from error


def converse(host: LabHost, vm_id: str, question: Callable[[GuestSerial], Awaitable[T]]) -> T:
    """One conversation with a micro guest on that host, once it is up."""

    async def talk() -> T:
        socket = host.run_dir / "vms" / vm_id / "serial.sock"
        async with asyncio.timeout(PATIENCE), GuestSerial.unix(socket) as guest:
            await guest.wait_ready()
            return await question(guest)

    return asyncio.run(talk())


Traces = dict[str, frozenset[str]]


def traces(host: LabHost, *directories: Path) -> Traces:
    """Everything of a host that a refused request must not have changed: files, records, claims, processes."""
    store = sqlite3.connect(f"file:{host.state_dir}/store/hostler.db?mode=ro", uri=True)
    with contextlib.closing(store):
        keys = {key for (key,) in store.execute("SELECT key FROM entry") if not key.startswith("job/")}
    places = [host.state_dir / "vms", host.state_dir / "volumes", host.run_dir / "vms", *directories]
    return {
        "records": frozenset(keys),
        "files": frozenset(str(path) for place in places for path in place.rglob("*")),
        "processes": frozenset(str(process.pid) for process in host.processes()),
    }
