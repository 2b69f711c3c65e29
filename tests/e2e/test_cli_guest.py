"""A real guest, through nothing but the command line: made, talked to, given a disk, moved, shut down, deleted."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler.testing import microguest
from hostler.testing.lab import Lab, LabHost

pytestmark = pytest.mark.e2e

PATIENCE = 60.0
ASK_AGAIN = 1.0
"""Seconds; a guest that is not up yet drops what it is sent."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="he", dir="/tmp") as made:
        Path(made).chmod(0o755)  # where the daemon is root, QEMU's own user must get at kernel and images
        with Lab(Path(made), isolated=False) as lab:
            yield lab


def hostler(host: LabHost, *words: str) -> str:
    command = [sys.executable, "-m", "hostler.cli", "--host", host.socket, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr, host.tail())
    return done.stdout


class Console:
    """`hostler vm console` in a pipe, and the micro guest's protocol through it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._unread = b""
        self._number = 0

    def ask(self, *words: str) -> Any:
        """The guest's answer to a command."""
        assert self._process.stdin is not None
        self._number += 1
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._process.stdin.write(f"\nq{self._number} {' '.join(words)}\n".encode())
            self._process.stdin.flush()
            for message in self._messages(ASK_AGAIN):
                if message.get("id") == f"q{self._number}":
                    assert message["ok"], message
                    return message["result"]
        raise AssertionError(f"the guest did not answer {words}")

    def _messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self._process.stdout], [], [], left)[0]:
            part = os.read(self._process.stdout.fileno(), 65536)
            assert part, "the console ended"
            *lines, self._unread = (self._unread + part).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        yield message

    def end(self) -> str:
        """Waits until the console ends by itself; what it said then."""
        assert self._process.stderr is not None
        assert self._process.wait(PATIENCE) == 0
        return self._process.stderr.read().decode()


@contextlib.contextmanager
def console(host: LabHost, vm: str) -> Iterator[Console]:
    command = [sys.executable, "-m", "hostler.cli", "--host", host.socket, "vm", "console", vm]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield Console(process)
        finally:
            process.kill()


def sizes(guest: Console) -> list[int]:
    return sorted(int(disk["size"]) for disk in guest.ask("disks"))


def test_a_guest_by_the_command_line_alone(lab: Lab) -> None:
    alpha, beta = lab.add_host("alpha"), lab.add_host("beta")
    guest = microguest.build(lab.directory / "guest")
    boot = ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--append", guest.cmdline]
    hostler(alpha, "vm", "create", "web1", "--memory", "128M", *boot, "--start")

    with console(alpha, "web1") as line:
        born = line.ask("ping")["boot"]
        hostler(alpha, "disk", "add", "web1", "--new", "32M", "--format", "raw")
        end = time.monotonic() + PATIENCE
        while sizes(line) != [32 * 1024**2]:
            assert time.monotonic() < end, "the guest does not see its disk"
        hostler(beta, "host", "join", hostler(alpha, "host", "invite", "-q").strip())
        assert "possible" in hostler(alpha, "vm", "move", "web1", "beta", "--dry-run")
        assert "vm web1 is on host beta" in hostler(alpha, "vm", "move", "web1", "beta")
        assert "the vm has ended" in line.end()

    assert hostler(alpha, "vm", "list", "-q") == ""
    with console(beta, "web1") as line:
        assert line.ask("ping")["boot"] == born
        assert sizes(line) == [32 * 1024**2]
        hostler(beta, "disk", "remove", "web1", "disk0")
        assert sizes(line) == []
        hostler(beta, "vm", "save", "web1")
        hostler(beta, "vm", "restore", "web1")
    with console(beta, "web1") as line:
        assert line.ask("ping")["boot"] == born
    picture = lab.directory / "screen.png"
    hostler(beta, "vm", "screenshot", "web1", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    hostler(beta, "vm", "shutdown", "web1", "--timeout", "60")
    hostler(beta, "vm", "delete", "web1", "--yes")
    assert (alpha.processes(), beta.processes()) == ([], [])
