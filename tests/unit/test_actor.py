"""One VM, one actor: two requests at once, requests and QEMU's events at once, and a store that does not answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import (
    Busy,
    GuestRefused,
    HostLacks,
    HostlerError,
    InUse,
    NoSpace,
    NotFound,
    QemuFailed,
    TimedOut,
    WrongState,
)
from hostler.model.job import Job, JobState
from hostler.model.machine import RunStatus
from hostler.model.requests import DiskAdd, MigrateRequest, ShutdownRequest, VmCreate
from hostler.model.units import GiB, MiB
from hostler.model.vm import CriticalReason, StopAction, VmRecord, VmState
from hostler.testing.inprocess import Node, Site, until
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


def raw(node: Node, name: str) -> DiskAdd:
    return DiskAdd(volume=node.site.image(name), format=ImageFormat.RAW)


async def create(node: Node, name: str = "web", **fields: Any) -> VmRecord:
    request = VmCreate.model_validate({"name": name, "memory": 64 * MiB, **fields})
    return await node.application.vms.create(request, "test")


async def act(node: Node, action: str, name: str = "web") -> Job:
    job = await node.application.vms.act(name, action, "test")
    ended = await node.finish(job)
    assert ended.state is JobState.DONE, ended.error
    return ended


def state(node: Node, name: str = "web") -> VmState:
    return node.application.vms.get(name).state


def qemu(node: Node) -> SimulatedQemu:
    (found,) = node.site.world.running.values()
    return found


async def running(node: Node, **fields: Any) -> SimulatedQemu:
    await create(node, **fields)
    await act(node, "start")
    return qemu(node)


async def claims(node: Node) -> int:
    return len(await node.store.list("claim/"))


# two at once


async def test_two_starts(node: Node) -> None:
    await create(node)
    vms = node.application.vms
    begun = await asyncio.gather(*(vms.act("web", "start", "test") for _ in range(3)), return_exceptions=True)
    jobs = [b for b in begun if isinstance(b, Job)]
    refused = [b for b in begun if isinstance(b, HostlerError)]
    assert (len(jobs), [type(e) for e in refused]) == (1, [Busy, Busy])
    assert {e.details["job"] for e in refused} == {jobs[0].id}
    assert (await node.finish(jobs[0])).state is JobState.DONE
    assert len(node.site.world.running) == 1


@pytest.mark.parametrize("first", ["start", "delete"])
async def test_start_and_delete(node: Node, first: str) -> None:
    await create(node, disks=[raw(node, "a.img")])
    vms = node.application.vms
    work = [vms.act("web", "start", "test"), vms.delete("web", "test")]
    done = await asyncio.gather(*(work if first == "start" else reversed(work)), return_exceptions=True)
    (failed,) = [d for d in done if isinstance(d, BaseException)]
    assert isinstance(failed, Busy | NotFound | WrongState)
    started = [d for d in done if isinstance(d, Job)]
    if started:
        assert (await node.finish(started[0])).state is JobState.DONE
        assert state(node) is VmState.RUNNING
    else:
        assert vms.list() == []
        assert await claims(node) == 0
        assert node.site.world.running == {}


async def test_one_volume_for_two_vms(node: Node) -> None:
    vms = node.application.vms
    for name in ("web", "db"):
        await create(node, name)
        await act(node, "start", name)
    jobs = await asyncio.gather(*(vms.attach_disk(name, raw(node, "a.img"), "test") for name in ("web", "db")))
    ended = [await node.finish(job) for job in jobs if isinstance(job, Job)]
    assert sorted(str(j.state) for j in ended) == ["done", "failed"]
    (winner,) = [j.target_name for j in ended if j.state is JobState.DONE]
    (loser,) = [j for j in ended if j.state is JobState.FAILED]
    assert loser.error is not None and loser.error.code == InUse.code
    assert winner in loser.error.cause
    assert [len(vms.get(n).config.disks) for n in (winner, loser.target_name)] == [1, 0]
    assert await claims(node) == 1


async def test_one_volume_in_two_vms_that_start(node: Node) -> None:
    vms = node.application.vms
    for name in ("web", "db"):
        await create(node, name, disks=[raw(node, "a.img")])
    jobs = await asyncio.gather(*(vms.act(name, "start", "test") for name in ("web", "db")))
    ended = [await node.finish(job) for job in jobs]
    assert sorted(str(j.state) for j in ended) == ["done", "failed"]
    assert len(node.site.world.running) == 1
    assert sorted(str(r.state) for r in vms.list()) == ["off", "running"]


async def test_two_vms_for_whose_memory_there_is_room_once(node: Node) -> None:
    for name in ("web", "db"):
        await create(node, name, memory=600 * GiB)
    jobs = [await node.application.vms.act(name, "start", "test") for name in ("web", "db")]
    ended = [await node.finish(job) for job in jobs]
    assert sorted(str(j.state) for j in ended) == ["done", "failed"]
    (loser,) = [j for j in ended if j.error is not None]
    assert loser.error is not None and loser.error.code == HostLacks.code


async def test_memory_is_promised_to_a_vm_on_its_way_here(site: Site) -> None:
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    await create(a, memory=600 * GiB)
    await act(a, "start")
    await create(b, "db", memory=600 * GiB)
    hang = a.faults.hang("vm.migrate/pre-copy:before")
    move = await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    await hang.reached.wait()
    refused = await b.finish(await b.application.vms.act("db", "start", "test"))
    assert refused.error is not None and refused.error.code == HostLacks.code
    hang.release.set()
    assert (await a.finish(move)).state is JobState.DONE
    refused = await b.finish(await b.application.vms.act("db", "start", "test"))
    assert refused.error is not None and refused.error.code == HostLacks.code


async def test_turn_off_while_a_shut_down_waits(node: Node) -> None:
    machine = await running(node)
    machine.obeys_power_button = False
    vms = node.application.vms
    waiting = await vms.shutdown("web", ShutdownRequest(timeout=3600), "test")
    await until(lambda: "power_down" in node.faults.calls)
    await act(node, "turn-off")
    assert (await node.finish(waiting)).state is JobState.CANCELLED
    assert (state(node), node.site.world.running) == (VmState.OFF, {})


async def test_turn_off_does_not_wait_for_what_cannot_be_cancelled(node: Node) -> None:
    await running(node)
    hang = node.faults.hang("vm.pause/stop:before")
    job = await node.application.vms.act("web", "pause", "test")
    await hang.reached.wait()
    with pytest.raises(Busy):
        await node.application.vms.act("web", "turn-off", "test")
    hang.release.set()
    await node.finish(job)
    await act(node, "turn-off")


@pytest.mark.parametrize("then", StopAction)
async def test_a_guest_that_does_not_shut_down(node: Node, then: StopAction) -> None:
    machine = await running(node)
    machine.obeys_power_button = False
    job = await node.application.vms.shutdown("web", ShutdownRequest(timeout=1, then=then), "test")
    ended = await node.finish(job)
    if then is StopAction.TURN_OFF:
        assert (ended.state, state(node)) == (JobState.DONE, VmState.OFF)
    else:
        assert ended.error is not None and ended.error.code == GuestRefused.code
        assert (state(node), machine.status) == (VmState.RUNNING, RunStatus.RUNNING)


# QEMU's events


async def test_a_guest_that_shuts_itself_down(node: Node) -> None:
    machine = await running(node, disks=[raw(node, "a.img")])
    machine.guest_ends()
    await until(lambda: state(node) is VmState.OFF)
    await node.quiet()
    record = node.application.vms.get("web")
    assert (record.reason, record.process, await claims(node)) == (None, None, 0)


async def test_a_qemu_that_dies_leaves_its_last_words(node: Node) -> None:
    machine = await running(node, disks=[raw(node, "a.img")])
    machine.die("qemu: assertion failed\n")
    await until(lambda: state(node) is VmState.OFF)
    await node.quiet()
    record = node.application.vms.get("web")
    assert record.reason is CriticalReason.QEMU_DIED
    assert "assertion failed" in record.reason_text
    assert await claims(node) == 0
    await act(node, "start")
    assert node.application.vms.get("web").reason is None


@pytest.mark.parametrize(
    ("status", "trouble", "reason"),
    [
        (RunStatus.IO_ERROR, {"disk0": "nospace"}, CriticalReason.NO_SPACE),
        (RunStatus.IO_ERROR, {"disk0": "failed"}, CriticalReason.IO_ERROR),
        (RunStatus.GUEST_PANICKED, {}, CriticalReason.GUEST_PANICKED),
    ],
)
async def test_a_guest_in_trouble(
    node: Node, status: RunStatus, trouble: dict[str, str], reason: CriticalReason
) -> None:
    machine = await running(node)
    machine.status = status
    machine.io_status.update(trouble)
    machine.emit("STOP")
    await until(lambda: state(node) is VmState.CRITICAL)
    assert node.application.vms.get("web").reason is reason
    machine.io_status.clear()
    await act(node, "resume")
    record = node.application.vms.get("web")
    assert (record.state, record.reason, record.reason_text) == (VmState.RUNNING, None, "")


async def test_a_guest_stopped_from_outside(node: Node) -> None:
    machine = await running(node)
    machine.stop()
    await until(lambda: state(node) is VmState.PAUSED)
    machine.run()
    await until(lambda: state(node) is VmState.RUNNING)


async def test_a_saved_state_that_cannot_be_run_on_is_kept(node: Node) -> None:
    """Somebody else has the disk open: the guest has certainly not run."""
    await running(node, disks=[raw(node, "a.img")])
    await act(node, "save")
    node.faults.fail("run", InUse("disk disk0", "is open in another program"))
    ended = await node.finish(await node.application.vms.act("web", "restore", "test"))
    assert ended.error is not None and ended.error.code == InUse.code
    assert (state(node), node.site.world.running) == (VmState.SAVED, {})
    await act(node, "restore")
    assert state(node) is VmState.RUNNING


@pytest.mark.parametrize("action", ["pause", "reset", "save"])
async def test_a_job_whose_qemu_is_gone_says_so(node: Node, action: str) -> None:
    machine = await running(node)
    step = {"pause": "stop", "reset": "reset", "save": "write"}[action]
    hang = node.faults.hang(f"vm.{action}/{step}:before")
    job = await node.application.vms.act("web", action, "test")
    await hang.reached.wait()
    machine.die("")
    actor = node.application.host.actor("web")
    await until(lambda: actor.machine is None)
    hang.release.set()
    ended = await node.finish(job)
    assert ended.error is not None and ended.error.code == QemuFailed.code
    assert state(node) is VmState.OFF


# a store that does not answer


async def test_a_write_that_was_done_but_not_told(node: Node) -> None:
    await create(node)
    actor = node.application.host.actor("web")
    node.disk.fail("committed", TimedOut("the store", "no answer"))
    record = await actor.set(state=VmState.STARTING)
    assert record.state is VmState.STARTING
    await actor.set(state=VmState.OFF)


async def test_a_write_that_was_not_done(node: Node) -> None:
    await create(node)
    actor = node.application.host.actor("web")
    for error in (TimedOut("the store", "no answer"), NoSpace("the store", "full")):
        node.disk.fail("commit", error)
        with pytest.raises(type(error)):
            await actor.set(state=VmState.STARTING)
        assert actor.record.state is VmState.OFF
    await actor.set(state=VmState.STARTING)


async def test_an_illegal_change_of_state_is_a_fault_and_not_done(node: Node) -> None:
    await create(node)
    actor = node.application.host.actor("web")
    with pytest.raises(AssertionError, match="off -> paused"):
        await actor.set(state=VmState.PAUSED)
    assert actor.record.state is VmState.OFF


async def test_a_deleted_vm_takes_nothing_more(node: Node) -> None:
    await create(node)
    actor = node.application.host.actor("web")
    await node.application.vms.delete("web", "test")
    with pytest.raises(NotFound, match="deleted"):
        await actor.hold("job", lambda record: None)
    await actor.change(lambda record: record.but(reason_text="x"))
    assert list(await node.store.list("vm/")) == []
