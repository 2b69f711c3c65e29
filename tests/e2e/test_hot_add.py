"""Disks given to a running guest and taken from it, in each format and as a passed-through device: seen, written,
carried through save, restart of the daemon and moves, never open twice, and whole when they are taken away."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from userview import User, converse

from hostler.model.disk import Bus, Disk
from hostler.model.errors import ErrorCode, LimitExceeded
from hostler.model.requests import DiskAdd
from hostler.model.units import KiB, MiB
from hostler.model.vm import VmRecord
from hostler.testing import microguest, patterns
from hostler.testing.bench_vm import Bench
from hostler.testing.guestclient import GuestDisk, GuestSerial, RangeVerdict
from hostler.testing.lab import LabHost

pytestmark = pytest.mark.e2e

SIZE = 8 * MiB
FORMATS = ("raw", "qcow2", "vhd-fixed", "vhd", "vhdx")
DRIVER = {"vhd-fixed": "vpc", "vhd": "vpc", "device": "raw"}
LENGTH = 256 * KiB
"""Bytes written at the start of a disk, and as many at its end."""
NEED_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root")
KINDS = [*FORMATS, pytest.param("device", marks=NEED_ROOT)]


@dataclass(frozen=True)
class Tried:
    """A disk of one kind. `where`: image or device; `seed`: of what the guest writes on it."""

    kind: str
    where: Path
    seed: int

    @property
    def serial(self) -> str:
        return f"HOT-{self.kind}"

    @property
    def option(self) -> tuple[str, str]:
        return ("--device" if self.kind == "device" else "--volume", str(self.where))

    @property
    def tail(self) -> int:
        """Where the second pattern begins."""
        return SIZE - LENGTH


@pytest.fixture(scope="module")
def loop_device(short_dir: Path) -> Iterator[Path | None]:
    if os.geteuid() != 0:
        yield None
        return
    backing = short_dir / "loop.img"
    backing.write_bytes(b"")
    os.truncate(backing, SIZE)
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=True)
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.fixture(scope="module")
def tried(guest: Bench, loop_device: Path | None) -> dict[str, Tried]:
    """A volume of each format, known to the first host, and a device."""
    user = User(guest.hosts[0])
    found = {}
    for number, kind in enumerate(FORMATS):
        found[kind] = Tried(kind, guest.shared / f"hot.{kind}", 1000 + number)
        user("volume", "create", kind, str(SIZE), "--format", kind, "--path", str(found[kind].where))
    if loop_device is not None:
        found["device"] = Tried("device", loop_device, 2000)
    return found


@pytest.fixture(scope="module")
def rivals(guest: Bench) -> dict[str, User]:
    """A running VM "rival" on each host, which would like the same disks."""
    users = {host.name: User(host) for host in guest.hosts}
    for name, user in users.items():
        user("vm", "create", f"rival-{name}", "--memory", "64M", "--start")
    return users


def attached(guest: Bench, tried: Tried) -> Disk | None:
    """The disk as the VM's configuration has it now."""
    record = guest.record(guest.owner())
    assert record is not None
    return next((disk for disk in record.config.disks if disk.serial == tried.serial), None)


def have_added(guest: Bench, disk: Tried) -> None:
    """It is in the guest, and carries its pattern at both ends."""
    host = guest.owner()
    if attached(guest, disk) is not None:
        return
    User(host)("disk", "add", "guest", *disk.option, "--serial", disk.serial)

    async def write(serial: GuestSerial) -> GuestDisk:
        seen = await serial.wait_disk(disk.serial)
        await serial.write(disk.serial, disk.seed, LENGTH)
        await serial.write(disk.serial, disk.seed, LENGTH, disk.tail)
        return seen

    seen = guest.ask(host, write)
    assert (seen.size, seen.read_only, seen.cdrom) == (SIZE, False, False)


def is_sound(guest: Bench, *disks: Tried) -> None:
    """The running guest reads back what it wrote."""

    async def verify(serial: GuestSerial) -> dict[str, list[RangeVerdict]]:
        return {
            disk.kind: [await serial.verify(disk.serial, disk.seed, LENGTH, at) for at in (0, disk.tail)]
            for disk in disks
        }

    for kind, verdicts in guest.ask(guest.owner(), verify).items():
        assert all((v.bytes, v.bad_sectors) == (LENGTH, 0) for v in verdicts), (kind, verdicts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_running_guest_gets_it(guest: Bench, tried: dict[str, Tried], kind: str) -> None:
    disk = tried[kind]
    have_added(guest, disk)
    is_sound(guest, disk)
    found = attached(guest, disk)
    assert found is not None and found.bus is Bus.SCSI
    again = User(guest.owner()).refused(ErrorCode.IN_USE, 4, "disk", "add", "guest", *disk.option)
    assert "guest" in again["cause"]


def vm_of(host: LabHost, name: str) -> VmRecord:
    with host.client() as client:
        return client.vms.get(name)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_else_can_open_it(guest: Bench, tried: dict[str, Tried], rivals: dict[str, User], kind: str) -> None:
    """On the same host by our own record, which names the holder; on the other by QEMU's lock."""
    disk = tried[kind]
    have_added(guest, disk)
    owner, other = guest.owner(), guest.other(guest.owner())
    more = ("--format", "raw") if kind == "raw" else ()
    for host in (owner, other):
        rival = f"rival-{host.name}"
        before = vm_of(host, rival)
        problem = rivals[host.name].refused(ErrorCode.IN_USE, 4, "disk", "add", rival, *disk.option, *more)
        assert str(disk.where) in problem["object"] + problem["cause"], problem
        if host is owner:
            assert "guest" in problem["cause"], problem
        assert vm_of(host, rival) == before
    is_sound(guest, disk)


def save_and_restore(guest: Bench, host: LabHost) -> None:
    User(host)("vm", "save", "guest")
    User(host)("vm", "restore", "guest")


def kill_daemon(_guest: Bench, host: LabHost) -> None:
    host.kill()
    host.start()


def move(guest: Bench, host: LabHost) -> None:
    User(host)("vm", "move", "guest", guest.other(host).name)


@pytest.mark.parametrize("action", [save_and_restore, kill_daemon, move, move], ids=lambda action: action.__name__)
def test_all_of_them_stay_with_the_guest(
    guest: Bench, tried: dict[str, Tried], action: Callable[[Bench, LabHost], None]
) -> None:
    for disk in tried.values():
        have_added(guest, disk)
    before = [attached(guest, disk) for disk in tried.values()]
    action(guest, guest.owner())
    is_sound(guest, *tried.values())
    guest.check(guest.owner())
    assert [attached(guest, disk) for disk in tried.values()] == before and None not in before


@pytest.mark.parametrize("kind", KINDS)
def test_taken_away_it_is_whole_and_free(guest: Bench, tried: dict[str, Tried], kind: str) -> None:
    disk = tried[kind]
    have_added(guest, disk)
    found, host = attached(guest, disk), guest.owner()
    assert found is not None

    async def name_in_guest(serial: GuestSerial) -> str:
        return (await serial.wait_disk(disk.serial)).name

    name = guest.ask(host, name_in_guest)
    User(host)("disk", "remove", "guest", found.id)

    async def gone(serial: GuestSerial) -> None:
        await serial.wait_disk_gone(name)

    guest.ask(host, gone)
    assert attached(guest, disk) is None
    assert not [p for p in host.processes() if found.id in " ".join(p.cmdline()) and "storage" in p.name()]
    judge_image(guest, disk)
    guest.check(host)


def judge_image(guest: Bench, disk: Tried) -> None:
    """From outside, with nothing of ours: it can be opened for writing, is undamaged, and has the patterns."""
    if disk.kind not in ("raw", "device"):  # formats with something to check; fixed VHDs have nothing either
        driver = DRIVER.get(disk.kind, disk.kind)
        checked = subprocess.run(
            ["qemu-img", "check", "-f", driver, str(disk.where)], capture_output=True, text=True, check=False
        )
        assert checked.returncode in (0, 63), checked.stderr  # 63: the format has no check (VHD)
    plain = guest.shared / f"{disk.kind}.plain"
    driver = DRIVER.get(disk.kind, disk.kind)
    subprocess.run(["qemu-img", "convert", "-f", driver, "-O", "raw", str(disk.where), str(plain)], check=True)
    content = plain.read_bytes()
    plain.unlink()
    assert content[:LENGTH] == patterns.pattern(disk.seed, LENGTH)
    assert content[disk.tail : SIZE] == patterns.pattern(disk.seed, LENGTH, disk.tail)
    subprocess.run(["qemu-io", "-f", driver, "-c", "write 1M 512", str(disk.where)], check=True, capture_output=True)


def test_a_controller_takes_64_disks_while_the_guest_runs(guest: Bench) -> None:
    """And refuses one more; after a start from nothing they are all there again."""
    host = guest.hosts[0]
    built = microguest.build()
    boot = ["--kernel", str(guest.shared / built.kernel.name), "--initrd", str(guest.shared / built.initrd.name)]
    User(host)("vm", "create", "full", "--memory", "128M", *boot, "--append", built.cmdline, "--start")
    for number in range(65):
        (guest.shared / f"many{number}").write_bytes(bytes(512 * (number + 1)))
    with host.client() as client:
        for number in range(64):
            disk = DiskAdd.model_validate({"volume": str(guest.shared / f"many{number}"), "format": "raw"})
            client.jobs.finish(client.vms.attach_disk("full", disk, wait=30))
        with pytest.raises(LimitExceeded, match="64"):
            client.vms.attach_disk("full", disk.model_copy(update={"volume": str(guest.shared / "many64")}), wait=30)
        vm_id = client.vms.get("full").id
    look_at_64(host, vm_id)
    User(host)("vm", "turn-off", "full")
    User(host)("vm", "start", "full")
    look_at_64(host, vm_id)
    User(host)("vm", "turn-off", "full")
    User(host)("vm", "delete", "full", "--yes")


def look_at_64(host: LabHost, vm_id: str) -> None:
    """The guest sees 64 disks, each at its own address, which tells its size."""

    async def look(serial: GuestSerial) -> list[GuestDisk]:
        return await serial.disks()

    seen = converse(host, vm_id, look)
    assert sorted((int(d.hctl.split(":")[-1]), d.size) for d in seen) == [(n, 512 * (n + 1)) for n in range(64)]
