"""Moves that go well: live and quick, paused, busy, with firmware variables and a TPM, one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostler.model.checkpoint import CheckpointKind
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointCreate
from hostler.model.errors import HostlerError, NotFound
from hostler.model.requests import MigrateRequest, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import Firmware, VmState
from hostler.testing.bench_vm import Bench
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab, LabHost

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def guest(bench: Bench) -> Bench:
    """The VM, running on the first host."""
    bench.create(bench.hosts[0])
    bench.start(bench.hosts[0])
    return bench


@pytest.fixture
def source(guest: Bench) -> Iterator[LabHost]:
    """The host that runs it."""
    yield guest.owner()


@pytest.mark.parametrize("options", [{}, {"mode": "quick"}, {"streams": 2}, {"downtime_limit": 300}], ids=str)
def test_there_and_back(guest: Bench, source: LabHost, options: dict[str, object]) -> None:
    target = guest.other(source)
    for leaves, arrives in ((source, target), (target, source)):
        job = guest.move(leaves, arrives, **options)
        assert [str(s.state) for s in job.steps] == ["done"] * 6
        guest.check(arrives)
        assert leaves.processes() == []


def test_the_one_left_says_where_it_went(guest: Bench, source: LabHost) -> None:
    target = guest.other(source)
    guest.move(source, target)
    with source.client() as client, pytest.raises(NotFound) as refused:
        client.vms.get("guest")
    assert target.name in refused.value.cause + refused.value.advice


def test_a_paused_vm_stays_paused(guest: Bench, source: LabHost) -> None:
    target = guest.other(source)
    with source.client() as client:
        client.jobs.finish(client.vms.act("guest", "pause", wait=30))
    guest.move(source, target)
    record = guest.record(target)
    assert record is not None and record.state is VmState.PAUSED
    with target.client() as client:
        client.jobs.finish(client.vms.act("guest", "resume", wait=30))
    guest.check(target)


def test_a_busy_guest_arrives_whole(guest: Bench, source: LabHost) -> None:
    """It dirties memory while it moves, and everything it wrote on its disk is there."""
    target = guest.other(source)

    async def load(serial: GuestSerial) -> None:
        await serial.dirty(8, 20)

    async def rest(serial: GuestSerial) -> None:
        await serial.dirty(0, 0)

    guest.ask(source, load)
    guest.move(source, target, downtime_limit=500)
    guest.check(target)
    guest.ask(target, rest)


def test_progress_tells_what_a_person_wants_to_know(guest: Bench, source: LabHost) -> None:
    target = guest.other(source)
    seen: list[dict[str, object]] = []
    job = guest.begin_move(source, target, bandwidth=32 * MiB)
    with source.client() as client:
        ended = client.jobs.finish(job, timeout=120, on_change=lambda j: seen.append(dict(j.progress.detail)))
    assert str(ended.state) == "done"
    told = [p for p in seen if p.get("transferred")]
    assert told, "no progress was shown"
    assert {"transferred", "remaining", "rounds", "dirty_rate", "remaining_time", "expected_pause"} <= set(told[-1])
    guest.check(target)


def test_a_dry_run_names_every_blocker(guest: Bench, source: LabHost) -> None:
    target = guest.other(source)
    with source.client() as client:
        plan = client.vms.check_migration("guest", MigrateRequest(host=target.name))
        assert plan.possible
        here = client.vms.check_migration("guest", MigrateRequest(host=source.name))
        assert [b.kind.value for b in here.blockers] == ["same-host"]
    with target.client() as other:
        other.vms.create(VmCreate(name="guest", memory=64 * MiB))
        try:
            with source.client() as client:
                plan = client.vms.check_migration("guest", MigrateRequest(host=target.name))
                assert "name-taken" in [b.kind.value for b in plan.blockers]
                with pytest.raises(HostlerError, match="named 'guest' already"):
                    guest.move(source, target)
        finally:
            other.vms.delete("guest")
    guest.check(source)


def test_firmware_variables_and_tpm_come_along(lab: Lab) -> None:
    first, second = lab.hosts
    with first.client() as client:
        facts = client.hosts.this().facts
        if facts is None or facts.qemu.firmware_code is None or not facts.qemu.tpm:
            pytest.skip("needs the packages ovmf and swtpm")
        client.vms.create(VmCreate(name="secure", memory=128 * MiB, firmware=Firmware.UEFI, tpm=True))
        client.jobs.finish(client.vms.start("secure", wait=60))
        client.jobs.finish(client.vms.migrate("secure", MigrateRequest(host=second.name), wait=60), timeout=90)
    with second.client() as client:
        assert client.vms.get("secure").state is VmState.RUNNING
        client.jobs.finish(client.vms.act("secure", "turn-off", wait=30))
        client.vms.delete("secure")


def test_its_checkpoints_come_along_and_can_be_merged_there(guest: Bench, source: LabHost) -> None:
    """A checkpoint with memory, made here, is applied on the other host; another one is merged there while it runs."""
    target = guest.other(source)
    with source.client() as client:
        client.jobs.finish(client.checkpoints.create("guest", CheckpointCreate(name="disks"), wait=60))
        full = CheckpointCreate(name="full", kind=CheckpointKind.FULL)
        client.jobs.finish(client.checkpoints.create("guest", full, wait=60))
    guest.move(source, target)
    guest.check(target)
    with source.client() as client, pytest.raises(NotFound):
        client.checkpoints.list("guest")
    with target.client() as client:
        assert {c.name for c in client.checkpoints.list("guest")} == {"disks", "full"}
        client.jobs.finish(client.checkpoints.delete("guest", "disks", wait=60))
    guest.check(target)
    boot = guest.ask(target, _boot)
    with target.client() as client:
        client.jobs.finish(client.checkpoints.apply("guest", "full", CheckpointApply(turn_off=True), wait=60))
        assert client.vms.get("guest").state is VmState.SAVED
        client.jobs.finish(client.vms.act("guest", "restore", wait=60))
    assert guest.ask(target, _boot) == boot, "the guest went on from its memory"
    with target.client() as client:
        client.jobs.finish(client.checkpoints.delete("guest", "full", wait=60))
        assert client.checkpoints.list("guest") == []
    guest.move(target, source)
    guest.ask(source, _boot)


async def _boot(serial: GuestSerial) -> str:
    return str((await serial.ping()).boot)
