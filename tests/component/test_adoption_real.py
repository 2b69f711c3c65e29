"""A daemon that is killed and started again, with real QEMUs: nothing of a guest is lost, and what was under way when
it was killed is finished or undone."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostler.client.client import Client
from hostler.model.job import Job, JobState
from hostler.model.requests import DiskAdd, VmChange, VmCreate, VolumeCreate
from hostler.model.units import MiB
from hostler.model.vm import Autostart, CriticalReason, VmRecord, VmState
from hostler.store.contract import Put, Transaction
from hostler.store.sqlite import SqliteStore
from hostler.testing.bench_vm import Bench
from hostler.testing.lab import Lab, LabHost

pytestmark = pytest.mark.component

PATIENCE = 60.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="ha", dir="/tmp") as name:
        Path(name).chmod(0o755)
        with Lab(Path(name), isolated=False) as made:
            made.add_host("a")
            yield made


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    return lab.hosts[0]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def restart(host: LabHost) -> None:
    host.kill()
    host.failpoints.clear()
    host.start()


def get(host: LabHost, name: str) -> VmRecord:
    with host.client() as client:
        return client.vms.get(name)


def act(host: LabHost, name: str, action: str) -> None:
    with host.client() as client:
        client.jobs.finish(client.vms.act(name, action, wait=PATIENCE))


# a guest


@pytest.fixture(scope="module")
def made(lab: Lab) -> Bench:
    bench = Bench(lab, lab.directory, memory=96 * MiB)
    bench.create(lab.hosts[0])
    return bench


@pytest.fixture
def guest(made: Bench, host: LabHost) -> Bench:
    """It runs, and nothing of the test before is left."""
    if get(host, "guest").state is VmState.OFF:
        made.start(host)
    made.check(host)
    return made


def test_a_running_guest_goes_on_and_keeps_its_new_disk(guest: Bench, host: LabHost) -> None:
    with host.client() as client:
        client.jobs.finish(client.volumes.create(VolumeCreate(name="extra", size=4 * MiB), wait=PATIENCE))
        added = client.jobs.finish(client.vms.attach_disk("guest", DiskAdd(volume="extra"), wait=PATIENCE))
    before = get(host, "guest")
    serial = before.config.disks[1].serial
    seen = guest.ask(host, lambda g: g.wait_disk(serial))
    restart(host)
    assert get(host, "guest") == before
    guest.check(host)
    guest.ask(host, lambda g: g.write(serial, 1, 1 * MiB))
    with host.client() as client:
        kept = client.jobs.get(added.id)
        assert (kept.state, kept.kind) == (JobState.DONE, "disk.attach")
        client.jobs.finish(client.vms.detach_disk("guest", "disk1", wait=PATIENCE))
        guest.ask(host, lambda g: g.wait_disk_gone(seen.name))
        client.volumes.delete("extra")
    guest.check(host)


def test_a_paused_guest_stays_paused(guest: Bench, host: LabHost) -> None:
    act(host, "guest", "pause")
    restart(host)
    assert get(host, "guest").state is VmState.PAUSED
    act(host, "guest", "resume")
    guest.check(host)


def test_a_saved_guest_is_restored(guest: Bench, host: LabHost) -> None:
    act(host, "guest", "save")
    assert host.qemus() == []
    restart(host)
    assert get(host, "guest").state is VmState.SAVED
    act(host, "guest", "restore")
    guest.check(host)


def test_a_qemu_that_ended_meanwhile_is_off_with_its_last_words(guest: Bench, host: LabHost) -> None:
    (qemu,) = host.qemus()
    host.kill()
    qemu.terminate()
    until(lambda: not qemu.is_running())
    host.start()
    record = get(host, "guest")
    assert (record.state, record.reason, record.process) == (VmState.OFF, CriticalReason.QEMU_DIED, None)
    assert "terminating on signal 15" in record.reason_text
    assert host.processes() == []


def test_a_qemu_that_stands_still_is_critical_until_it_goes_on(guest: Bench, host: LabHost) -> None:
    (qemu,) = host.qemus()
    host.kill()
    qemu.suspend()
    try:
        host.start()
        record = get(host, "guest")
        assert (record.state, record.reason) == (VmState.CRITICAL, CriticalReason.INCONSISTENT)
    finally:
        os.kill(qemu.pid, signal.SIGCONT)
    until(lambda: get(host, "guest").state is VmState.RUNNING)
    guest.check(host)


@pytest.mark.parametrize("action", ["save", "pause"])
def test_killed_somewhere_in_the_middle(guest: Bench, host: LabHost, action: str) -> None:
    """Wherever it was: the guest runs, stands still or is saved, and is the same afterwards."""
    with host.client() as client:
        client.vms.act("guest", action)
    restart(host)
    all_over(host)
    record = get(host, "guest")
    assert record.state in (VmState.RUNNING, VmState.PAUSED, VmState.SAVED)
    assert len(host.qemus()) == (record.state is not VmState.SAVED)
    if record.state is not VmState.RUNNING:
        act(host, "guest", "resume" if record.state is VmState.PAUSED else "restore")
    guest.check(host)


# a machine without a guest, killed at every step


@pytest.fixture(scope="module")
def box(host: LabHost) -> str:
    """A machine whose firmware finds nothing to boot."""
    with host.client() as client:
        for name in ("box", "more"):
            client.jobs.finish(client.volumes.create(VolumeCreate(name=name, size=4 * MiB), wait=PATIENCE))
        client.vms.create(VmCreate(name="box", memory=32 * MiB, disks=(DiskAdd(volume="box"),)))
    return "box"


def all_over(host: LabHost) -> list[Job]:
    with host.client() as client:
        return [client.jobs.get(job.id, wait=PATIENCE) for job in client.jobs.list() if not job.is_over]


def bring(host: LabHost, state: VmState, disks: int) -> None:
    """The machine in that state, with one disk or two."""
    ways = {VmState.OFF: "start", VmState.SAVED: "restore", VmState.RUNNING: "save"}
    while (now := get(host, "box").state) is not state:
        act(host, "box", "turn-off" if state is VmState.OFF else ways[now])
    with host.client() as client:
        if len(client.vms.get("box").config.disks) < disks:
            client.jobs.finish(client.vms.attach_disk("box", DiskAdd(volume="more"), wait=PATIENCE))
        elif len(client.vms.get("box").config.disks) > disks:
            client.jobs.finish(client.vms.detach_disk("box", "disk1", wait=PATIENCE))


Begin = Callable[[Client], Job]
KINDS: dict[str, tuple[VmState, int, Begin, tuple[str, ...]]] = {
    "vm.start": (VmState.OFF, 1, lambda c: c.vms.start("box"), ("reserve", "prepare", "launch", "run")),
    "vm.save": (VmState.RUNNING, 1, lambda c: c.vms.act("box", "save"), ("write", "end")),
    "vm.restore": (
        VmState.SAVED,
        1,
        lambda c: c.vms.act("box", "restore"),
        ("reserve", "prepare", "launch", "load", "run"),
    ),
    "disk.attach": (
        VmState.RUNNING,
        1,
        lambda c: c.vms.attach_disk("box", DiskAdd(volume="more")),
        ("take", "plug", "record"),
    ),
    "disk.detach": (VmState.RUNNING, 2, lambda c: c.vms.detach_disk("box", "disk1"), ("unplug", "record")),
}
"""Where it begins, how many disks it has there, how it is begun, its steps."""
PLACES = [(k, step, "before") for k, v in KINDS.items() for step in v[3]] + [
    (k, v[3][-1], "after") for k, v in KINDS.items()
]
"""Between two steps is before the second; the unit tests tell apart what the real QEMU does not."""


@pytest.mark.parametrize(("kind", "step", "edge"), PLACES)
def test_killed_at_every_step(host: LabHost, box: str, kind: str, step: str, edge: str) -> None:
    state, disks, begin, _ = KINDS[kind]
    bring(host, state, disks)
    host.failpoints.arm(f"{kind}/{step}", edge)
    with host.client() as client:
        job = begin(client)
    host.failpoints.wait_reached(f"{kind}/{step}", edge)
    restart(host)
    all_over(host)
    record = get(host, box)
    with host.client() as client:
        ended = client.jobs.get(job.id)
    _judge(host, record, kind, done=ended.state is JobState.DONE)


def _judge(host: LabHost, record: VmRecord, kind: str, done: bool) -> None:
    """As it was, or as it was to be: never in between."""
    begun_in, disks, _, _ = KINDS[kind]
    done_in = {"vm.save": VmState.SAVED}.get(kind, VmState.RUNNING)
    assert record.state is (done_in if done else begun_in), record
    change = {"disk.attach": 1, "disk.detach": -1}.get(kind, 0) if done else 0
    assert len(record.config.disks) == disks + change
    mine = [p for p in host.qemus() if record.id in " ".join(p.cmdline())]
    assert len(mine) == (record.state is VmState.RUNNING)
    run_dir, saved = host.run_dir / "vms" / record.id, host.state_dir / "vms" / record.id / "saved.state"
    assert run_dir.exists() == (record.state is VmState.RUNNING)
    assert saved.exists() == (record.state is VmState.SAVED)
    assert record.job is None and record.reason is None


# autostart


def test_vms_start_with_the_host(host: LabHost) -> None:
    with host.client() as client:
        for name, order in (("second", 2), ("first", 1)):
            client.vms.create(VmCreate(name=name, memory=32 * MiB, autostart=Autostart(enabled=True, order=order)))
        client.vms.change("first", VmChange(autostart=Autostart(enabled=True, order=1, delay=1)))
    host.stop()
    asyncio.run(_another_boot(host))
    host.start()
    until(lambda: get(host, "second").state is VmState.RUNNING)
    with host.client() as client:
        first, second = [j for j in client.jobs.list() if j.by == "autostart"]
        assert (first.target_name, second.target_name) == ("first", "second")
        assert first.ended is not None and (second.created - first.ended).total_seconds() >= 1
    restart(host)
    assert [get(host, name).state for name in ("first", "second")] == [VmState.RUNNING] * 2
    with host.client() as client:
        assert len([j for j in client.jobs.list() if j.by == "autostart"]) == 2


async def _another_boot(host: LabHost) -> None:
    store = await SqliteStore.open(host.state_dir / "store" / "hostler.db")
    await store.commit(Transaction([Put("host/boot", {"boot_id": "another", "complete": True})]))
    await store.close()
