"""The disks of a running guest, changed through the command line and seen by the guest: identity, size, limits, media,
place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from userview import User, converse

from hostler.model.errors import ErrorCode
from hostler.model.units import MiB
from hostler.testing import microguest
from hostler.testing.guestclient import GuestDisk, GuestSerial
from hostler.testing.lab import Lab

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SIZE = 16 * MiB


class Machine:
    """The VM "guest" with one disk, and drives: a CD drive (disk1), a floppy drive (disk2)."""

    def __init__(self, user: User, directory: Path) -> None:
        self.user = user
        self.directory = directory
        built = microguest.build()
        for file in (built.kernel, built.initrd):
            shutil.copyfile(file, directory / file.name)
        boot = ["--kernel", str(directory / built.kernel.name), "--initrd", str(directory / built.initrd.name)]
        user("volume", "create", "data", str(SIZE), "--path", str(directory / "data.qcow2"))
        drives = ["--cdrom", "none", "--floppy", "none"]
        made = user(
            "vm", "create", "guest", "--memory", "128M", *boot, "--append", built.cmdline, "--disk", "data", *drives
        )
        self.id = made["config"]["id"]
        self.serial = made["config"]["disks"][0]["serial"]
        user("vm", "start", "guest")

    def disk(self, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.user("disk", "list", "guest")["config"]["disks"][number]
        return found

    def seen(self, serial: str | None = None) -> GuestDisk:
        """The disk as the guest sees it."""

        async def look(guest: GuestSerial) -> GuestDisk:
            await guest.wait_ready()
            return await guest.wait_disk(serial or self.serial)

        return converse(self.user.host, self.id, look)


@pytest.fixture(scope="module")
def machine(short_dir: Path) -> Iterator[Machine]:
    with Lab(short_dir, isolated=False) as lab:
        place = short_dir / "v"
        place.mkdir()
        place.chmod(0o755)
        yield Machine(User(lab.add_host("h")), place)


def test_a_disk_is_the_same_wherever_it_was(machine: Machine) -> None:
    """Serial number, worldwide name and address: after a hot add, a restart, a move and a change of its format."""
    user = machine.user
    user("disk", "add", "guest", "--new", "4M", "--unit", "7", "--serial", "EXTRA-1")
    first = (machine.seen(), machine.seen("EXTRA-1"))
    assert first[0].wwn.startswith("naa.5") and first[0].wwn != first[1].wwn
    assert first[1].hctl.endswith(":7")
    for words in (
        ("disk", "move", "guest", "disk0", "--to", str(machine.directory / "moved.raw"), "--format", "raw"),
        ("vm", "turn-off", "guest"),
        ("vm", "start", "guest"),
        ("disk", "move", "guest", "disk0", "--to", str(machine.directory / "moved.vhdx"), "--format", "vhdx"),
        ("vm", "save", "guest"),
        ("vm", "restore", "guest"),
        ("disk", "move", "guest", "disk0", "--to", str(machine.directory / "data.qcow2"), "--format", "qcow2"),
    ):
        user(*words)
        if words[0] == "disk" or words[1] in ("start", "restore"):
            now = (machine.seen(), machine.seen("EXTRA-1"))
            same = [(d.serial, d.wwn, d.hctl.split(":")[1:], d.size, d.model) for d in now]
            assert same == [(d.serial, d.wwn, d.hctl.split(":")[1:], d.size, d.model) for d in first], words
    user("disk", "remove", "guest", "disk3")


def test_growing(machine: Machine) -> None:
    user = machine.user
    user("disk", "grow", "guest", "disk0", "24M")

    async def write_behind(guest: GuestSerial) -> int:
        await guest.write(machine.serial, 5, 4 * MiB, 18 * MiB)
        return (await guest.verify(machine.serial, 5, 4 * MiB, 18 * MiB)).bad_sectors

    end = time.monotonic() + 30
    while machine.seen().size != 24 * MiB:
        assert time.monotonic() < end
    assert converse(user.host, machine.id, write_behind) == 0
    user.refused(ErrorCode.INVALID_INPUT, 2, "disk", "grow", "guest", "disk0", "20M")
    assert user("volume", "show", "data")["size"] == 24 * MiB


def test_limits(machine: Machine) -> None:
    """At least as slow as was said, also after the next start."""
    user = machine.user

    async def seconds(guest: GuestSerial) -> float:
        await guest.wait_ready()
        await guest.wait_disk(machine.serial)
        before = time.monotonic()
        await guest.write(machine.serial, 6, 4 * MiB)
        return time.monotonic() - before

    user("disk", "limit", "guest", "disk0", "--bandwidth", "2M", "--iops", "10000")
    assert converse(user.host, machine.id, seconds) > 1.0
    user("vm", "turn-off", "guest")
    user("vm", "start", "guest")
    assert converse(user.host, machine.id, seconds) > 1.0
    assert "limited" in user.run("disk", "list", "guest").stdout

    async def requests(guest: GuestSerial) -> int:
        run = await guest.io(machine.serial, writes=False, random=True, block=4096, depth=4, seconds=2)
        assert run.bytes == 4096 * run.requests
        return run.requests

    user("disk", "limit", "guest", "disk0", "--bandwidth", "0", "--iops", "50")
    assert 0 < converse(user.host, machine.id, requests) < 50 * 3
    user("disk", "limit", "guest", "disk0", "--none")
    assert "limited" not in user.run("disk", "list", "guest").stdout
    user.refused(ErrorCode.INVALID_INPUT, 2, "disk", "limit", "guest", "disk0")


def test_media(machine: Machine) -> None:
    user = machine.user
    for name, size in (("one.iso", 1), ("two.iso", 2)):
        (machine.directory / name).write_bytes(bytes(size * MiB))
    user("disk", "add", "guest", "--media", "cdrom")
    drive = str(machine.disk(3)["id"])

    async def holds(guest: GuestSerial) -> int:
        return await guest.hold("sr0")

    for name, size in (("one.iso", 1), ("two.iso", 2)):
        user("disk", "media", "guest", drive, str(machine.directory / name))

        async def look(guest: GuestSerial) -> int:
            found = await guest.hold("sr0")
            await guest.release()
            return found

        assert converse(user.host, machine.id, look) == size * MiB
    converse(user.host, machine.id, holds)
    user.refused(ErrorCode.GUEST_REFUSED, 4, "disk", "media", "guest", drive, "--eject")
    user("disk", "media", "guest", drive, "--eject", "--force")
    assert "(empty)" in user.run("disk", "list", "guest").stdout

    async def release(guest: GuestSerial) -> None:
        await guest.release()

    converse(user.host, machine.id, release)
    user("disk", "media", "guest", "disk1", str(machine.directory / "one.iso"))
    user.refused(ErrorCode.IN_USE, 4, "disk", "media", "guest", "disk2", str(machine.directory / "one.iso"))
    (machine.directory / "a.vfd").write_bytes(bytes(1440 * 1024))
    user("disk", "media", "guest", "disk2", str(machine.directory / "a.vfd"))
    user("vm", "turn-off", "guest")
    user("vm", "start", "guest")
    user("disk", "media", "guest", "disk2", "--eject")
    user("disk", "remove", "guest", drive)
    assert machine.seen().serial == machine.serial


def test_changes_that_wait_for_the_next_start(machine: Machine) -> None:
    user = machine.user
    user.refused(ErrorCode.WRONG_STATE, 4, "disk", "change", "guest", "disk0", "--cache", "writeback")
    user("disk", "change", "guest", "disk0", "--cache", "writeback", "--no-discard", "--when-off")
    assert machine.disk()["cache"] == "none"
    user("vm", "turn-off", "guest")
    user("vm", "start", "guest")
    (qemu,) = user.host.qemus()
    assert '"direct":false' in " ".join(qemu.cmdline())
    assert (machine.disk()["cache"], machine.disk()["discard"]) == ("writeback", False)
    assert machine.seen().serial == machine.serial


def test_all_disks_go_together(machine: Machine) -> None:
    user = machine.user
    user("disk", "add", "guest", "--new", "4M", "--serial", "SECOND")
    place = machine.directory / "fast"
    place.mkdir()
    place.chmod(0o755)
    assert user.run("vm", "move-storage", "guest", "--to", str(place), "--dry-run").returncode == 0
    done = user.run("vm", "move-storage", "guest", "--to", str(place))
    assert done.returncode == 0, done
    assert len(list(place.iterdir())) == 2
    assert {str(Path(d["source"]["path"]).parent) for d in (machine.disk(), machine.disk(-1))} == {str(place)}
    assert {machine.seen().serial, machine.seen("SECOND").serial} == {machine.serial, "SECOND"}
