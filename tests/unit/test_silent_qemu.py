"""A QEMU that does not answer, or answers too late, in the middle of an operation: nothing is given up that it may
still use, and nothing ends in a state from which no operation leads out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostler.model.disk import Disk, ImageFormat
from hostler.model.errors import InUse, NoSpace, TimedOut
from hostler.model.job import Job, JobState
from hostler.model.machine import RunStatus
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import CriticalReason, VmRecord, VmState
from hostler.testing.inprocess import Node, Site, until
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit

SILENT = TimedOut("QEMU", "it has not answered")


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


def raw(node: Node, name: str) -> DiskAdd:
    return DiskAdd(volume=node.site.image(name), format=ImageFormat.RAW)


async def act(node: Node, action: str) -> Job:
    return await node.finish(await node.application.vms.act("web", action, "test"))


async def running(node: Node) -> SimulatedQemu:
    request = VmCreate(name="web", memory=64 * MiB, disks=(raw(node, "a.img"),))
    await node.application.vms.create(request, "test")
    assert (await act(node, "start")).state is JobState.DONE
    return qemu(node)


def qemu(node: Node) -> SimulatedQemu:
    (found,) = node.site.world.running.values()
    return found


def vm(node: Node) -> VmRecord:
    return node.application.vms.get("web")


def saved_files(node: Node) -> list[str]:
    return sorted(p.name for p in node.paths.vm_state(vm(node).id).glob("saved*"))


# restore, start


async def saved(node: Node) -> None:
    await running(node)
    assert (await act(node, "save")).state is JobState.DONE


async def test_a_restored_guest_that_begins_late_runs_on(node: Node) -> None:
    """Its storage hangs while the disks are opened for writing: neither the guest nor its memory is thrown away."""
    await saved(node)
    hang = node.faults.hang("vm.restore/run:before")
    job = await node.application.vms.act("web", "restore", "test")
    await hang.reached.wait()
    node.faults.fail("run", SILENT)
    answers = node.faults.hang("status")  # the look before it runs
    hang.release.set()
    await answers.reached.wait()
    node.faults.fail("status", SILENT, times=2)
    answers.release.set()
    ended = await node.finish(job)
    assert (ended.state, vm(node).state, vm(node).saved) == (JobState.DONE, VmState.RUNNING, None)
    assert (qemu(node).status, saved_files(node)) == (RunStatus.RUNNING, [])


async def test_the_saved_state_is_kept_while_nobody_knows_whether_the_guest_ran(node: Node) -> None:
    await saved(node)
    node.faults.fail("run", SILENT)
    node.faults.fail("run", InUse("disk disk0", "is open in another program"))
    ended = await act(node, "restore")
    assert ended.error is not None and ended.error.code == TimedOut.code
    assert (vm(node).state, saved_files(node)) == (VmState.SAVED, ["saved.state"])
    node.faults.clear()
    assert (await act(node, "restore")).state is JobState.DONE


@pytest.mark.parametrize("status", [RunStatus.RUNNING, RunStatus.IO_ERROR, RunStatus.GUEST_PANICKED])
async def test_a_restored_guest_that_was_heard_of_late_is_restored(
    node: Node, monkeypatch: pytest.MonkeyPatch, status: RunStatus
) -> None:
    await saved(node)
    real = SimulatedQemu.run

    def run(self: SimulatedQemu) -> None:
        real(self)
        self.status = status
        raise SILENT

    monkeypatch.setattr(SimulatedQemu, "run", run)
    assert (await act(node, "restore")).state is JobState.DONE
    await node.quiet()
    assert (qemu(node).status, vm(node).saved, saved_files(node)) == (status, None, [])
    assert vm(node).state is (VmState.RUNNING if status is RunStatus.RUNNING else VmState.CRITICAL)


async def test_a_restored_guest_that_is_gone_leaves_no_saved_state(node: Node) -> None:
    await saved(node)
    node.faults.fail("run", SILENT)
    hang = node.faults.hang("vm.restore/run:before")
    job = await node.application.vms.act("web", "restore", "test")
    await hang.reached.wait()
    looks = node.faults.hang("status")
    hang.release.set()
    await looks.reached.wait()
    asked = node.faults.hang("status")
    looks.release.set()
    await asked.reached.wait()
    assert (vm(node).saved, saved_files(node)) == (None, ["saved.state"])
    qemu(node).die("")
    asked.release.set()
    assert (await node.finish(job)).state is JobState.FAILED
    await node.quiet()
    assert (vm(node).state, saved_files(node), node.site.world.running) == (VmState.OFF, [], {})


@pytest.mark.parametrize("action", ["start", "restore"])
async def test_a_guest_that_runs_is_not_killed_for_a_full_disk(node: Node, action: str) -> None:
    await saved(node)
    if action == "start":
        assert (await act(node, "discard-saved")).state is JobState.DONE
    hang = node.faults.hang("run")
    job = await node.application.vms.act("web", action, "test")
    await hang.reached.wait()
    begun = qemu(node)
    node.disk.fail("commit", NoSpace("the store", "the disk is full"), times=2)
    hang.release.set()
    ended = await node.finish(job)
    assert (ended.state, vm(node).state) == (JobState.DONE, VmState.RUNNING)
    assert begun.alive and begun.status is RunStatus.RUNNING


# disks


async def attach(node: Node) -> Job:
    job = await node.application.vms.attach_disk("web", raw(node, "b.img"), "test")
    assert isinstance(job, Job)
    return await node.finish(job)


async def test_a_claim_is_kept_for_a_qemu_that_may_still_open_the_image(node: Node) -> None:
    machine = await running(node)
    for method in ("attach_disk", "detach_disk", "attached_disks"):
        node.faults.fail(method, SILENT)
    ended = await attach(node)
    assert (ended.state, len(vm(node).config.disks)) == (JobState.FAILED, 1)
    assert len(await node.store.list("claim/")) == 2
    machine.guest_ends()
    await until(lambda: vm(node).state is VmState.OFF)
    await node.quiet()
    assert await node.store.list("claim/") == []


async def test_a_claim_is_kept_for_a_qemu_that_has_opened_the_image(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await running(node)
    real = SimulatedQemu.attach

    def attach_late(self: SimulatedQemu, disk: Disk, export: str | None) -> None:
        real(self, disk, export)
        raise SILENT

    monkeypatch.setattr(SimulatedQemu, "attach", attach_late)
    node.faults.fail("detach_disk", SILENT)
    assert (await attach(node)).state is JobState.FAILED
    assert "disk1" in machine.disks
    assert len(await node.store.list("claim/")) == 2


async def test_a_claim_is_given_back_when_qemu_has_let_go(node: Node) -> None:
    await running(node)
    node.faults.fail("attach_disk", SILENT)
    node.faults.fail("detach_disk", SILENT)
    assert (await attach(node)).state is JobState.FAILED
    assert len(await node.store.list("claim/")) == 1


# states


@pytest.mark.parametrize(("before", "action", "method"), [((), "pause", "stop"), (("pause",), "resume", "run")])
async def test_a_vm_whose_qemu_hangs_can_be_turned_off(
    node: Node, before: tuple[str, ...], action: str, method: str
) -> None:
    machine = await running(node)
    for step in before:
        assert (await act(node, step)).state is JobState.DONE
    await node.quiet()
    node.faults.fail(method, SILENT)
    node.faults.fail("status", SILENT)
    assert (await act(node, action)).state is JobState.FAILED
    assert (vm(node).state, vm(node).reason) == (VmState.CRITICAL, CriticalReason.INCONSISTENT)
    assert (await act(node, "turn-off")).state is JobState.DONE
    assert (vm(node).state, vm(node).reason, machine.alive) == (VmState.OFF, None, False)


async def test_a_vm_whose_qemu_hung_for_a_while_is_what_it_is(node: Node) -> None:
    machine = await running(node)
    await node.quiet()
    node.faults.fail("stop", SILENT)
    node.faults.fail("status", SILENT)
    assert (await act(node, "pause")).state is JobState.FAILED
    assert vm(node).state is VmState.CRITICAL
    machine.stop()
    await until(lambda: vm(node).state is VmState.PAUSED)
    assert vm(node).reason is None


async def test_a_running_vm_whose_qemu_is_slow_stays_running(node: Node) -> None:
    await running(node)
    await node.quiet()
    node.faults.fail("status", SILENT)
    await node.application.host.actor("web").settle()
    assert vm(node).state is VmState.RUNNING


# save


async def killed_while_it_saves(node: Node) -> tuple[SimulatedQemu, Path]:
    """The daemon is killed while QEMU writes, and QEMU goes on with that."""
    machine = await running(node)
    hang = node.faults.hang("vm.save/write:before")
    await node.application.vms.act("web", "save", "test")
    await hang.reached.wait()
    await node.application.host.actor("web").set(state=VmState.SAVING)
    await node.die()
    partial = Path(f"{node.paths.saved_state(machine.spec.config.id)}.partial")
    partial.write_text("half of it")
    machine.stop()
    machine.set_progress(status="active")
    return machine, partial


async def test_a_save_that_lost_its_daemon_is_given_up_before_the_guest_goes_on(node: Node) -> None:
    machine, partial = await killed_while_it_saves(node)
    await node.start()
    await until(lambda: machine.progress.status == "cancelling")
    assert machine.status is RunStatus.PAUSED
    looked = node.faults.calls.count("migration_state")
    await until(lambda: node.faults.calls.count("migration_state") > looked)
    assert machine.status is RunStatus.PAUSED
    machine.set_progress(status="cancelled")
    await node.quiet()
    assert (vm(node).state, machine.status) == (VmState.RUNNING, RunStatus.RUNNING)
    assert not partial.exists()


async def test_a_save_that_cannot_be_given_up_leaves_the_guest_stopped(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, partial = await killed_while_it_saves(node)
    monkeypatch.setattr("hostler.host.operations.save.LOOKS", 2)
    monkeypatch.setattr("hostler.host.operations.save.LOOK_AGAIN", 0)
    await node.start()
    await node.quiet()
    assert (vm(node).state, machine.status) == (VmState.PAUSED, RunStatus.PAUSED)
    assert not partial.exists()
    machine.set_progress(status="cancelled")
    assert (await act(node, "resume")).state is JobState.DONE
