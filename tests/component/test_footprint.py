"""What a daemon with a hundred running VMs takes while nothing happens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hostler.model.requests import VmCreate
from hostler.model.units import MiB
from hostler.model.vm import VmState
from hostler.testing.inprocess import Node, Site

pytestmark = pytest.mark.component

VMS = 100
MEMORY = 150 * MiB
"""Issue 2: "the daemon with 100 idle VMs (simulated host) under 150 MB"."""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hf", dir="/tmp") as name:
        yield Path(name)


def test_memory_of_a_daemon_with_a_hundred_vms(directory: Path) -> None:
    command = [sys.executable, "-m", "hostler.testing.full_host", str(directory), str(VMS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.strip() == "idle" for line in process.stdout), "it ended before it was idle"
        taken = psutil.Process(process.pid).memory_info().rss
        process.communicate("")
    assert process.returncode == 0
    assert taken < MEMORY, f"{taken / MiB:.0f} MiB"


async def fill(node: Node, count: int) -> None:
    vms = node.application.vms
    for number in range(count):
        await vms.create(VmCreate(name=f"vm{number}", memory=64 * MiB), "test")
        await node.finish(await vms.act(f"vm{number}", "start", "test"))
    await node.quiet()
    assert [r.state for r in vms.list()] == [VmState.RUNNING] * count


def timers() -> int:
    """How many wake-ups the event loop has before it."""
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return sum(not handle.cancelled() for handle in scheduled)


async def settled() -> int:
    """The wake-ups of a daemon without VMs, once its own rounds (VMs, pools, room on full storage) have all begun."""
    await asyncio.sleep(0.5)
    return timers()


async def calm(most: int) -> None:
    """Returns when no more than `most` wake-ups are before the loop: the last looks after each job have been had."""
    for _ in range(1200):
        if timers() <= most:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{timers()} timers are set while nothing happens; an empty daemon has {most}")


async def test_an_idle_vm_costs_no_timer(directory: Path) -> None:
    """A daemon wakes up for its own reconciler, never for a VM to which nothing happens."""
    async with Site(directory) as site:
        node = await site.add("a")
        await fill(node, 0)
        empty = await settled()
        await fill(node, VMS)
        await calm(empty)
        await node.die()
        await node.start()  # adopted VMs cost none either
        await node.quiet()
        assert len(node.application.vms.list()) == VMS
        await calm(empty)


async def test_what_an_idle_daemon_does(directory: Path) -> None:
    """Nothing: no question to QEMU, no write to its store, while its reconciler goes round."""
    async with Site(directory) as site:
        node = await site.add("a")
        empty = await settled()
        await fill(node, 5)
        await calm(empty)
        node.faults.calls.clear()
        node.disk.calls.clear()
        await asyncio.sleep(0.5)
        assert node.faults.calls == []
        assert node.disk.calls == []
