"""A disk that moves while its guest writes a journal on it: every format, and at every step the daemon killed, QEMU
killed, both killed; a target that is full. Afterwards the disk is on exactly one image, which is the recorded one, and
every acknowledged write is there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.model.disk import DiskSource, ImageFormat
from hostler.model.disk_requests import DiskMove
from hostler.model.errors import Cancelled, ErrorCode, HostlerError, NoSpace
from hostler.model.job import Job
from hostler.model.units import MiB
from hostler.model.vm import VmState
from hostler.testing.bench_vm import SEED, SPAN, UNFINISHED, Bench
from hostler.testing.guestclient import GuestSerial, JournalReading
from hostler.testing.lab import Lab, LabHost

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

STEPS = ("create", "copy", "switch", "clean-up")
PLACES = [(step, edge) for step in STEPS for edge in ("before", "after")]
SLOW = 4 * MiB
"""Bytes/s at which the copy takes some seconds."""
FILLED = (77, 8 * MiB, 4 * MiB)
"""Seed, size and offset of what makes the disk worth copying."""


class Moving:
    """One host, and its guest's disk."""

    def __init__(self, bench: Bench, places: tuple[Path, Path]) -> None:
        self.bench = bench
        self.host: LabHost = bench.hosts[0]
        self.places = places
        self._count = 0

    def source(self) -> DiskSource:
        """What is on record."""
        record = self.bench.record(self.host)
        assert record is not None
        return record.config.disks[0].source

    def target(self, format: ImageFormat = ImageFormat.QCOW2) -> Path:
        """A place it is not at."""
        self._count += 1
        here = Path(self.source().path).parent
        other = next(place for place in self.places if place != here)
        return other / f"{self._count}.{format}"

    def begin(self, format: ImageFormat = ImageFormat.QCOW2, to: Path | None = None, limit: int = 0) -> Job:
        request = DiskMove(to=str(to or self.target(format)), format=format, limit=limit)
        with self.host.client() as client:
            return client.disks.move("guest", "disk0", request)

    def end(self, job: Job) -> Job:
        """The job when it has ended, in whatever way."""
        end = time.monotonic() + 90
        with self.host.client() as client:
            while str((job := client.jobs.get(job.id)).state) in UNFINISHED:
                assert time.monotonic() < end, job
                time.sleep(0.02)
        return job

    def move(self, format: ImageFormat = ImageFormat.QCOW2, to: Path | None = None) -> Job:
        job = self.begin(format, to)
        with self.host.client() as client:
            return client.jobs.finish(job, timeout=90)

    def until_copied(self, job: Job, size: int) -> None:
        """Until so many bytes are copied."""
        end = time.monotonic() + 60
        with self.host.client() as client:
            while True:
                now = client.jobs.get(job.id)
                if int(str(now.progress.detail.get("done", 0))) >= size:
                    return
                assert time.monotonic() < end and str(now.state) in UNFINISHED, now
                time.sleep(0.02)

    def fill(self) -> None:
        """Make it worth copying."""

        async def write(guest: GuestSerial) -> None:
            await guest.write(self.bench.disk_serial, *FILLED)

        self.bench.ask(self.host, write)

    def is_sound(self) -> None:
        """The same guest, on the one image that is there and on record, with all it wrote."""
        self.bench.check(self.host)

        async def verify(guest: GuestSerial) -> int:
            return (await guest.verify(self.bench.disk_serial, *FILLED)).bad_sectors

        assert self.bench.ask(self.host, verify) == 0
        self.is_tidy()

    def is_tidy(self) -> None:
        """One image, on record, open in QEMU alone if it runs."""
        images = [path for place in self.places for path in place.iterdir()]
        assert [str(path) for path in images] == [self.source().path]
        with self.host.client() as client:
            (volume,) = client.volumes.list()
            assert (volume.name, volume.path, str(volume.state)) == ("journal", self.source().path, "ready")
        exports = [p for p in self.host.processes() if "qemu-storage-daemon" in p.cmdline()[0]]
        runs = bool(self.host.qemus())
        assert len(exports) == (1 if runs and self.source().exported else 0)

    # QEMU dies

    def acked(self) -> int:
        """What the guest knows as written."""

        async def status(guest: GuestSerial) -> int:
            return (await guest.pattern_status()).acked

        return self.bench.ask(self.host, status)

    def starts_whole(self, acked: int) -> None:
        """After its QEMU was killed: it is off, starts, and has all it knew as written."""
        self.bench.settled()
        record = self.bench.record(self.host)
        assert record is not None
        assert record.state is VmState.OFF
        self.is_tidy()
        with self.host.client() as client:
            client.jobs.finish(client.vms.start("guest", wait=60))

        async def verify(guest: GuestSerial) -> JournalReading:
            await guest.wait_ready()
            await guest.wait_disk(self.bench.disk_serial)
            return await guest.pattern_verify(self.bench.disk_serial, SEED, SPAN, acked)

        reading = self.bench.ask(self.host, verify)
        assert reading.sound, reading
        assert reading.acked >= acked
        self.bench.begin_writing(self.host)


@pytest.fixture(scope="module")
def moving(short_dir: Path) -> Iterator[Moving]:
    places = (short_dir / "one", short_dir / "two")
    for place in places:
        place.mkdir(mode=0o711)
        place.chmod(0o711)
    with Lab(short_dir, isolated=False) as lab:
        lab.add_host("a")
        bench = Bench(lab, short_dir)
        bench.create(lab.hosts[0])
        bench.start(lab.hosts[0])
        made = Moving(bench, places)
        made.fill()
        made.move(to=places[0] / "0.qcow2")
        yield made


@pytest.mark.parametrize(
    "format", [ImageFormat.RAW, ImageFormat.VHD_FIXED, ImageFormat.VHDX, ImageFormat.VHD, ImageFormat.QCOW2], ids=str
)
def test_from_format_to_format(moving: Moving, format: ImageFormat) -> None:
    serial = moving.bench.disk_serial
    job = moving.move(format)
    assert moving.source().format is format
    moving.is_sound()
    assert job.result is not None
    assert job.result["path"] == moving.source().path
    assert moving.bench.disk_serial == serial


def test_while_paused_and_while_off(moving: Moving) -> None:
    with moving.host.client() as client:
        client.jobs.finish(client.vms.act("guest", "pause", wait=30))
        moving.move(ImageFormat.RAW)
        assert client.vms.get("guest").state is VmState.PAUSED
        client.jobs.finish(client.vms.act("guest", "resume", wait=30))
        moving.is_sound()
        acked = moving.acked()
        client.jobs.finish(client.vms.act("guest", "turn-off", wait=30))
        moving.move(ImageFormat.VHDX)
        moving.move(ImageFormat.QCOW2)
    moving.starts_whole(acked)
    moving.is_sound()


@pytest.mark.parametrize(("step", "edge"), PLACES)
def test_the_daemon_is_killed(moving: Moving, step: str, edge: str) -> None:
    before = moving.source()
    moving.host.failpoints.arm(f"disk.move/{step}", edge)
    job = moving.begin(ImageFormat.VHDX if edge == "before" else ImageFormat.QCOW2)
    moving.host.failpoints.wait_reached(f"disk.move/{step}", edge)
    moving.host.kill()
    moving.host.failpoints.clear()
    moving.host.start()
    ended = moving.end(job)
    undone = step == "create"
    assert str(ended.state) == ("failed" if undone else "done"), ended
    assert (moving.source() == before) == undone
    moving.is_sound()


def test_the_daemon_is_killed_in_the_middle_and_the_copying_goes_on(moving: Moving) -> None:
    job = moving.begin(limit=SLOW)
    moving.until_copied(job, 1 * MiB)
    moving.host.kill()
    moving.host.start()
    assert str(moving.end(job).state) == "done"
    moving.is_sound()


def test_cancelled_in_the_middle(moving: Moving) -> None:
    before = moving.source()
    job = moving.begin(limit=SLOW)
    moving.until_copied(job, 1 * MiB)
    with moving.host.client() as client:
        client.jobs.cancel(job.id)
        with pytest.raises(Cancelled):
            client.jobs.finish(job)
    assert moving.source() == before
    moving.is_sound()


@pytest.mark.parametrize(("step", "edge"), [("copy", "before"), ("switch", "before"), ("switch", "after")])
@pytest.mark.parametrize("daemon_too", [False, True], ids=["qemu", "both"])
def test_qemu_is_killed(moving: Moving, step: str, edge: str, daemon_too: bool) -> None:
    moving.host.failpoints.arm(f"disk.move/{step}", edge)
    job = moving.begin()
    moving.host.failpoints.wait_reached(f"disk.move/{step}", edge)
    acked = moving.acked()
    if daemon_too:
        moving.host.kill()
    moving.host.kill_qemus()
    moving.host.failpoints.clear()
    if daemon_too:
        moving.host.start()
    moved = (step, edge) == ("switch", "after")
    assert str(moving.end(job).state) == ("done" if moved else "failed")
    moving.starts_whole(acked)
    moving.is_sound()


def test_qemu_stands_still_when_the_daemon_dies(moving: Moving) -> None:
    """A stopped QEMU gives no answer: the new daemon waits for one, and then the copying goes on."""
    job = moving.begin(limit=SLOW)
    moving.until_copied(job, 1 * MiB)
    moving.host.kill()
    (qemu,) = moving.host.qemus()
    qemu.send_signal(signal.SIGSTOP)
    try:
        moving.host.start()
        with moving.host.client() as client:
            assert str(client.jobs.get(job.id).state) == "running"
    finally:
        qemu.send_signal(signal.SIGCONT)
    assert str(moving.end(job).state) == "done"
    moving.is_sound()


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
@pytest.mark.parametrize("format", [ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHDX], ids=str)
def test_a_target_that_is_full(moving: Moving, short_dir: Path, format: ImageFormat) -> None:
    """It fills up in the middle. (What would not fit from the beginning is refused.)"""
    small = short_dir / "small"
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=711", "none", str(small)], check=True)
    before = moving.source()
    try:
        moving.host.failpoints.arm("disk.move/create", "after")
        job = moving.begin(format, to=small / "x.img")
        moving.host.failpoints.wait_reached("disk.move/create", "after")
        with (small / "ballast").open("wb") as file:
            room = os.statvfs(small)
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 4 * MiB)
        moving.host.failpoints.clear()
        with moving.host.client() as client, pytest.raises(HostlerError) as refused:
            client.jobs.finish(job)
        assert refused.value.code in (ErrorCode.NO_SPACE, ErrorCode.QEMU_FAILED), refused.value
        if format is not ImageFormat.VHDX:
            assert isinstance(refused.value, NoSpace)
        assert [path.name for path in small.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert moving.source() == before
    moving.is_sound()
