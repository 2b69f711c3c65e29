"""The composed daemon: the real application behind the real API, with simulated VMs where VMs matter, and as a process
of its own where starting, stopping and dying matter."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostler.client import calls
from hostler.client.async_client import AsyncClient
from hostler.client.target import Target
from hostler.cluster.check import NEEDED
from hostler.daemon.compose import Daemon, build
from hostler.daemon.config import Config, parse_config
from hostler.model.errors import HostLacks, HostlerError, InUse, NotPermitted, PeerUnreachable
from hostler.model.host import HostState
from hostler.model.job import JobState
from hostler.model.principal import Role
from hostler.model.requests import JoinRequest, MigrateRequest, TokenCreate, VmCreate
from hostler.model.vm import VmState
from hostler.testing.simulated import SimulatedHypervisor, World
from hostler.testing.vm_variants import FACTS

pytestmark = pytest.mark.component

ABLE = FACTS.but(migration_capabilities=tuple(sorted(NEEDED)))
"""A simulated QEMU that can migrate."""

PATIENCE = 60.0
"""Seconds for anything that must happen; a loaded machine is slow."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for unix sockets have at most 107 bytes of path."""
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp") as made:
        yield Path(made)


def configure(directory: Path, name: str, *more: str) -> Config:
    state = f"--state-dir={directory / name}"
    return parse_config([state, f"--name={name}", "--listen=127.0.0.1:0", *more], {"HOME": str(directory)})


@asynccontextmanager
async def daemon(directory: Path, name: str, world: World | None = None) -> AsyncIterator[tuple[Daemon, AsyncClient]]:
    built = await build(configure(directory, name), SimulatedHypervisor(ABLE, world=world or World()))
    try:
        async with AsyncClient(Target(socket=str(built.socket_path)), deadline=PATIENCE) as client:
            yield built, client
    finally:
        await built.stop()


async def test_a_vm_lives_its_life_through_the_api(directory: Path) -> None:
    async with daemon(directory, "a") as (_, client):
        made = await client.send(calls.vm_create(VmCreate(name="web1")))
        assert made.state is VmState.OFF
        job = await client.send(calls.vm_act("web1", "start", wait=PATIENCE))
        assert job.state is JobState.DONE, job.error
        assert (await client.send(calls.vm("web1"))).state is VmState.RUNNING
        view = await client.send(calls.this_host())
        assert (view.name, view.running_vms, view.this) == ("a", 1, True)


async def test_a_running_vm_is_there_again_after_a_stop_and_a_start_of_the_daemon(directory: Path) -> None:
    world = World()
    async with daemon(directory, "a", world) as (first, client):
        await client.send(calls.vm_create(VmCreate(name="web1")))
        assert (await client.send(calls.vm_act("web1", "start", wait=PATIENCE))).state is JobState.DONE
        before = await client.send(calls.vm("web1"))
    assert not first.socket_path.exists()
    async with daemon(directory, "a", world) as (second, client):
        after = await client.send(calls.vm("web1"))
        assert (after.state, after.process) == (VmState.RUNNING, before.process)
        assert second.host_id == first.host_id


async def join(inviter: AsyncClient, joiner: AsyncClient) -> None:
    invitation = await inviter.send(calls.host_invite())
    await joiner.send(calls.host_join(JoinRequest(invitation=invitation.token)))


async def test_two_daemons_come_to_trust_each_other_and_move_a_vm(directory: Path) -> None:
    world = World()
    async with daemon(directory, "a", world) as (_, one), daemon(directory, "b", world) as (_, two):
        await join(one, two)
        for client, expected in ((one, ["a", "b"]), (two, ["b", "a"])):
            hosts = await client.send(calls.hosts())
            assert [(h.name, h.state) for h in hosts] == [(name, HostState.UP) for name in expected]
        await one.send(calls.vm_create(VmCreate(name="web1")))
        await one.send(calls.vm_act("web1", "start", wait=PATIENCE))
        job = await one.send(calls.vm_migrate("web1", MigrateRequest(host="b"), wait=PATIENCE))
        assert job.state is JobState.DONE, job.error
        assert (await two.send(calls.vm("web1"))).state is VmState.RUNNING
        assert await one.send(calls.vms()) == []


async def test_an_invitation_is_good_once_and_a_removed_host_is_out(directory: Path) -> None:
    async with (
        daemon(directory, "a") as (a, one),
        daemon(directory, "b") as (_, two),
        daemon(directory, "c") as (_, three),
    ):
        invitation = await one.send(calls.host_invite())
        await two.send(calls.host_join(JoinRequest(invitation=invitation.token)))
        with pytest.raises(HostlerError) as caught:
            await three.send(calls.host_join(JoinRequest(invitation=invitation.token)))
        assert "used already" in caught.value.cause
        assert [h.name for h in await three.send(calls.hosts())] == ["c"]
        await one.send(calls.host_remove("b"))
        (_, left) = await two.send(calls.hosts())
        assert (left.name, left.state) == ("a", HostState.UNREACHABLE)
        assert a.identity.trust.peer_of(b"") is None


async def test_tokens_made_through_the_api_work_over_https(directory: Path) -> None:
    async with daemon(directory, "a") as (a, client):
        made = await client.send(calls.token_create(TokenCreate(name="t", role=Role.VIEWER)))
        target = Target(
            url=f"https://{a.https_address}", token=made.secret, fingerprint=a.identity.trust.identity.fingerprint
        )
        async with AsyncClient(target, deadline=PATIENCE) as remote:
            assert await remote.send(calls.vms()) == []
            with pytest.raises(NotPermitted):
                await remote.send(calls.vm_create(VmCreate(name="web1")))
        lines = [json.loads(line) for line in (a.config.state_dir / "audit.jsonl").read_text().splitlines()]
        assert [(e["who"], e["outcome"]) for e in lines][-1] == ("token t", "not-permitted")
        assert made.secret.split("_", 2)[2] not in json.dumps(lines)


async def test_a_second_daemon_is_kept_out_of_each_directory_and_leaves_nothing(directory: Path) -> None:
    async with daemon(directory, "a") as (a, client):
        for other in (
            configure(directory, "a"),
            configure(directory, "a", f"--run-dir={directory / 'r2'}"),
            configure(directory, "s2", f"--run-dir={a.config.run_dir}"),
            configure(directory, "s3", f"--listen={a.https_address}"),
        ):
            with pytest.raises(InUse) as caught:
                await build(other, SimulatedHypervisor(world=World()))
            assert caught.value.advice
            if other.run_dir != a.config.run_dir:
                assert not other.socket_path.exists()
        assert (await client.send(calls.this_host())).name == "a"  # the first one is not disturbed


async def test_a_qemu_that_is_not_there_is_told_with_advice(directory: Path) -> None:
    config = configure(directory, "a", "--accelerator=tcg", "--qemu=qemu-system-nothing")
    with pytest.raises(HostLacks) as caught:
        await build(config)
    assert "install" in caught.value.advice
    assert not config.socket_path.exists()


class Process:
    """`hostlerd` as a process."""

    def __init__(self, directory: Path, *more: str, **env: str) -> None:
        self.directory = directory
        arguments = [f"--state-dir={directory / 's'}", "--listen=127.0.0.1:0", "--accelerator=tcg", *more]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "hostler.daemon.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def ready(self) -> str:
        """The line it prints when it answers."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit status and what it wrote on standard error."""
        self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, errors

    def failed(self) -> tuple[int, str]:
        """Exit status and standard error of one that ends by itself."""
        _, errors = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, errors


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Those a test starts; ended with it."""
    started: list[Process] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.popen.kill()
        process.popen.communicate()


needs_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")


@needs_qemu
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_stops_in_order(
    directory: Path, processes: list[Process], number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(PATIENCE)
        processes.append(Process(directory, NOTIFY_SOCKET=str(directory / "notify")))
        line = processes[0].ready()
        assert line.startswith(f"hostlerd ready: unix:{directory}/s/run/api.sock; https://127.0.0.1:")
        assert manager.recv(100) == b"READY=1"
        status, errors = processes[0].end(number)
        assert (status, manager.recv(100)) == (0, b"STOPPING=1")
    assert [json.loads(entry)["event"] for entry in errors.splitlines()][-1] == "daemon.stop"
    assert not (directory / "s/run/api.sock").exists()


@needs_qemu
def test_after_a_kill_the_next_one_starts_on_what_is_left(directory: Path, processes: list[Process]) -> None:
    processes.append(Process(directory))
    assert "ready" in processes[0].ready()
    assert processes[0].end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert (directory / "s/run/api.sock").exists()
    processes.append(Process(directory))
    assert "ready" in processes[1].ready()
    assert processes[1].end(signal.SIGTERM)[0] == 0


@needs_qemu
def test_what_keeps_it_from_starting_is_one_clear_line_with_advice(directory: Path, processes: list[Process]) -> None:
    processes.append(Process(directory))
    assert "ready" in processes[0].ready()
    processes.append(Process(directory))
    status, errors = processes[1].failed()
    assert status == 1
    assert "another hostlerd runs there" in errors
    assert "--run-dir" in errors
    assert "Traceback" not in errors
    processes.append(Process(directory, "--listen=nonsense"))
    status, errors = processes[2].failed()
    assert (status, errors) == (
        2,
        "hostlerd: address 'nonsense': is not HOST:PORT\n  write for example 0.0.0.0:8690\n",
    )


def test_a_stop_in_the_middle_of_starting_leaves_nothing(directory: Path, processes: list[Process]) -> None:
    slow = directory / "slow-qemu"
    slow.write_text(f"#!/bin/sh\necho $$ > {directory}/pid\nexec sleep 600\n")
    slow.chmod(0o755)
    processes.append(Process(directory, f"--qemu={slow}"))
    deadline = time.monotonic() + PATIENCE
    while not (directory / "pid").exists() or not (directory / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    status, errors = processes[0].end(signal.SIGTERM)
    assert (status, "Traceback" in errors) == (0, False)
    assert not (directory / "s/run/api.sock").exists()
    pid = int((directory / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@needs_qemu
def test_a_client_that_waits_does_not_hold_up_the_stop(directory: Path, processes: list[Process]) -> None:
    processes.append(Process(directory))
    processes[0].ready()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(directory / "s/run/api.sock"))
        client.sendall(b"GET /v1/events HTTP/1.1\r\nHost: h\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        status, errors = processes[0].end(signal.SIGTERM)
        assert status == 0
        assert "Traceback" not in errors
        assert "late" not in errors


async def test_a_host_that_cannot_be_reached_does_not_hold_up_the_list(directory: Path) -> None:
    async with daemon(directory, "a") as (_, one):
        async with daemon(directory, "b") as (_, two):
            await join(one, two)
        async with asyncio.timeout(PATIENCE):
            hosts = await one.send(calls.hosts())
        assert [(h.name, h.state) for h in hosts] == [("a", HostState.UP), ("b", HostState.UNREACHABLE)]
        with pytest.raises(PeerUnreachable):
            await one.send(calls.host_join(JoinRequest(invitation=_invitation_to_nobody())))


def _invitation_to_nobody() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = {"address": f"127.0.0.1:{port}", "fingerprint": "ab" * 32, "secret": "x" * 43}
    return base64.urlsafe_b64encode(json.dumps(text).encode()).decode()
