"""Backups of a guest that writes all the time: full, by changes, after power-off and moves, with daemons and QEMUs
killed and disks full in the middle; each brought back and compared with what the guest had written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from userview import User, converse

from hostler.model.backup_requests import BackupList, BackupRestore
from hostler.model.disk import ImageFormat
from hostler.model.errors import ErrorCode
from hostler.model.units import KiB, MiB
from hostler.testing.bench_vm import SEED, SPAN, Bench
from hostler.testing.guestclient import GuestSerial, JournalReading
from hostler.testing.lab import LabHost
from hostler.testing.patterns import pattern

pytestmark = pytest.mark.e2e

SIZE = 8 * MiB
PIECE = 128 * KiB
KINDS = ("qcow2", "raw")


class Written:
    """What the guest has written on its two data disks: each piece at its place, on both."""

    def __init__(self, guest: Bench, directory: Path) -> None:
        self.guest = guest
        self.directory = directory
        self.seeds: dict[int, int] = {}
        self.restored = 0

    @property
    def host(self) -> LabHost:
        """Where it runs, or ran last."""
        for host in self.guest.hosts:
            record = self.guest.record(host)
            if record is not None:
                return host
        raise AssertionError("nobody has the guest")

    @property
    def user(self) -> User:
        return User(self.host)

    def write(self, seed: int, at: int, host: LabHost | None = None) -> None:
        """Both disks get a piece of this seed at that place. `host`: where the guest runs, if its daemon is dead."""

        async def do(serial: GuestSerial) -> None:
            for kind in KINDS:
                await serial.wait_disk(f"BK-{kind}")
                await serial.write(f"BK-{kind}", seed, PIECE, at)

        self.guest.ask(host or self.host, do)
        self.seeds[at] = seed

    def expected(self) -> dict[int, int]:
        return dict(self.seeds)

    def back_up(self, *options: str) -> dict[str, Any]:
        """Back the guest up; the backup as it is shown."""
        job = self.user("backup", "run", "guest", "--to", str(self.directory), *options)
        result = job["result"]
        found: dict[str, Any] = self.user("backup", "show", f"{result['directory']}/{result['backup']}")
        return found

    def content(self, backup: str, kind: str) -> bytes:
        """That disk of a backup, brought back as a raw volume."""
        self.restored += 1
        name = f"back-{self.restored}"
        wanted = BackupRestore(
            directory=str(self.directory),
            backup=backup,
            disk=self.disk_id(kind),
            volume=name,
            format=ImageFormat.RAW,
        )
        with self.host.client() as client:
            client.jobs.finish(client.backups.restore(wanted, wait=60))
            path = Path(client.volumes.get(name).path)
            content = path.read_bytes()
            client.volumes.delete(name)
        return content

    def disk_id(self, kind: str) -> str:
        record = self.guest.record(self.host)
        assert record is not None
        return next(d.id for d in record.config.disks if d.serial == f"BK-{kind}")

    def begin(self) -> None:
        """There is a backup to build on."""
        with self.host.client() as client:
            if not client.backups.list(BackupList()):
                self.back_up()

    def require(self, backup: str, expected: dict[int, int]) -> None:
        """Both disks of that backup have exactly these pieces."""
        image = bytearray(SIZE)
        for at, seed in expected.items():
            image[at : at + PIECE] = pattern(seed, PIECE, at)
        for kind in KINDS:
            assert self.content(backup, kind) == bytes(image), kind


@pytest.fixture(scope="module")
def written(guest: Bench, short_dir: Path) -> Written:
    """The guest with a data disk of each format."""
    user = User(guest.hosts[0])
    for kind in KINDS:
        path = guest.shared / f"bk.{kind}"
        user("volume", "create", f"bk-{kind}", str(SIZE), "--format", kind, "--path", str(path))
        user("disk", "add", "guest", "--volume", f"bk-{kind}", "--serial", f"BK-{kind}")
    return Written(guest, short_dir / "backups")


def kinds(written: Written, backup: dict[str, Any]) -> dict[str, bool]:
    """Whether each data disk of the backup is whole."""
    return {kind: d["since"] is None for kind in KINDS for d in backup["disks"] if d["id"] == written.disk_id(kind)}


def test_what_changed_is_copied_and_every_backup_is_what_the_guest_had(written: Written) -> None:
    made = []
    for seed, at in ((11, 0), (12, MiB), (13, 64 * KiB), (14, SIZE - PIECE)):
        written.write(seed, at)
        made.append((written.back_up(), written.expected()))
    assert [b["full"] for b, _ in made] == [True, False, False, False]
    assert all(d["blocks"] <= PIECE // (64 * KiB) for b, _ in made[1:] for d in b["disks"][1:])
    # 64 KiB were written twice, so the first piece is only half there by now.
    for backup, expected in made[:2]:
        written.require(backup["id"], expected)
    half = made[3][0]["id"]
    image = bytearray(SIZE)
    for at, seed in made[3][1].items():
        image[at : at + PIECE] = pattern(seed, PIECE, at)
    assert all(written.content(half, kind) == bytes(image) for kind in KINDS)
    listed = written.user("backup", "list", str(written.directory))
    assert [b["id"] for b in listed] == [b["id"] for b, _ in made]
    assert written.user("backup", "verify", f"{written.directory}/{half}")["result"]["files"] == 12
    written.guest.check(written.host)


def test_qemu_reads_the_files_as_they_are(written: Written) -> None:
    for file in sorted(written.directory.glob("*/*/*.qcow2")):
        done = subprocess.run(["qemu-img", "check", "-q", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout


def test_other_programs_read_a_backup_over_nbd(written: Written) -> None:
    written.begin()
    written.write(18, 5 * MiB + 512 * KiB)
    backup = written.back_up()
    job = written.user("backup", "export", f"{written.directory}/{backup['id']}")
    uri = job["progress"]["detail"]["exports"][written.disk_id("qcow2")]
    told = subprocess.run(
        ["nbdinfo", "--json", "--map=qemu:allocation-depth", uri], capture_output=True, text=True, check=True
    )
    changed = [(e["offset"], e["length"]) for e in json.loads(told.stdout) if e["type"] == 1]
    assert (5 * MiB + 512 * KiB, PIECE) in changed
    written.user("backup", "export-end", job["id"])
    assert written.user.run("job", "watch", job["id"]).returncode != 0
    assert subprocess.run(["nbdinfo", uri], capture_output=True, check=False).returncode != 0


def test_a_whole_vm_comes_back_with_its_journal(written: Written) -> None:
    async def acknowledged(serial: GuestSerial) -> int:
        return (await serial.pattern_status()).acked

    acked = written.guest.ask(written.host, acknowledged)
    backup = written.back_up("--crash")
    user, host = written.user, written.host
    user("backup", "restore", f"{written.directory}/{backup['id']}", "--vm", "again")
    user("vm", "start", "again")
    serial_of = written.guest.disk_serial

    async def read(serial: GuestSerial) -> JournalReading:
        await serial.wait_ready()
        await serial.wait_disk(serial_of)
        return await serial.pattern_verify(serial_of, SEED, SPAN, acked)

    reading = converse(host, user("vm", "show", "again")["config"]["id"], read)
    assert reading.sound, reading
    user("vm", "turn-off", "again")
    user("vm", "delete", "again", "--disks", "--yes")
    written.guest.check(host)


def test_checkpoints_come_and_go_between_backups(written: Written) -> None:
    written.begin()
    written.write(15, 3 * MiB + 512 * KiB)
    written.user("checkpoint", "create", "guest", "--name", "between")
    written.write(16, 3 * MiB + 640 * KiB)
    above = written.back_up()
    written.write(17, 3 * MiB + 768 * KiB)
    written.user("checkpoint", "delete", "guest", "between", "--yes")
    merged = written.back_up()
    assert kinds(written, above) == kinds(written, merged) == {"qcow2": False, "raw": False}
    written.require(merged["id"], written.expected())
    written.guest.check(written.host)


def test_a_daemon_killed_in_the_copy_goes_on_and_nothing_is_lost(written: Written) -> None:
    written.begin()
    written.write(21, 2 * MiB)
    host = written.host
    host.failpoints.arm("vm.backup/copy", "before")
    job = written.user("backup", "run", "guest", "--to", str(written.directory), "--no-wait")
    host.failpoints.wait_reached("vm.backup/copy", "before")
    expected = written.expected()
    host.kill()
    host.failpoints.clear()
    written.write(22, 3 * MiB, host)
    host.start()
    ended = written.user("job", "watch", job["id"])
    assert ended["state"] == "done"
    written.require(ended["result"]["backup"], expected)
    after = written.back_up()
    assert not after["full"]
    written.require(after["id"], written.expected())
    written.guest.check(host)


@pytest.mark.parametrize(("step", "edge"), [("snapshot", "before"), ("snapshot", "after"), ("commit", "after")])
def test_a_backup_broken_off_or_finished_by_the_next_daemon(written: Written, step: str, edge: str) -> None:
    written.begin()
    written.write(30, 4 * MiB)
    host = written.host
    host.failpoints.arm(f"vm.backup/{step}", edge)
    written.user("backup", "run", "guest", "--to", str(written.directory), "--no-wait")
    host.failpoints.wait_reached(f"vm.backup/{step}", edge)
    host.kill()
    host.failpoints.clear()
    host.start()
    written.user.until_state("guest", "running")
    written.write(31, 4 * MiB + PIECE)
    after = written.back_up("--incremental")
    written.require(after["id"], written.expected())


def test_a_full_target_leaves_everything_as_it_was(written: Written, short_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    written.begin()
    small = short_dir / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k,mode=700", "none", small], check=True)
    try:
        for options in ((), ("--compress",)):  # refused at once, and in the middle
            problem = written.user.refused(
                ErrorCode.NO_SPACE, 1, "backup", "run", "guest", "--to", str(small), "--full", *options
            )
            assert str(small) in problem["object"] + problem["cause"] + problem["advice"]
        assert not list(small.glob("*/*"))[1:]
    finally:
        subprocess.run(["umount", small], check=True)
    written.write(41, 5 * MiB)
    after = written.back_up("--incremental")
    written.require(after["id"], written.expected())
    written.guest.check(written.host)


def test_after_a_move_what_changed_is_still_known(written: Written) -> None:
    written.begin()
    written.write(51, 6 * MiB)
    source = written.host
    written.user("vm", "move", "guest", written.guest.other(source).name)
    written.write(52, 6 * MiB + PIECE)
    after = written.back_up("--incremental")
    written.require(after["id"], written.expected())


def test_after_save_and_restore_qcow2_still_knows(written: Written) -> None:
    written.begin()
    written.write(55, 6 * MiB + 512 * KiB)
    written.user("vm", "save", "guest")
    saved = written.back_up()
    assert written.user("vm", "show", "guest")["state"] == "saved"
    then = written.expected()
    written.user("vm", "restore", "guest")
    written.write(56, 6 * MiB + 640 * KiB)
    after = written.back_up()
    assert [kinds(written, b)["qcow2"] for b in (saved, after)] == [False, False]
    written.require(saved["id"], then)
    written.require(after["id"], written.expected())
    written.guest.check(written.host)


def test_after_power_off_only_qcow2_knows(written: Written) -> None:
    written.begin()
    written.write(61, 7 * MiB)
    written.user("vm", "turn-off", "guest")
    at_rest = written.back_up()
    assert kinds(written, at_rest) == {"qcow2": False, "raw": True}
    why = {d["id"]: d["why"] for d in at_rest["disks"]}
    assert "in memory only" in why[written.disk_id("raw")]
    written.require(at_rest["id"], written.expected())
    assert written.user("vm", "show", "guest")["state"] == "off"
    written.guest.start(written.host)
    written.write(62, 7 * MiB + PIECE)
    running = written.back_up()
    assert kinds(written, running) == {"qcow2": False, "raw": True}
    written.require(running["id"], written.expected())


def test_a_killed_qemu_ends_the_backup_and_the_next_is_full(written: Written) -> None:
    written.begin()
    host = written.host
    host.failpoints.arm("vm.backup/copy", "before")
    job = written.user("backup", "run", "guest", "--to", str(written.directory), "--no-wait")
    host.failpoints.wait_reached("vm.backup/copy", "before")
    host.kill_qemus()
    host.failpoints.clear()
    assert written.user.run("job", "watch", job["id"]).returncode != 0
    written.user.until_state("guest", "off")
    written.guest.start(host)
    after = written.back_up()
    assert after["full"]
    assert all("killed" in d["why"] for d in after["disks"] if d["tracking"] == "persistent")
    written.require(after["id"], written.expected())
    pruned = written.user("backup", "prune", str(written.directory), "--keep", "1", "--yes")
    assert after["id"] not in pruned["removed"]
    assert [b["id"] for b in written.user("backup", "list", str(written.directory))] == [after["id"]]


@pytest.fixture(autouse=True)
def _nothing_stands(guest: Bench) -> Iterator[None]:
    yield
    for host in guest.hosts:
        host.failpoints.clear()
