"""At every named step of a move: each daemon killed, each QEMU killed, the cable pulled. Afterwards the VM runs on
exactly one host (or is off where its only QEMU was killed), its journal is whole, and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hostler.model.errors import HostlerError
from hostler.model.vm import VmState
from hostler.testing.bench_vm import Bench
from hostler.testing.lab import LabHost

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SLOW = 8 * 1024**2
"""Bytes/s at which the guest's memory takes seconds, so that something can happen in the middle of it."""


@dataclass(frozen=True)
class Place:
    """A moment of the move. `at_target`: the target's daemon stands still there, else the source's. `given`: the VM is
    the target's from here on, whatever happens to the source."""

    where: str
    edge: str
    at_target: bool = False
    given: bool = False
    loaded: bool = False
    has_target: bool = True
    source_has_qemu: bool = True

    def __str__(self) -> str:
        return f"{self.where.split('/')[1]}-{self.edge}{'-at-target' if self.at_target else ''}"


PLACES = (
    Place("vm.migrate/check", "before", has_target=False),
    Place("vm.migrate/prepare-target", "before", has_target=False),
    Place("vm.migrate/prepare-target", "after"),
    Place("vm.migrate/pre-copy", "middle"),
    Place("vm.migrate/switch-over", "before", loaded=True),
    Place("vm.migrate/switch-over", "after", loaded=True, given=True),
    Place("incoming/accept", "before", at_target=True, loaded=True, given=True),
    Place("incoming/accept", "after", at_target=True, loaded=True, given=True),
    Place("vm.migrate/resume", "after", loaded=True, given=True),
    Place("vm.migrate/clean-up", "after", loaded=True, given=True, source_has_qemu=False),
)


@pytest.fixture(scope="module")
def guest(bench: Bench) -> Bench:
    """The VM, running on the first host."""
    bench.create(bench.hosts[0])
    bench.start(bench.hosts[0])
    return bench


@pytest.fixture
def source(guest: Bench) -> Iterator[LabHost]:
    """The host that runs the VM before the test. Whatever the test before did, one does."""
    for host in guest.hosts:
        host.failpoints.clear()
    for host in guest.hosts:
        record = guest.record(host)
        if record is not None and record.state is VmState.OFF:
            guest.start(host)
    yield guest.owner()


def reach(guest: Bench, source: LabHost, target: LabHost, place: Place) -> None:
    """Begin a move and wait until it stands at that place."""
    if place.edge == "middle":
        job = guest.begin_move(source, target, bandwidth=SLOW)
        with source.client() as client:
            end = time.monotonic() + 60
            while not client.jobs.get(job.id).progress.detail.get("transferred"):
                assert time.monotonic() < end, "the transfer has not begun"
                time.sleep(0.02)
        return
    stands = target if place.at_target else source
    stands.failpoints.arm(place.where, place.edge)
    guest.begin_move(source, target)
    stands.failpoints.wait_reached(place.where, place.edge)


def release(guest: Bench) -> None:
    """Let everybody go on."""
    for host in guest.hosts:
        host.failpoints.clear()


def judge(guest: Bench, running: bool = True) -> None:
    """The VM runs on exactly one host with nothing lost, or is off on exactly one; nothing is left elsewhere."""
    guest.settled()
    records = {h.name: r for h in guest.hosts if (r := guest.record(h)) is not None}
    assert len(records) == 1, records
    if running:
        owner = guest.owner()
        guest.check(owner)
        assert len(owner.qemus()) == 1
    else:
        (record,) = records.values()
        assert record.state is VmState.OFF and record.reason_text, record
        owner = next(h for h in guest.hosts if h.name in records)
        assert owner.processes() == []
    other = guest.other(owner)
    assert other.processes() == []
    assert not list((other.run_dir / "vms").glob("*")), "a run directory is left"


def names(place: Place) -> str:
    return str(place)


@pytest.mark.parametrize("place", PLACES, ids=names)
def test_source_daemon_killed(guest: Bench, source: LabHost, place: Place) -> None:
    target = guest.other(source)
    reach(guest, source, target, place)
    source.kill()
    release(guest)
    source.start()
    judge(guest)


@pytest.mark.parametrize("place", PLACES, ids=names)
def test_target_daemon_killed(guest: Bench, source: LabHost, place: Place) -> None:
    target = guest.other(source)
    reach(guest, source, target, place)
    target.kill()
    release(guest)
    target.start()
    judge(guest)


@pytest.mark.parametrize("place", PLACES, ids=names)
def test_source_qemu_killed(guest: Bench, source: LabHost, place: Place) -> None:
    """Before the target has everything its QEMU is the only one; afterwards the guest lives on there."""
    target = guest.other(source)
    reach(guest, source, target, place)
    source.kill_qemus()
    release(guest)
    judge(guest, running=place.loaded)


@pytest.mark.parametrize("place", PLACES, ids=names)
def test_target_qemu_killed(guest: Bench, source: LabHost, place: Place) -> None:
    """Until the target's QEMU is told to run, the source takes the VM back; afterwards it was the only one."""
    target = guest.other(source)
    reach(guest, source, target, place)
    target.kill_qemus()
    release(guest)
    judge(guest, running=not place.where.endswith(("resume", "clean-up")))


@pytest.mark.parametrize("place", PLACES, ids=names)
def test_cable_pulled(guest: Bench, source: LabHost, place: Place) -> None:
    if not guest.lab.isolated:
        pytest.skip("needs root: each host in a network namespace of its own")
    target = guest.other(source)
    reach(guest, source, target, place)
    guest.lab.cut(target)
    release(guest)
    _see_what_it_does(guest, source)
    guest.lab.mend(target)
    judge(guest)


def _see_what_it_does(guest: Bench, source: LabHost) -> None:
    """Stay cut until the source has ended its job, or has run into the wall for a while."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with source.client() as client:
            if all(job.is_over for job in client.jobs.list()):
                return
        time.sleep(0.1)


@pytest.mark.parametrize("edge", ["before", "after"])
def test_cancel_before_switch_over(guest: Bench, source: LabHost, edge: str) -> None:
    """Cancelled in the middle of the transfer, or just when it begins: it runs on here."""
    target = guest.other(source)
    job = guest.begin_move(source, target, bandwidth=SLOW)
    with source.client() as client:
        if edge == "after":
            while not client.jobs.get(job.id).progress.detail.get("transferred"):
                time.sleep(0.02)
        client.jobs.cancel(job.id)
        ended = client.jobs.get(job.id, wait=60)
    assert str(ended.state) == "cancelled", ended
    judge(guest)
    assert guest.owner() is source


def test_no_cancel_after_switch_over(guest: Bench, source: LabHost) -> None:
    target = guest.other(source)
    source.failpoints.arm("vm.migrate/switch-over", "after")
    job = guest.begin_move(source, target)
    source.failpoints.wait_reached("vm.migrate/switch-over", "after")
    with source.client() as client, pytest.raises(HostlerError, match="cannot be cancelled"):
        client.jobs.cancel(job.id)
    release(guest)
    judge(guest)
    assert guest.owner() is target


def both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


@pytest.mark.parametrize("place", [PLACES[3], PLACES[4], PLACES[5], PLACES[7]], ids=names)
def test_both_daemons_killed(guest: Bench, source: LabHost, place: Place) -> None:
    target = guest.other(source)
    reach(guest, source, target, place)
    both(source.kill, target.kill)
    release(guest)
    both(target.start, source.start)
    judge(guest)
