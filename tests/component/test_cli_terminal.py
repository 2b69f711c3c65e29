"""The command line as a process of its own: on a terminal, interrupted, in pipes, asked by a shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import PROGRAM, Run, ok, on_terminal, read_until, runner
from client_host import PATIENCE, RunningHost, running_host

from hostler.cli.exit_codes import Exit
from hostler.model.job import JobState

pytestmark = pytest.mark.component


@pytest.fixture
def host() -> Iterator[RunningHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def run(host: RunningHost, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(host, capsys, monkeypatch)


def test_progress_of_a_move_on_a_terminal(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    with on_terminal(host, "vm", "move", "web1", "beta") as (process, fd):
        host.move_on(transferred=1024**2, remaining=2 * 1024**2, total=4 * 1024**2, rounds=3, rate=7, expected_pause=35)
        shown = read_until(fd, b"expected pause 35 ms")
        assert b"pre-copy" in shown
        assert b"1 MiB sent, 2 MiB of 4 MiB left" in shown
        assert b"round 3" in shown
        host.do(host.app.jobs.end(host.job().id))
        read_until(fd, b"vm web1 is on host beta")
        assert process.wait(PATIENCE) == Exit.OK


def test_ctrl_c_leaves_the_job_running(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    with on_terminal(host, "vm", "save", "web1") as (process, fd):
        read_until(fd, b"vm.save")
        process.send_signal(signal.SIGINT)
        job = host.job()
        read_until(fd, f"hostler job cancel {job.id}".encode())
        assert process.wait(PATIENCE) == Exit.INTERRUPTED
    assert host.job().state is JobState.RUNNING


def test_a_second_ctrl_c_cancels_a_move(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    with on_terminal(host, "vm", "move", "web1", "beta") as (process, fd):
        host.move_on(transferred=1, total=2, remaining=1)
        read_until(fd, b"pre-copy")
        process.send_signal(signal.SIGINT)
        read_until(fd, b"press Ctrl-C again")
        process.send_signal(signal.SIGINT)
        read_until(fd, b"was cancelled")
        assert process.wait(PATIENCE) == Exit.CANCELLED
    assert host.job().state is JobState.CANCELLED


def test_one_ctrl_c_does_not_cancel_a_move(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    with on_terminal(host, "vm", "move", "web1", "beta") as (process, fd):
        read_until(fd, b"work")
        process.send_signal(signal.SIGINT)
        read_until(fd, b"hostler job watch")
        assert process.wait(PATIENCE) == Exit.INTERRUPTED
    assert host.job().state is JobState.RUNNING


def test_ctrl_c_while_a_disk_is_made_cancels_that_and_makes_no_vm(run: Run, host: RunningHost) -> None:
    host.app.jobs.held = True
    with on_terminal(host, "vm", "create", "web1", "--new-disk", "1G") as (process, fd):
        read_until(fd, b"volume.create")
        process.send_signal(signal.SIGINT)
        read_until(fd, b"interrupted")
        assert process.wait(PATIENCE) == Exit.INTERRUPTED
    assert host.job().state is JobState.CANCELLED
    assert (host.app.vms.list(), host.app.volumes.by_name) == ([], {})


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
def test_what_destroys_asks_on_a_terminal(run: Run, host: RunningHost, answer: bytes, left: int) -> None:
    ok(run("vm", "create", "web1"))
    with on_terminal(host, "vm", "delete", "web1") as (process, fd):
        read_until(fd, b"Delete vm web1? [y/N]:")
        os.write(fd, answer)
        read_until(fd, b"is deleted" if left == 0 else b"interrupted")
        process.wait(PATIENCE)
    assert len(host.app.vms.list()) == left


def test_a_table_on_a_terminal_has_colour(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1", "--start"))
    with on_terminal(host, "vm", "list") as (_, fd):
        assert b"\x1b[32mrunning" in read_until(fd, b"running")


def test_console_on_a_terminal_is_raw_and_ctrl_bracket_leaves(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.app.vms.serial_socket("web1"))
        listener.listen()
        with on_terminal(host, "vm", "console", "web1") as (process, fd):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"login: ")
                read_until(fd, b"login: ")
                os.write(fd, b"\x03ls")  # Ctrl-C is for the guest
                typed = b""
                while typed != b"\x03ls":
                    typed += connection.recv(100)
                os.write(fd, b"\x1d")
                read_until(fd, b"left the console")
                assert process.wait(PATIENCE) == Exit.OK


def test_listing_imports_nothing_slow(run: Run, host: RunningHost) -> None:
    """What `hostler vm list` takes is what it imports."""
    ok(run("vm", "create", "web1"))
    program = (
        "import sys\nfrom hostler.cli.main import main\ncode = main(['vm', 'list'])\n"
        "print('\\0'.join(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    env = {**os.environ, "HOSTLER_HOST": str(host.socket)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=PATIENCE, check=True
    )
    assert "web1" in done.stdout
    loaded = set(done.stderr.strip().split("\0"))
    assert "httpx2" in loaded
    assert not loaded & {"pydantic", "rich", "websockets", "hostler.model.vm"}


def test_a_terminal_of_another_encoding(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "w\u20acb"))
    env = {**os.environ, "HOSTLER_HOST": str(host.socket), "PYTHONIOENCODING": "iso-8859-1", "PYTHONUTF8": "0"}
    done = subprocess.run([*PROGRAM, "vm", "list", "-q"], capture_output=True, env=env, timeout=PATIENCE, check=True)
    assert done.stdout == b"w?b\n"
    done = subprocess.run(
        [*PROGRAM, "vm", "show", "w\u20acb", "--json"], capture_output=True, env=env, timeout=PATIENCE, check=True
    )
    assert json.loads(done.stdout)["config"]["name"] == "w\u20acb"


def test_a_reader_that_goes_away_is_no_error(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "HOSTLER_HOST": str(host.socket)}
    done = subprocess.run(
        [*PROGRAM, "vm", "list"], stdout=write, stderr=subprocess.PIPE, env=env, timeout=PATIENCE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (Exit.PIPE, b"")


def complete(host: str, *words: str) -> list[str]:
    env = {**os.environ, "HOSTLER_HOST": host, "_HOSTLER_COMPLETE": "bash_complete"}
    env |= {"COMP_WORDS": " ".join(["hostler", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(PROGRAM, capture_output=True, text=True, env=env, timeout=PATIENCE, check=False)
    assert done.stderr == ""
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]


def test_completion_knows_names(run: Run, host: RunningHost, tmp_path: Path) -> None:
    ok(run("vm", "create", "web1", "--disk", "/srv/a"))
    ok(run("vm", "create", "db"))
    ok(run("volume", "register", "vol1", "/x", "--format", "raw"))
    where = str(host.socket)
    assert complete(where, "vm", "start", "") == ["web1", "db"]
    assert complete(where, "vm", "start", "w") == ["web1"]
    assert complete(where, "vm", "move", "web1", "b") == ["beta"]
    assert complete(where, "disk", "remove", "web1", "") == ["disk0"]
    assert complete(where, "volume", "show", "") == ["vol1"]
    assert complete(where, "vm", "sta") == ["start"]
    assert complete(str(tmp_path / "none"), "vm", "start", "") == []


def test_completion_scripts(run: Run) -> None:
    assert "complete -o nosort -F _hostler_completion hostler" in ok(run("completion", "bash"))
    assert "#compdef hostler" in ok(run("completion", "zsh"))
    assert "complete --no-files --command hostler" in ok(run("completion", "fish"))
