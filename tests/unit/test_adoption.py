"""What a daemon finds when it comes: VMs that run, that are gone, that say nothing; and what starts with the host."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from hostler.host import adoption
from hostler.host.resources import Resources
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import QemuFailed
from hostler.model.job import Job, JobState
from hostler.model.machine import RunStatus
from hostler.model.requests import DiskAdd, MigrateRequest, VmChange, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import Autostart, CriticalReason, VmConfig, VmRecord, VmState
from hostler.store.contract import Put, Transaction
from hostler.testing.inprocess import Node, Site, until
from hostler.testing.simulated import SimulatedHypervisor
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


async def create(node: Node, name: str = "web", **fields: Any) -> VmRecord:
    disk = DiskAdd(volume=node.site.image(f"{name}.img"), format=ImageFormat.RAW)
    request = VmCreate.model_validate({"name": name, "memory": 64 * MiB, "disks": (disk,), **fields})
    return await node.application.vms.create(request, "test")


async def act(node: Node, action: str, name: str = "web") -> Job:
    ended = await node.finish(await node.application.vms.act(name, action, "test"))
    assert ended.state is JobState.DONE, ended.error
    return ended


def get(node: Node, name: str = "web") -> VmRecord:
    return node.application.vms.get(name)


def qemu(node: Node) -> SimulatedQemu:
    (found,) = node.site.world.running.values()
    return found


async def restart(node: Node) -> None:
    await node.die()
    await node.start()


@pytest.mark.parametrize(
    ("actions", "state"),
    [
        ((), VmState.OFF),
        (("start",), VmState.RUNNING),
        (("start", "pause"), VmState.PAUSED),
        (("start", "save"), VmState.SAVED),
    ],
)
async def test_everything_is_as_it_was(node: Node, actions: tuple[str, ...], state: VmState) -> None:
    await create(node)
    jobs = [await act(node, action) for action in actions]
    before = get(node)
    await restart(node)
    assert get(node) == before
    assert before.state is state
    assert [j.id for j in node.application.jobs.list()] == [j.id for j in jobs]
    assert len(await node.store.list("claim/")) == (state is not VmState.OFF)


async def test_what_happened_to_the_guest_meanwhile_is_seen(node: Node) -> None:
    await create(node)
    await act(node, "start")
    machine = qemu(node)
    await node.die()
    machine.stop()
    await node.start()
    assert get(node).state is VmState.PAUSED
    await node.die()
    machine.status = RunStatus.GUEST_PANICKED
    await node.start()
    assert (get(node).state, get(node).reason) == (VmState.CRITICAL, CriticalReason.GUEST_PANICKED)


async def test_a_qemu_that_died_meanwhile(node: Node) -> None:
    await create(node)
    await act(node, "start")
    machine = qemu(node)
    await node.die()
    machine.die("its last words")
    await node.start()
    record = get(node)
    assert (record.state, record.reason) == (VmState.OFF, CriticalReason.QEMU_DIED)
    assert "its last words" in record.reason_text
    assert list(await node.store.list("claim/")) == []
    await act(node, "start")


async def test_what_a_broken_out_guest_left_does_not_keep_the_daemon_from_starting(node: Node) -> None:
    record = await create(node)
    for vm_id in (record.id, "of-nobody"):
        run_dir = node.application.host.paths.vm_run(vm_id)
        (run_dir / "x-0.nbd").mkdir(parents=True)
        for depth in range(1, 1_100):
            os.mkdir(f"{run_dir}/{'/'.join('d' * depth)}")
    await restart(node)
    assert not list((node.application.host.paths.run_dir / "vms").iterdir())


async def test_trouble_with_one_vm_does_not_keep_the_daemon_from_starting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("web", "mail"):
        record = await create(node, name)
        node.application.host.paths.vm_run(record.id).mkdir(parents=True)
    tried: list[str] = []

    async def release(resources: Resources, config: VmConfig) -> None:
        tried.append(config.name)
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Resources, "release", release)
    await restart(node)
    assert sorted(tried) == ["mail", "web"]
    assert get(node).state is VmState.OFF


async def test_a_log_that_cannot_be_read_does_not_keep_the_daemon_from_starting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def last_output(hypervisor: SimulatedHypervisor, run_dir: str) -> str:
        raise IsADirectoryError(run_dir)

    await create(node)
    await act(node, "start")
    machine = qemu(node)
    await node.die()
    machine.die("its last words")
    monkeypatch.setattr(SimulatedHypervisor, "last_output", last_output)
    await node.start()
    assert (get(node).state, get(node).reason) == (VmState.OFF, CriticalReason.QEMU_DIED)


async def silent(node: Node) -> None:
    """The daemon comes back, and QEMU is there but does not answer."""
    await node.die()
    node.faults.fail("adopt", QemuFailed("vm web", "no answer within 5 s"), times=10_000)
    await node.start()


async def test_a_qemu_that_says_nothing_is_critical_until_it_answers(node: Node) -> None:
    await create(node)
    await act(node, "start")
    await silent(node)
    record = get(node)
    assert (record.state, record.reason) == (VmState.CRITICAL, CriticalReason.INCONSISTENT)
    assert "no answer within 5 s" in record.reason_text
    await node.quiet()
    assert get(node).state is VmState.CRITICAL, "nobody may think that it is off"
    assert len(await node.store.list("claim/")) == 1
    node.faults.clear()
    await until(lambda: get(node).state is VmState.RUNNING)
    assert (get(node).reason, get(node).reason_text) == (None, "")


async def test_a_qemu_that_said_nothing_and_is_gone(node: Node) -> None:
    await create(node)
    await act(node, "start")
    await silent(node)
    qemu(node).die("late last words")
    node.faults.clear()
    await until(lambda: get(node).state is VmState.OFF)
    await node.quiet()
    assert "late last words" in get(node).reason_text
    assert list(await node.store.list("claim/")) == []


async def test_a_qemu_that_says_nothing_can_be_turned_off(node: Node) -> None:
    await create(node)
    await act(node, "start")
    await silent(node)
    await act(node, "turn-off")
    assert (get(node).state, node.site.world.running) == (VmState.OFF, {})
    node.faults.clear()
    await act(node, "start")
    assert get(node).state is VmState.RUNNING


async def test_a_job_of_a_vm_that_says_nothing_ends_when_it_answers(node: Node) -> None:
    await create(node)
    await act(node, "start")
    hang = node.faults.hang("vm.pause/stop:before")
    job = await node.application.vms.act("web", "pause", "test")
    await hang.reached.wait()
    await silent(node)
    assert node.application.jobs.get(job.id).state is JobState.RUNNING
    node.faults.clear()
    assert get(node).job == job.id
    await until(lambda: node.application.jobs.get(job.id).is_over)
    await node.quiet()
    assert get(node).state is VmState.PAUSED


async def test_what_a_dying_daemon_did_not_give_back(node: Node) -> None:
    """Recorded as off, but its claims and its run directory are still there."""
    record = await create(node)
    await act(node, "start")
    held = [Put(e.key, e.value) for e in await node.store.list("claim")]
    await act(node, "turn-off")
    await node.store.commit(Transaction(held))
    run_dir = node.paths.vm_run(record.id)
    run_dir.mkdir()
    await restart(node)
    assert list(await node.store.list("claim")) == []
    assert not run_dir.exists()


async def test_what_belongs_to_nobody_goes(node: Node) -> None:
    record = await create(node)
    await act(node, "start")
    path = node.site.image("stray.img")
    await node.application.host.claims.claim("nobody", [Disk(id="disk0", source=DiskSource(path=path))], 1)
    stray = node.paths.run_dir / "vms" / "00000000-0000-0000-0000-000000000000"
    stray.mkdir()
    await restart(node)
    assert not stray.exists()
    assert node.paths.vm_run(record.id).exists()
    assert [e.key for e in await node.store.list("claim-of/")] == [f"claim-of/{record.id}"]
    assert len(await node.store.list("claim/")) == 1


async def test_a_job_of_an_unknown_kind_is_ended(node: Node) -> None:
    """A newer daemon left it; this one cannot go on with it, and must not hold the VM for ever."""
    record = await create(node)
    hang = node.faults.hang("vm.start/reserve:before")
    job = await node.application.vms.act("web", "start", "test")
    await hang.reached.wait()
    entry = await node.store.get(f"job/{job.id}")
    assert entry is not None
    await node.store.commit(Transaction([Put(entry.key, entry.value | {"kind": "vm.teleport"})]))
    await restart(node)
    await node.quiet()
    assert node.application.jobs.get(job.id).state is JobState.FAILED
    assert get(node).job is None
    assert record.id == get(node).id
    await act(node, "start")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_job_that_had_given_its_vm_back_only_lacks_its_last_word(node: Node, fails: bool) -> None:
    await create(node)
    if fails:
        node.faults.fail("launch", QemuFailed("vm web", "no"))
    hang = node.faults.hang("vm.start/launch:before" if fails else "vm.start/run:after")
    job = await node.application.vms.act("web", "start", "test")
    await hang.reached.wait()
    actor = node.application.host.actor("web")
    told: list[VmRecord] = []
    publish = node.application.events.publish

    def notice(kind: str, key: str, value: Any) -> None:
        publish(kind, key, value)
        if kind == "vm" and value.job is None:
            told.append(value)
            node.disk.hang("commit")

    node.application.events.publish = notice  # type: ignore[method-assign]
    hang.release.set()
    await until(lambda: bool(told))
    assert actor.record.job is None
    await restart(node)
    await node.quiet()
    ended = node.application.jobs.get(job.id)
    assert ended.state is (JobState.FAILED if fails else JobState.DONE)
    assert get(node).state is (VmState.OFF if fails else VmState.RUNNING)


async def test_who_is_cancelled_while_it_begins_holds_nothing(node: Node) -> None:
    await create(node)
    hang = node.disk.hang("commit")
    begin = asyncio.create_task(node.application.vms.act("web", "start", "test"))
    await hang.reached.wait()
    begin.cancel()
    await asyncio.sleep(0)
    hang.release.set()
    with pytest.raises(asyncio.CancelledError):
        await begin
    assert get(node).job is None
    await act(node, "start")


async def test_who_moved_away_is_still_known_by_name(site: Site) -> None:
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    await create(a)
    await act(a, "start")
    moved = await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    assert (await a.finish(moved)).state is JobState.DONE
    await restart(a)
    with pytest.raises(Exception, match="moved to host b"):
        a.application.vms.get("web")
    await restart(b)
    assert get(b).state is VmState.RUNNING
    await until(lambda: not b.application.incoming._guests)
    assert list(await b.store.list("incoming/")) == [], "the move is forgotten on both sides"


# autostart


async def boot(node: Node, number: int) -> None:
    """The host is switched off and on: nothing runs any more, and the boot id is another."""
    await node.die()
    for machine in list(node.site.world.running.values()):
        machine.die("the host was switched off")
    node.boot_id = f"boot {number}"
    await node.start()


def order(node: Node) -> list[str]:
    kinds = ("vm.start", "vm.restore")
    return [j.target_name for j in node.application.jobs.list() if j.by == "autostart" and j.kind in kinds]


async def autostarted(node: Node) -> None:
    task = node.application._autostart
    assert task is not None
    await asyncio.wait_for(asyncio.shield(task), 60)


async def test_vms_start_with_the_host_in_order(node: Node) -> None:
    for name, wish in {"c": 1, "b": 2, "a": 2, "late": 9}.items():
        await create(node, name, autostart=Autostart(enabled=True, order=wish))
    await create(node, "not")
    await act(node, "start", "c")
    await act(node, "save", "c")
    await act(node, "start", "not")
    await boot(node, 2)
    await autostarted(node)
    assert order(node) == ["c", "a", "b", "late"]
    assert {r.name: r.state for r in node.application.vms.list() if r.name != "not"} == dict.fromkeys(
        ("a", "b", "c", "late"), VmState.RUNNING
    )
    assert get(node, "not").state is VmState.OFF


async def test_a_restarted_daemon_starts_nothing_again(node: Node) -> None:
    await create(node, autostart=Autostart(enabled=True))
    await boot(node, 2)
    await autostarted(node)
    await act(node, "turn-off")
    await restart(node)
    await autostarted(node)
    assert (get(node).state, order(node)) == (VmState.OFF, ["web"])


async def test_a_vm_that_cannot_start_does_not_keep_the_others(node: Node) -> None:
    for number, name in enumerate(("first", "second")):
        await create(node, name, autostart=Autostart(enabled=True, order=number))
    (node.site.directory / "first.img").unlink()
    await boot(node, 2)
    await autostarted(node)
    assert [get(node, n).state for n in ("first", "second")] == [VmState.OFF, VmState.RUNNING]


async def test_the_delay_comes_after_a_start(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[float, list[str]]] = []
    really = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds < 77:
            await really(seconds)
            return
        waited.append((seconds, [r.name for r in node.application.vms.list() if r.state is VmState.RUNNING]))

    for number, name in enumerate(("first", "second")):
        await create(node, name, autostart=Autostart(enabled=True, order=number, delay=77 + number))
    monkeypatch.setattr(adoption.asyncio, "sleep", sleep)
    await adoption.autostart(node.application.host, node.application._start_vm, "another boot")
    assert waited == [(77, ["first"]), (78, ["first", "second"])]


async def test_killed_between_two_starts_it_goes_on_with_the_rest(node: Node) -> None:
    for number, name in enumerate(("first", "second")):
        await create(node, name, autostart=Autostart(enabled=True, order=number, delay=3600))
    await boot(node, 2)
    await until(lambda: get(node, "first").state is VmState.RUNNING)
    await node.quiet()
    await act(node, "turn-off", "first")
    await node.application.vms.change("second", VmChange(autostart=Autostart(enabled=True)), "test")
    await restart(node)
    await autostarted(node)
    assert order(node) == ["first", "second"]
    assert get(node, "first").state is VmState.OFF
