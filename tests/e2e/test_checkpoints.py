"""Checkpoints of a guest that writes: made, gone back to, merged while it runs, and with the daemon, QEMU or the disk
failing in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.model.checkpoint import CheckpointKind, CheckpointState, CheckpointView
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointCreate
from hostler.model.disk import DiskSource
from hostler.model.units import KiB, MiB
from hostler.model.vm import VmRecord, VmState
from hostler.testing.bench_vm import Bench
from hostler.testing.guestclient import GuestSerial, RangeVerdict
from hostler.testing.lab import Lab, LabHost

pytestmark = pytest.mark.e2e

AT, LENGTH = 8 * MiB, 256 * KiB
"""Where, beside its journal, the guest writes what tells one time from another."""


@pytest.fixture(scope="module")
def host(short_dir: Path) -> Iterator[LabHost]:
    with Lab(short_dir, isolated=False) as made:
        yield made.add_host("a")


@pytest.fixture(scope="module")
def bench(host: LabHost, short_dir: Path) -> Bench:
    made = Bench(_lab_of(host, short_dir), short_dir, memory=96 * MiB)
    made.create(host)
    made.start(host)
    return made


def _lab_of(host: LabHost, directory: Path) -> Lab:
    lab = Lab(directory, isolated=False)
    lab.hosts.append(host)
    return lab


def write(bench: Bench, seed: int) -> None:
    async def do(guest: GuestSerial) -> None:
        await guest.write(bench.disk_serial, seed, LENGTH, AT)

    bench.ask(bench.hosts[0], do)


def has(bench: Bench, seed: int) -> bool:
    async def look(guest: GuestSerial) -> RangeVerdict:
        return await guest.verify(bench.disk_serial, seed, LENGTH, AT)

    return bench.ask(bench.hosts[0], look).bad_sectors == 0


def make(bench: Bench, name: str, kind: CheckpointKind = CheckpointKind.DISKS) -> CheckpointView:
    with bench.hosts[0].client() as client:
        request = CheckpointCreate(name=name, kind=kind)
        client.jobs.finish(client.checkpoints.create("guest", request), timeout=120)
        return client.checkpoints.get("guest", name)


def delete(bench: Bench, name: str, subtree: bool = False) -> None:
    with bench.hosts[0].client() as client:
        client.jobs.finish(client.checkpoints.delete("guest", name, subtree=subtree), timeout=120)


def points(bench: Bench) -> dict[str, CheckpointView]:
    with bench.hosts[0].client() as client:
        return {p.name: p for p in client.checkpoints.list("guest")}


def vm(bench: Bench) -> VmRecord:
    found = bench.record(bench.hosts[0])
    assert found is not None
    return found


def chain(bench: Bench) -> list[DiskSource]:
    return list(vm(bench).config.disks[0].source.layers())


def files(bench: Bench) -> list[str]:
    return sorted(p.name for p in bench.shared.glob("journal.*"))


def run_again(bench: Bench) -> None:
    """Start it from its disk, and let it write a new journal."""
    bench.start(bench.hosts[0])


def test_made_while_it_writes_and_merged_while_it_writes(bench: Bench) -> None:
    host = bench.hosts[0]
    write(bench, 1)
    made = make(bench, "one")
    assert (made.state, made.kind, made.now) == (CheckpointState.READY, CheckpointKind.DISKS, True)
    assert len(chain(bench)) == 2
    write(bench, 2)
    make(bench, "two")
    write(bench, 3)
    assert len(chain(bench)) == 3
    bench.check(host)
    delete(bench, "one")  # a merge below the layer that is written
    assert len(chain(bench)) == 2
    bench.check(host)
    assert has(bench, 3)
    delete(bench, "two")  # a merge of the layer that is written
    assert [Path(layer.path).name for layer in chain(bench)] == ["journal.qcow2"]
    assert files(bench) == ["journal.qcow2"]
    bench.check(host)
    assert has(bench, 3)
    assert vm(bench).state is VmState.RUNNING
    assert points(bench) == {}


def test_going_back_and_forth(bench: Bench) -> None:
    write(bench, 10)
    make(bench, "ten")
    write(bench, 11)
    with bench.hosts[0].client() as client:
        request = CheckpointApply(first=True, turn_off=True)
        client.jobs.finish(client.checkpoints.apply("guest", "ten", request), timeout=120)
        before = vm(bench)
        client.jobs.finish(client.vms.start("guest"), timeout=60)
    assert before.state is VmState.OFF
    bench.ask(bench.hosts[0], lambda guest: guest.wait_ready())
    assert has(bench, 10)
    kept = next(p for p in points(bench).values() if p.name != "ten")
    assert kept.kind is CheckpointKind.FULL  # it ran
    write(bench, 12)
    with bench.hosts[0].client() as client:
        client.jobs.finish(client.checkpoints.apply("guest", kept.id, CheckpointApply(turn_off=True)), timeout=120)
        assert client.vms.get("guest").state is VmState.SAVED
        client.jobs.finish(client.vms.act("guest", "restore"), timeout=60)
    bench.check(bench.hosts[0])  # the very guest that ran when it was made: the boot id is compared
    assert has(bench, 11)
    delete(bench, "ten", subtree=True)
    assert has(bench, 11)
    assert files(bench) == ["journal.qcow2"]
    bench.check(bench.hosts[0])


def test_with_memory_the_guest_hardly_stops(bench: Bench) -> None:
    host = bench.hosts[0]
    write(bench, 20)
    made = make(bench, "full", CheckpointKind.FULL)
    assert made.memory is not None
    assert Path(made.memory).stat().st_size > MiB
    assert vm(bench).state is VmState.RUNNING
    write(bench, 21)
    bench.check(host)
    boot = bench.boot
    with host.client() as client:
        client.jobs.finish(client.checkpoints.apply("guest", "full", CheckpointApply(turn_off=True)), timeout=120)
        client.jobs.finish(client.vms.act("guest", "restore"), timeout=60)
    assert has(bench, 20)
    bench.check(host)
    assert bench.boot == boot
    delete(bench, "full")
    assert not Path(made.memory).exists()
    bench.check(host)
