"""The command line against two whole daemons, with simulated hypervisors: every layer between a typed word and a
machine is the real one, images are made by the real qemu-img."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import structlog

from hostler.cli.exit_codes import Exit
from hostler.cli.main import main
from hostler.daemon.compose import build
from hostler.daemon.config import parse_config
from hostler.testing.simulated import SimulatedHypervisor, World
from hostler.testing.vm_variants import FACTS

pytestmark = pytest.mark.component

PATIENCE = 60.0
MOVABLE = FACTS.but(migration_capabilities=("events", "late-block-activate", "multifd", "return-path"))
Hostler = Callable[..., str]


@contextmanager
def daemon(directory: Path, name: str, world: World) -> Iterator[Path]:
    """A daemon on a loop and in a thread of its own; yields its socket."""
    words = ["--state-dir", str(directory / name), "--listen", "127.0.0.1:0", "--name", name]
    config = parse_config(words, os.environ)
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        running = await build(config, SimulatedHypervisor(MOVABLE, world=world))
        try:
            loops.append(asyncio.get_running_loop())
            ready.set()
            await stop.wait()
        finally:
            await running.stop()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=run, name=name)
    thread.start()
    ready.wait(PATIENCE)
    try:
        assert loops, f"daemon {name} did not start"
        yield config.socket_path
    finally:
        for loop in loops:
            loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE)


@pytest.fixture
def hosts() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp") as made, ExitStack() as stack:
        world = World()
        Path(made).chmod(0o755)  # where the daemon is root, QEMU's own user must get at the images
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        stack.callback(structlog.reset_defaults)
        yield tuple(stack.enter_context(daemon(Path(made), name, world)) for name in ("alpha", "beta"))  # type: ignore[misc]


@pytest.fixture
def alpha(hosts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Hostler:
    return _on(hosts[0], capsys)


@pytest.fixture
def beta(hosts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Hostler:
    return _on(hosts[1], capsys)


def _on(socket: Path, capsys: pytest.CaptureFixture[str]) -> Hostler:
    def run(*words: str, code: int = Exit.OK) -> str:
        found = main(["--host", str(socket), *words])
        captured = capsys.readouterr()
        assert found == code, (words, found, captured)
        return captured.out if code == Exit.OK else captured.err

    return run


def state(host: Hostler, vm: str) -> str:
    return str(json.loads(host("vm", "show", vm, "--json"))["state"])


def test_the_life_of_a_vm(alpha: Hostler) -> None:
    alpha("vm", "create", "web1", "--new-disk", "64M", "--new-disk", "32M,format=vhdx", "--nic", "user")
    assert alpha("volume", "list", "-q") == "web1\nweb1-2\n"
    for word, then in (
        ("start", "running"),
        ("pause", "paused"),
        ("resume", "running"),
        ("save", "saved"),
        ("restore", "running"),
        ("reset", "running"),
    ):
        alpha("vm", word, "web1")
        assert state(alpha, "web1") == then
    assert "web1  running" in alpha("vm", "list")
    assert "is running" in alpha("vm", "start", "web1", code=Exit.REFUSED)
    alpha("vm", "turn-off", "web1")
    assert state(alpha, "web1") == "off"
    assert alpha("vm", "delete", "web1", "--disks", "--dry-run").count("would remove") == 2
    alpha("vm", "delete", "web1", "--disks")
    assert alpha("volume", "list", "-q") == ""


def test_disks_come_and_go_while_it_runs(alpha: Hostler) -> None:
    alpha("vm", "create", "web1", "--start")
    alpha("volume", "create", "data", "32M", "--format", "vhd")
    assert alpha("disk", "add", "web1", "--volume", "data") == "vm web1 has disk disk0\n"
    alpha("disk", "add", "web1", "--new", "16M", "--format", "raw")
    assert alpha("disk", "list", "web1", "-q") == "disk0\ndisk1\n"
    assert "data" in alpha("volume", "delete", "data", code=Exit.REFUSED)
    alpha("disk", "remove", "web1", "disk0")
    assert "removed /" in alpha("volume", "delete", "data")
    assert alpha("volume", "list", "-q") == "web1\n"


def test_changes_and_names(alpha: Hostler) -> None:
    alpha("vm", "create", "web1", "--start")
    alpha("vm", "rename", "web1", "web9")
    alpha("vm", "set", "web9", "--notes", "hello", "--autostart", "--autostart-order", "5")
    alpha("vm", "set", "web9", "--memory", "2G", code=Exit.REFUSED)
    alpha("vm", "set", "web9", "--memory", "2G", "--when-off")
    shown = alpha("vm", "show", "web9")
    assert "with the next start: memory 2 GiB" in shown
    assert "autostart  yes, order 5, then 0 s" in shown
    assert "did you mean 'web9'" in alpha("vm", "show", "web8", code=Exit.NOT_FOUND)
    alpha("vm", "create", "web9", code=Exit.REFUSED)
    alpha("vm", "create", "a/b", code=Exit.USAGE)


def test_what_fails_leaves_nothing(alpha: Hostler, tmp_path: Path) -> None:
    alpha("vm", "create", "web1", "--new-disk", "16M", "--disk", str(tmp_path / "none.qcow2"), code=Exit.NOT_FOUND)
    assert (alpha("vm", "list", "-q"), alpha("volume", "list", "-q")) == ("", "")
    damaged = tmp_path / "x.qcow2"
    damaged.write_bytes(b"QFI\xfb" + b"\xff" * 600)
    alpha("volume", "register", "x", str(damaged), code=Exit.FAILURE)
    alpha("volume", "import", "x", str(damaged), code=Exit.FAILURE)
    alpha("volume", "create", "big", "70T", code=Exit.REFUSED)
    assert alpha("volume", "list", "-q") == ""


def test_a_move_between_hosts_that_trust_each_other(alpha: Hostler, beta: Hostler) -> None:
    alpha("vm", "create", "web1", "--start")
    alpha("vm", "move", "web1", "beta", code=Exit.NOT_FOUND)
    beta("host", "join", alpha("host", "invite", "-q").strip())
    assert sorted(alpha("host", "list", "-q").split()) == ["alpha", "beta"]
    assert "possible" in alpha("vm", "move", "web1", "beta", "--dry-run")
    alpha("vm", "move", "web1", "beta")
    assert (alpha("vm", "list", "-q"), beta("vm", "list", "-q")) == ("", "web1\n")
    assert state(beta, "web1") == "running"
    beta("vm", "move", "web1", "alpha", "--quick")
    assert state(alpha, "web1") == "running"
    beta("host", "remove", "alpha")
    beta("vm", "list")


def test_the_host_tells_about_itself(alpha: Hostler) -> None:
    shown = alpha("host", "show")
    for label in ("accelerator", "because", "processors", "qemu", "memory"):
        assert f"\n{label}" in shown
    alpha("host", "limits")
    alpha("token", "create", "t")
    assert alpha("token", "list", "-q") == "t\n"
    assert "vm.start" not in alpha("job", "list")
