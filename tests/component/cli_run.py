"""How tests run the command line: in this process, or as one of its own on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from client_host import PATIENCE, RunningHost

from hostler.cli.exit_codes import Exit
from hostler.cli.main import main


@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


def runner(host: RunningHost, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line in this process."""
    monkeypatch.setenv("HOSTLER_HOST", str(host.socket))
    capsys.readouterr()

    def run(*words: str) -> Done:
        code = main(words)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def ok(done: Done) -> str:
    assert (done.code, done.err) == (Exit.OK, ""), done
    return done.out


PROGRAM = [sys.executable, "-m", "hostler.cli"]


def read_until(fd: int, text: bytes) -> bytes:
    """What is written until `text` appears."""
    found, end = b"", time.monotonic() + PATIENCE
    while text not in found:
        left = end - time.monotonic()
        assert left > 0, f"{text!r} did not come, only {found!r}"
        if select.select([fd], [], [], left)[0]:
            try:
                part = os.read(fd, 65536)
            except OSError:
                part = b""
            assert part, f"ended without {text!r}: {found!r}"
            found += part
    return found


@contextlib.contextmanager
def on_terminal(host: RunningHost, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command with a terminal of its own."""
    main_fd, terminal = pty.openpty()
    env = {**os.environ, "HOSTLER_HOST": str(host.socket), "COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(
        [*PROGRAM, *words], stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True
    )
    os.close(terminal)
    try:
        yield process, main_fd
    finally:
        process.kill()
        process.wait()
        os.close(main_fd)
