"""Checkpoints of a guest that writes, with the daemon or QEMU killed, or the disk full, in the middle; and on bases of
every format. Whatever happens, the guest has what it was told is on its disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hostler.model.checkpoint import CheckpointKind, CheckpointState
from hostler.model.checkpoint_requests import CheckpointCreate
from hostler.model.errors import HostlerError, NoSpace
from hostler.model.requests import DiskAdd, VolumeCreate
from hostler.model.units import KiB, MiB
from hostler.model.vm import VmState
from hostler.testing.bench_vm import SEED, SPAN, Bench
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab, LabHost

pytestmark = pytest.mark.e2e

LENGTH = 4 * MiB
AT = 8 * MiB


@pytest.fixture(scope="module")
def bench(short_dir: Path) -> Iterator[Bench]:
    with Lab(short_dir, isolated=False) as lab:
        lab.add_host("a")
        made = Bench(lab, short_dir, memory=96 * MiB)
        made.create(lab.hosts[0])
        made.start(lab.hosts[0])
        yield made


def host(bench: Bench) -> LabHost:
    return bench.hosts[0]


def write(bench: Bench, disk: str, seed: int, length: int = LENGTH, at: int = AT) -> None:
    async def do(guest: GuestSerial) -> None:
        await guest.write(disk, seed, length, at)

    bench.ask(host(bench), do)


def has(bench: Bench, disk: str, seed: int, length: int = LENGTH, at: int = AT) -> bool:
    async def look(guest: GuestSerial) -> bool:
        return (await guest.verify(disk, seed, length, at)).bad_sectors == 0

    return bench.ask(host(bench), look)


def make(bench: Bench, name: str, kind: CheckpointKind = CheckpointKind.DISKS) -> None:
    with host(bench).client() as client:
        request = CheckpointCreate(name=name, kind=kind)
        client.jobs.finish(client.checkpoints.create("guest", request), timeout=120)


def delete(bench: Bench, name: str) -> None:
    with host(bench).client() as client:
        client.jobs.finish(client.checkpoints.delete("guest", name), timeout=120)


def names(bench: Bench) -> dict[str, CheckpointState]:
    with host(bench).client() as client:
        return {p.name: p.state for p in client.checkpoints.list("guest")}


def nothing_left(bench: Bench) -> None:
    """No checkpoint, and of the first disk one layer and one file."""
    for name in names(bench):
        delete(bench, name)
    record = bench.record(host(bench))
    assert record is not None
    assert record.config.disks[0].source.backing is None
    assert [p.name for p in bench.shared.glob("journal.*")] == ["journal.qcow2"]
    assert record.job is None


def killed(bench: Bench) -> None:
    """The daemon is killed where it stands and started again, and everything settles."""
    host(bench).kill()
    host(bench).failpoints.clear()
    host(bench).start()
    bench.settled()


CREATE = [
    ("layers", "after"),
    ("record", "before"),
    ("record", "after"),
    ("freeze", "before"),
    ("freeze", "after"),
    ("ready", "before"),
]


@pytest.mark.parametrize(("step", "edge"), CREATE)
def test_the_daemon_is_killed_while_one_is_made(bench: Bench, step: str, edge: str) -> None:
    write(bench, bench.disk_serial, 31, 64 * KiB)
    host(bench).failpoints.arm(f"checkpoint.create/{step}", edge)
    with host(bench).client() as client:
        client.checkpoints.create("guest", CheckpointCreate(name="one"))
    host(bench).failpoints.wait_reached(f"checkpoint.create/{step}", edge)
    killed(bench)
    made = step in ("freeze", "ready")
    assert names(bench) == ({"one": CheckpointState.READY} if made else {})
    bench.check(host(bench))
    assert has(bench, bench.disk_serial, 31, 64 * KiB)
    nothing_left(bench)
    bench.check(host(bench))


@pytest.mark.parametrize(("step", "edge"), [("freeze", "before"), ("ready", "before")])
def test_the_daemon_is_killed_while_one_with_memory_is_made(bench: Bench, step: str, edge: str) -> None:
    host(bench).failpoints.arm(f"checkpoint.create/{step}", edge)
    with host(bench).client() as client:
        client.checkpoints.create("guest", CheckpointCreate(name="full", kind=CheckpointKind.FULL))
    host(bench).failpoints.wait_reached(f"checkpoint.create/{step}", edge)
    killed(bench)
    assert names(bench) == ({"full": CheckpointState.READY} if step == "ready" else {})
    bench.check(host(bench))
    nothing_left(bench)
    assert not list(bench.shared.glob("*.memory*"))


@pytest.mark.parametrize("delay", [0.05, 0.15])
def test_the_daemon_is_killed_in_the_middle_of_memory(bench: Bench, delay: float) -> None:
    with host(bench).client() as client:
        client.checkpoints.create("guest", CheckpointCreate(name="full", kind=CheckpointKind.FULL))
    time.sleep(delay)
    killed(bench)
    record = bench.record(host(bench))
    assert record is not None
    assert record.state is VmState.RUNNING
    bench.check(host(bench))
    nothing_left(bench)
    assert not list(bench.shared.glob("*.memory*"))


@pytest.mark.parametrize(
    ("step", "edge"), [("mark", "after"), ("merge", "before"), ("merge", "after"), ("forget", "before")]
)
def test_the_daemon_is_killed_while_one_is_deleted(bench: Bench, step: str, edge: str) -> None:
    make(bench, "one")
    write(bench, bench.disk_serial, 32, 64 * KiB)
    host(bench).failpoints.arm(f"checkpoint.delete/{step}", edge)
    with host(bench).client() as client:
        client.checkpoints.delete("guest", "one")
    host(bench).failpoints.wait_reached(f"checkpoint.delete/{step}", edge)
    killed(bench)
    bench.check(host(bench))
    assert has(bench, bench.disk_serial, 32, 64 * KiB)
    assert names(bench) == ({"one": CheckpointState.READY} if step == "mark" else {})
    nothing_left(bench)


@pytest.mark.parametrize("delay", [0.02, 0.06, 0.15])
def test_the_daemon_is_killed_in_the_middle_of_a_merge(bench: Bench, delay: float) -> None:
    make(bench, "one")
    write(bench, bench.disk_serial, 33)
    with host(bench).client() as client:
        client.checkpoints.delete("guest", "one")
    time.sleep(delay)
    killed(bench)
    record = bench.record(host(bench))
    assert record is not None
    assert record.state is VmState.RUNNING
    bench.check(host(bench))
    assert has(bench, bench.disk_serial, 33)
    nothing_left(bench)
    bench.check(host(bench))


@pytest.mark.parametrize("delay", [0.01, 0.08])
def test_qemu_is_killed_in_the_middle_of_a_merge(bench: Bench, delay: float) -> None:
    make(bench, "one")
    write(bench, bench.disk_serial, 34)
    acked = bench.ask(host(bench), lambda guest: guest.pattern_status()).acked
    with host(bench).client() as client:
        job = client.checkpoints.delete("guest", "one")
        time.sleep(delay)
        host(bench).kill_qemus()
        with suppress(HostlerError):
            client.jobs.finish(job, timeout=60)
    bench.settled()
    nothing_left(bench)
    with host(bench).client() as client:
        client.jobs.finish(client.vms.start("guest"), timeout=60)

    async def look(guest: GuestSerial) -> None:
        await guest.wait_ready()
        await guest.wait_disk(bench.disk_serial)
        reading = await guest.pattern_verify(bench.disk_serial, SEED, SPAN, acked)
        assert reading.sound, reading

    bench.ask(host(bench), look)
    assert has(bench, bench.disk_serial, 34)
    bench.begin_writing(host(bench))


FORMATS = ("raw", "qcow2", "vhd-fixed", "vhd", "vhdx")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_can_be_below(bench: Bench, format: str) -> None:
    """Made and merged while it runs, and again after a start from the layers."""
    path = bench.shared / f"below.{format}"
    with host(bench).client() as client:
        volume = VolumeCreate.model_validate({"name": format, "size": 16 * MiB, "format": format, "path": str(path)})
        client.jobs.finish(client.volumes.create(volume), timeout=60)
        client.jobs.finish(client.vms.attach_disk("guest", DiskAdd(volume=format, serial=f"B{format}")), timeout=60)
    serial = f"B{format}"
    bench.ask(host(bench), lambda guest: guest.wait_disk(serial))
    write(bench, serial, 41, 256 * KiB, 0)
    make(bench, "one")
    write(bench, serial, 42, 256 * KiB)
    delete(bench, "one")
    assert has(bench, serial, 41, 256 * KiB, 0)
    assert has(bench, serial, 42, 256 * KiB)
    make(bench, "two")
    write(bench, serial, 43, 256 * KiB)
    with host(bench).client() as client:
        client.jobs.finish(client.vms.act("guest", "turn-off"), timeout=60)
    bench.start(host(bench))
    bench.ask(host(bench), lambda guest: guest.wait_disk(serial))
    assert has(bench, serial, 43, 256 * KiB)
    delete(bench, "two")
    assert has(bench, serial, 41, 256 * KiB, 0)
    assert has(bench, serial, 43, 256 * KiB)
    bench.check(host(bench))
    with host(bench).client() as client:
        record = client.vms.get("guest")
        disk = next(d for d in record.config.disks if d.serial == serial)
        assert disk.source.path == str(path)
        client.jobs.finish(client.vms.detach_disk("guest", disk.id), timeout=60)
    driver = {"vhd": "vpc", "vhd-fixed": "vpc"}.get(format, format)
    found = subprocess.run(
        ["qemu-io", "-r", "-f", driver, "-c", f"read 0 {256 * KiB}", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "262144/262144" in found.stdout
    nothing_left(bench)


@pytest.fixture
def small_disk(short_dir: Path) -> Iterator[Bench]:
    """A guest whose disks are on a file system that is nearly full."""
    place = short_dir / "small"
    shared = place / "shared"
    shared.mkdir(parents=True)
    place.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96M", "none", str(shared)], check=True)
    try:
        with Lab(place, isolated=False) as lab:
            lab.add_host("b")
            made = Bench(lab, place, memory=96 * MiB)
            made.create(lab.hosts[0])
            made.start(lab.hosts[0])
            yield made
    finally:
        subprocess.run(["umount", "-l", str(shared)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_the_disk_is_full_in_a_merge(small_disk: Bench) -> None:
    bench = small_disk
    make(bench, "one")
    write(bench, bench.disk_serial, 51)
    bench.check(host(bench))
    found = os.statvfs(bench.shared)
    junk = bench.shared / "junk"
    junk.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - MiB)))
    with pytest.raises(NoSpace):
        delete(bench, "one")
    assert names(bench) == {"one": CheckpointState.MERGING}
    bench.check(host(bench))
    assert has(bench, bench.disk_serial, 51)
    with pytest.raises(NoSpace):  # refused at once: there is no room for the memory
        make(bench, "full", CheckpointKind.FULL)
    junk.unlink()
    nothing_left(bench)
    bench.check(host(bench))
    assert has(bench, bench.disk_serial, 51)
