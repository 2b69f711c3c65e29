"""Processes outlive who started them, are found again, waited for without being our children, and never mistaken."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from hostler.model.errors import HostLacks, TimedOut
from hostler.model.vm import Process
from hostler.qemu import cgroup, process
from hostler.qemu.paths import RunDir

pytestmark = pytest.mark.component

GONE = 60.0
ROOT = os.geteuid() == 0


@pytest.fixture
def room() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    path.chmod(0o711)
    yield path
    rmtree(path)


def idle(room: Path) -> list[str]:
    """An empty QEMU that names the pid file of `room`."""
    empty = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none"]
    return [*empty, "-pidfile", RunDir(str(room)).pid]


def spawn(room: Path, *argv: str, uid: int | None = None) -> Process:
    return process.spawn(argv or idle(room), str(room), RunDir(str(room)).log, uid)


@pytest.fixture
def orphan(room: Path) -> int:
    """Pid of a QEMU whose spawner was killed with SIGKILL, with its whole process group; we are not its parent."""
    script = (
        "import sys, time; from hostler.qemu import process\n"
        "room, *argv = sys.argv[1:]\n"
        "print(process.spawn(argv, room, room + '/qemu.log').pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    spawner = subprocess.Popen(
        [sys.executable, "-c", script, str(room), *idle(room)], stdout=subprocess.PIPE, process_group=0
    )
    assert spawner.stdout is not None
    pid = int(spawner.stdout.readline())
    os.killpg(spawner.pid, signal.SIGKILL)
    spawner.wait()
    spawner.stdout.close()
    return pid


async def test_a_qemu_outlives_its_spawner_and_is_found_waited_for_and_killed(room: Path, orphan: int) -> None:
    found = process.find(str(room))
    assert found is not None
    assert found.pid == orphan
    assert process.is_alive(found)
    waiting = asyncio.create_task(process.wait_gone(found))
    await asyncio.sleep(0)
    assert not waiting.done()
    await process.kill(found, GONE)
    async with asyncio.timeout(GONE):
        await waiting
    assert process.find(str(room)) is None
    assert not process.is_alive(found)


async def test_it_is_found_without_its_pid_file(room: Path) -> None:
    """The daemon may have died before QEMU wrote it, and the file is the VM's user's to remove or to forge."""
    qemu = spawn(room)
    try:
        for content in (None, "", "not a number", "1", str(os.getpid()), "999999999999"):
            path = Path(RunDir(str(room)).pid)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content)
            assert process.find(str(room)) == qemu
    finally:
        await process.kill(qemu, GONE)


async def test_a_directory_with_a_longer_name_is_another_vm(room: Path) -> None:
    qemu = spawn(room)
    try:
        assert process.find(f"{room}x") is None
        assert process.find(str(room)[:-1]) is None
    finally:
        await process.kill(qemu, GONE)


@pytest.mark.skipif(not ROOT, reason="changing users needs root")
async def test_another_user_cannot_pose_as_the_qemu_of_a_vm(room: Path) -> None:
    poser = spawn(room, "sh", "-c", "sleep 600; true", "-pidfile", RunDir(str(room)).pid, uid=1_900_000_002)
    try:
        await owned(poser, 1_900_000_002)
        assert process.find(str(room)) is None
        os.chown(room, 1_900_000_002, 1_900_000_002)
        assert process.find(str(room)) == poser
    finally:
        os.chown(room, 0, 0)
        await process.kill(poser, GONE)


async def owned(one: Process, uid: int) -> None:
    """Return once setpriv, on its way to become the program, has changed the user."""
    async with asyncio.timeout(GONE):
        while os.stat(f"/proc/{one.pid}").st_uid != uid:  # noqa: ASYNC110 - another program does it
            await asyncio.sleep(0.01)


async def test_it_may_open_many_files_whatever_we_may(room: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        child = spawn(room, "sleep", "600")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (min(hard, 16_384), hard)
    finally:
        await process.kill(child, GONE)


async def test_our_own_children_are_reaped(room: Path) -> None:
    child = spawn(room, "true")
    async with asyncio.timeout(GONE):
        await process.wait_gone(child)
    assert not os.path.exists(f"/proc/{child.pid}")


@pytest.fixture
def zombie(room: Path) -> Process:
    """A child that is dead and not yet reaped."""
    child = spawn(room, "true")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


async def test_a_dead_child_nobody_waited_for_counts_as_gone(zombie: Process) -> None:
    child = zombie
    assert os.path.exists(f"/proc/{child.pid}")
    assert not process.is_alive(child)
    await process.wait_gone(child)
    assert not os.path.exists(f"/proc/{child.pid}")


async def test_a_reused_pid_is_neither_waited_for_nor_killed(room: Path) -> None:
    other = spawn(room, "sleep", "600")
    try:
        earlier = other.but(started=other.started - 1)
        assert not process.is_alive(earlier)
        async with asyncio.timeout(GONE):
            await process.wait_gone(earlier)
        await process.kill(earlier, GONE)
        assert process.is_alive(other)
    finally:
        await process.kill(other, GONE)


async def test_waiting_can_be_given_up_and_begun_again(room: Path) -> None:
    child = spawn(room, "sleep", "600")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await process.wait_gone(child)
    several = [asyncio.create_task(process.wait_gone(child)) for _ in range(3)]
    await process.kill(child, GONE)
    async with asyncio.timeout(GONE):
        await asyncio.gather(*several)


async def test_killing_twice_is_harmless(room: Path) -> None:
    child = spawn(room, "sleep", "600")
    await asyncio.gather(process.kill(child, GONE), process.kill(child, GONE))
    await process.kill(child, GONE)


async def test_a_process_that_does_not_go_is_reported(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it hung in the kernel: the signal has no effect."""
    child = spawn(room, "sleep", "600")
    try:
        with monkeypatch.context() as patch, pytest.raises(TimedOut, match="storage"):
            patch.setattr(signal, "pidfd_send_signal", lambda fd, number: None)
            await process.kill(child, deadline=0)
        assert process.is_alive(child)
    finally:
        await process.kill(child, GONE)


async def test_it_starts_detached_and_with_private_files(room: Path) -> None:
    marker = os.open(room, os.O_RDONLY)
    os.set_inheritable(marker, True)
    child = spawn(room, "sh", "-c", "umask; ls -l /proc/self/fd; pwd; env; exec sleep 600")
    try:
        await lines(RunDir(str(room)).log, "LC_ALL")
        text = process.tail(RunDir(str(room)).log)
        assert text.startswith("0077")
        assert str(room) not in text.replace(RunDir(str(room)).log, "")
        assert "\n/\n" in text
        assert "HOME=" not in text
        assert os.getsid(child.pid) == child.pid
        assert os.stat(RunDir(str(room)).log).st_mode & 0o777 == 0o600
    finally:
        os.close(marker)
        await process.kill(child, GONE)


async def lines(path: str, word: str) -> None:
    """Return once the log holds the word."""
    async with asyncio.timeout(GONE):
        while word not in process.tail(path):  # noqa: ASYNC110 - another program writes it
            await asyncio.sleep(0.01)


async def test_only_the_end_of_a_long_output_is_read(room: Path) -> None:
    child = spawn(room, "sh", "-c", "seq 1 100000; echo the end")
    async with asyncio.timeout(GONE):
        await process.wait_gone(child)
    text = process.last_output(str(room))
    assert text.endswith("the end")
    assert len(text) <= process.LAST_OUTPUT


def test_links_and_pipes_planted_for_the_log_are_not_followed(room: Path) -> None:
    secret = room / "secret"
    secret.write_text("secret")
    log = Path(RunDir(str(room)).log)
    log.symlink_to(secret)
    assert process.last_output(str(room)) == ""
    child = spawn(room, "true")
    os.waitpid(child.pid, 0)
    assert secret.read_text() == "secret"
    assert not log.is_symlink()
    log.unlink()
    os.mkfifo(log)
    assert process.last_output(str(room)) == ""
    assert process.last_output(str(room / "nowhere")) == ""


def test_a_missing_program_is_named(room: Path) -> None:
    with pytest.raises(HostLacks, match="qemu-system-nowhere"):
        spawn(room, "qemu-system-nowhere")


@pytest.mark.skipif(not ROOT, reason="changing users needs root")
async def test_another_user_without_any_right(room: Path) -> None:
    child = spawn(room, "sleep", "600", uid=1_900_000_001)
    try:
        await owned(child, 1_900_000_001)
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
        assert set(fields["Uid"].split()) == {"1900000001"}
        assert process.start_time(child.pid) == child.started
    finally:
        await process.kill(child, GONE)


@pytest.mark.skipif(cgroup.root() is None, reason="no writable cgroup v2 hierarchy here")
async def test_a_vm_has_a_control_group_of_its_own(room: Path) -> None:
    name = f"test-{os.getpid()}"
    child = spawn(room, "sleep", "600")
    try:
        path = cgroup.join(name, child.pid)
        assert path is not None
        assert Path(path, "cgroup.procs").read_text().split() == [str(child.pid)]
        cgroup.remove(name)
        assert os.path.isdir(path)  # not empty: stays
    finally:
        await process.kill(child, GONE)
    cgroup.remove(name)
    assert not os.path.exists(path)
    cgroup.remove(name)


def test_a_host_without_control_groups_runs_vms_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_ROOTS", ("/nonexistent",))
    assert cgroup.join("vm", os.getpid()) is None
    cgroup.remove("vm")
