"""Guests that stand still for their storage go on by themselves, in time and not too early."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from hostler.host.pools import room
from hostler.host.pools.room import RoomKeeper
from hostler.model.disk import ImageFormat
from hostler.model.errors import TimedOut
from hostler.model.machine import RunStatus
from hostler.model.pool import Usage
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import CriticalReason, VmState
from hostler.storage.pools import filesystem
from hostler.testing.inprocess import Node, Site

pytestmark = pytest.mark.unit


class Disk:
    """A file system of 100 MiB, as its users see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        self.looks = 0
        monkeypatch.setattr(filesystem, "usage", self._usage)

    def _usage(self, _directory: str) -> Usage:
        self.looks += 1
        return Usage(capacity=100 * MiB, free=self.free)


@pytest.fixture
async def node(site: Site, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Looks only when it is told to."""
    monkeypatch.setattr(RoomKeeper, "begin", lambda self: None)
    return await site.add("a")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def stopped(site: Site, node: Node, name: str = "vm", why: str = "nospace", image: str = "") -> str:
    """A VM whose guest QEMU has stopped."""
    add = DiskAdd(volume=site.image(image or f"{name}.img"), format=ImageFormat.RAW)
    record = await node.application.vms.create(VmCreate(name=name, disks=(add,)), "me")
    await node.finish(await node.application.vms.act(name, "start", "me"))
    await fail(site, node, record.id, why)
    return record.id


async def fail(site: Site, node: Node, vm_id: str, why: str) -> None:
    qemu = site.world.running[str(node.paths.vm_run(vm_id))]
    qemu.io_status["disk0"] = why
    qemu.stop(RunStatus.IO_ERROR)
    await node.application.host.actors[vm_id].settle()
    record = node.application.vms.get(vm_id)
    assert record.state is VmState.CRITICAL


def state(node: Node, vm: str) -> VmState:
    return node.application.vms.get(vm).state


async def test_it_goes_on_when_there_is_room(site: Site, node: Node, disk: Disk) -> None:
    await stopped(site, node)
    record = node.application.vms.get("vm")
    assert record.reason is CriticalReason.NO_SPACE and "goes on by itself" in record.reason_text
    for free in (0, 1 * MiB, 2 * MiB):
        disk.free = free
        await node.application.room.look()
        assert state(node, "vm") is VmState.CRITICAL, "a fiftieth must be free"
    disk.free = 2 * MiB + 1
    await node.application.room.look()
    assert state(node, "vm") is VmState.RUNNING
    [job] = [j for j in node.application.jobs.list() if j.kind == "vm.resume"]
    assert job.by == "hostlerd"


async def test_one_that_keeps_failing_waits_longer_and_longer(
    site: Site, node: Node, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm_id = await stopped(site, node)
    disk.free = 50 * MiB
    clock = [1000.0]
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock[0], raising=False)
    resumed = []
    for _ in range(800):
        await node.application.room.look()
        if state(node, vm_id) is VmState.RUNNING:
            resumed.append(clock[0])
            await fail(site, node, vm_id, "nospace")
        clock[0] += 1
    gaps = [late - early for early, late in itertools.pairwise(resumed)]
    assert gaps == [5, 10, 20, 40, 80, 160, 300][: len(gaps)] and len(gaps) >= 6


async def test_a_failing_disk_of_the_host_is_for_people(site: Site, node: Node, disk: Disk) -> None:
    await stopped(site, node, why="failed")
    disk.free = 50 * MiB
    await node.application.room.look()
    assert state(node, "vm") is VmState.CRITICAL


async def test_one_after_the_other_each_judged_by_what_is_left(site: Site, node: Node, disk: Disk) -> None:
    for name in ("b", "a", "c"):
        await stopped(site, node, name)
    disk.free = 50 * MiB
    looks = []
    real = filesystem.usage

    def usage(directory: str) -> Usage:
        looks.append(sorted(n for n in "abc" if state(node, n) is VmState.RUNNING))
        found = real(directory)
        disk.free -= 25 * MiB  # whoever goes on fills it
        return found

    filesystem.usage = usage
    try:
        await node.application.room.look()
    finally:
        filesystem.usage = real
    assert looks == [[], ["a"], ["a", "b"]]
    assert state(node, "c") is VmState.CRITICAL, "the first two have left too little for the third"


async def test_who_is_being_worked_on_or_was_paused_is_left_alone(site: Site, node: Node, disk: Disk) -> None:
    vm_id = await stopped(site, node)
    disk.free = 50 * MiB
    actor = node.application.host.actors[vm_id]
    await actor.hold("job", lambda record: None)
    await node.application.room.look()
    assert actor.record.state is VmState.CRITICAL
    await actor.let_go("job")
    node.faults.fail("io_failed", TimedOut("vm", "silence"))
    await node.application.room.look()
    assert actor.record.state is VmState.CRITICAL
    node.faults.clear()
    await node.application.room.look()
    assert actor.record.state is VmState.RUNNING
    await node.finish(await node.application.vms.act(vm_id, "pause", "me"))
    await node.application.room.look()
    assert actor.record.state is VmState.PAUSED


async def test_a_directory_that_hangs_delays_its_own_guests_only(
    site: Site, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LOOK", 0.1)
    far = site.directory / "far"
    far.mkdir()
    await stopped(site, node, "a", image="far/a.img")
    await stopped(site, node, "b")
    release = threading.Event()

    def usage(directory: str) -> Usage:
        if directory == str(far):
            release.wait(20)
        return Usage(capacity=100 * MiB, free=50 * MiB)

    monkeypatch.setattr(filesystem, "usage", usage)
    await node.application.room.look()
    assert (state(node, "a"), state(node, "b")) == (VmState.CRITICAL, VmState.RUNNING)
    release.set()
    for _ in range(100):
        await node.application.room.look()
        if state(node, "a") is VmState.RUNNING:
            break
        await asyncio.sleep(0.01)
    assert state(node, "a") is VmState.RUNNING
