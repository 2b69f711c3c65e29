"""Disks that come and go at a real QEMU."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, IoLimits, Media
from hostler.model.errors import (
    AlreadyExists,
    BadImage,
    HostlerError,
    InUse,
    NotFound,
    QemuFailed,
    TimedOut,
    WrongState,
)
from hostler.model.machine import RunStatus
from hostler.qemu import blockdev, commands, hotplug
from hostler.qemu import commands_block as block
from hostler.qemu.machine import QemuMachine
from hostler.qemu.qmp import QmpSession
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component

WAIT = 30.0
"""Seconds a detach may take; it takes milliseconds."""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as made:
        yield made


def is_open(path: str, pid: int) -> bool:
    """Whether the process has the file open."""
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    return path in links


def lockable(path: str) -> bool:
    """Whether somebody else could open the image for writing now."""
    return subprocess.run(["qemu-io", "-f", "raw", "-c", "q", path], capture_output=True, check=False).returncode == 0


async def session_of(machine: QemuMachine) -> QmpSession:
    """A session of the test's own, in place of the machine's."""
    await machine.close()
    return await QmpSession.connect(f"{machine.process.run_dir}/qmp.sock", deadline=30)


@pytest.mark.parametrize("format", list(ImageFormat))
async def test_a_disk_of_each_format_comes_and_goes(rig: Rig, format: ImageFormat) -> None:
    machine = await rig.start()
    disk = await rig.disk("data", unit=5, format=format)
    for _ in range(2):  # a second attach finds it there
        await machine.attach_disk(disk)
    assert await machine.attached_disks() == {"data"}
    assert is_open(disk.source.path, machine.process.pid)
    assert not lockable(disk.source.path)
    assert await machine.io_failed() == {}
    for _ in range(2):
        await machine.detach_disk("data", WAIT)
    assert await machine.attached_disks() == frozenset()
    assert not is_open(disk.source.path, machine.process.pid)
    assert lockable(disk.source.path)
    await machine.attach_disk(disk)


async def test_a_disk_goes_from_a_guest_that_stands_still(rig: Rig) -> None:
    machine = await rig.launch(rig.spec(disks=(await rig.disk("first"),)))
    await machine.detach_disk("first", WAIT)  # never ran
    disk = await rig.disk("second")
    await machine.run()
    await machine.attach_disk(disk)
    await machine.stop()
    await machine.detach_disk("second", WAIT)
    assert await machine.attached_disks() == frozenset()
    assert await machine.status() is RunStatus.PAUSED


async def test_all_units_of_a_controller_can_be_taken(rig: Rig) -> None:
    machine = await rig.start()
    source = await rig.image("shared.img")
    disks = [Disk(id=f"d{unit}", source=source, unit=unit, read_only=True) for unit in range(64)]
    await asyncio.gather(*(machine.attach_disk(disk) for disk in disks))
    assert len(await machine.attached_disks()) == 64
    await asyncio.gather(*(machine.detach_disk(disk.id, WAIT) for disk in disks))
    assert await machine.attached_disks() == frozenset()
    assert not is_open(source.path, machine.process.pid)


async def test_a_node_left_without_its_device_is_repaired(rig: Rig) -> None:
    machine = await rig.start()
    disk = await rig.disk("data")
    session = await session_of(machine)
    # A daemon was killed between blockdev-add and device_add, with other options at that.
    await commands.blockdev_add(session, blockdev.blockdev_options(disk.but(read_only=True)))
    await session.close()
    machine = await adopted(rig)
    await machine.attach_disk(disk)
    assert not lockable(disk.source.path)
    session = await session_of(machine)
    # And between device_del and blockdev-del.
    await commands.device_del(session, blockdev.device_id(disk))
    await session.close()
    machine = await adopted(rig)
    await machine.detach_disk("data", WAIT)
    assert not is_open(disk.source.path, machine.process.pid)


async def adopted(rig: Rig) -> QemuMachine:
    machine = await rig.adopt(rig.spec())
    assert machine is not None
    return machine


async def test_an_image_that_another_machine_writes_is_refused(rig: Rig) -> None:
    disk = await rig.disk("data")
    first, second = await rig.start("a"), await rig.start("b")
    await first.attach_disk(disk)
    with pytest.raises(InUse) as caught:
        await second.attach_disk(disk)
    assert disk.source.path in caught.value.cause
    assert caught.value.details["path"] == disk.source.path
    assert await second.attached_disks() == frozenset()
    assert not is_open(disk.source.path, second.process.pid)
    await first.detach_disk("data", WAIT)
    await second.attach_disk(disk)


async def test_one_image_twice_in_one_machine_is_refused(rig: Rig) -> None:
    machine = await rig.start()
    disk = await rig.disk("data")
    await machine.attach_disk(disk)
    with pytest.raises(InUse):
        await machine.attach_disk(disk.but(id="twice", unit=1))
    assert await machine.attached_disks() == {"data"}


async def test_a_taken_address_or_id_is_refused_and_leaves_nothing(rig: Rig) -> None:
    machine = await rig.start()
    first, second = await rig.disk("first"), await rig.disk("second")
    await machine.attach_disk(first)
    with pytest.raises(AlreadyExists) as caught:
        await machine.attach_disk(second)
    assert "unit 0" in caught.value.cause
    with pytest.raises(AlreadyExists) as caught:
        await machine.attach_disk(second.but(id="first", unit=3))
    assert first.source.path in caught.value.cause
    assert await machine.attached_disks() == {"first"}
    assert not is_open(second.source.path, machine.process.pid)


@pytest.mark.parametrize(
    ("format", "content", "kind"),
    [
        (ImageFormat.QCOW2, b"\0" * 65536, BadImage),
        (ImageFormat.VHDX, b"\0" * 65536, BadImage),
        (ImageFormat.VHD, b"\0" * 65536, BadImage),
        (ImageFormat.QCOW2, b"QFI\xfb\0\0\0\x63" + b"\0" * 65536, HostlerError),
        (ImageFormat.QCOW2, None, NotFound),
        (ImageFormat.RAW, None, NotFound),
    ],
)
async def test_a_bad_image_is_refused_by_its_name(
    rig: Rig, format: ImageFormat, content: bytes | None, kind: type[HostlerError]
) -> None:
    machine = await rig.start()
    path = rig.path / "bad.img"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind):
        await machine.attach_disk(Disk(id="bad", source=DiskSource(path=str(path), format=format)))
    assert await machine.attached_disks() == frozenset()
    assert not is_open(str(path), machine.process.pid)


async def test_a_disk_without_its_controller_leaves_no_node(rig: Rig) -> None:
    machine = await rig.start()
    disk = await rig.disk("data")
    with pytest.raises(QemuFailed):
        await machine.attach_disk(disk.but(controller=3))
    assert not is_open(disk.source.path, machine.process.pid)
    with pytest.raises(WrongState):
        await machine.attach_disk(disk.but(bus=Bus.IDE))


async def test_a_qemu_that_hangs_is_told_as_unknown_and_repaired_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostler.qemu.commands.BLOCK_DEADLINE", 0.2)
    monkeypatch.setattr("hostler.qemu.hotplug.UNDO_TIMEOUT", 0.2)
    machine = await rig.start()
    disk = await rig.disk("data")
    os.kill(machine.process.pid, signal.SIGSTOP)
    with pytest.raises(TimedOut):
        await machine.attach_disk(disk)
    os.kill(machine.process.pid, signal.SIGCONT)
    monkeypatch.undo()
    await machine.attach_disk(disk)
    assert await machine.attached_disks() == {"data"}


async def test_a_disk_of_a_block_device(rig: Rig) -> None:
    """Where loop devices can be made, a whole block device is attached."""
    source = await rig.image("backing.img")
    losetup = shutil.which("losetup") or "/sbin/losetup"
    made = await asyncio.to_thread(
        subprocess.run, [losetup, "--find", "--show", source.path], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("no loop device can be made here")
    device = made.stdout.strip()
    try:
        machine = await rig.start()
        disk = Disk.model_validate({"id": "loop", "source": {"kind": "device", "path": device}})
        await machine.attach_disk(disk)
        assert is_open(device, machine.process.pid)
        await machine.detach_disk("loop", WAIT)
        assert not is_open(device, machine.process.pid)
        await machine.quit()
    finally:
        await asyncio.to_thread(subprocess.run, [losetup, "--detach", device], check=True)


async def test_io_that_fails_stops_the_guest_and_names_the_disk(rig: Rig) -> None:
    """The firmware looks for something to boot on a disk on which every read fails."""
    machine = await rig.launch(rig.spec())
    disk = await rig.disk("data")
    session = await session_of(machine)
    try:
        events = session.events()
        broken = {
            "driver": "blkdebug",
            "node-name": "data",
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5}],
            "image": blockdev.blockdev_options(disk)["file"],
        }
        await commands.blockdev_add(session, broken)
        await commands.device_add(session, blockdev.device_options(disk))
        await commands.cont(session)
        event = await events.wait_for(lambda e: e.name == "BLOCK_IO_ERROR", 60)
        assert event is not None
        assert event.data["node-name"] == "data"
        assert await events.wait_for(lambda e: e.name == "STOP", 60) is not None
        assert await commands.query_status(session) is RunStatus.IO_ERROR
        assert await hotplug.io_failed(session) == {"data": "failed"}
        await hotplug.detach_disk(session, "data", WAIT)
        assert await hotplug.io_failed(session) == {}
    finally:
        await session.close()


async def test_limits_hold_from_the_start_and_through_a_change_of_medium(rig: Rig) -> None:
    limits = IoLimits(iops=100, iops_burst=200, bandwidth_read=1024**2)
    iso = await rig.image("a.iso")
    drive = Disk(id="cd", source=iso, unit=1, media=Media.CDROM, limits=limits)
    machine = await rig.start(disks=((await rig.disk("first")).but(limits=limits), drive))
    await machine.attach_disk((await rig.disk("second", unit=2)).but(limits=limits))
    await machine.blocks.change_medium(drive.but(source=await rig.image("b.iso")))
    session = await session_of(machine)
    try:
        found = {
            block.device_of(str(device["qdev"])): device["inserted"]
            for device in await session.execute("query-block")  # type: ignore[union-attr]
            if isinstance(device, dict)
        }
        for disk in ("disk-first", "disk-second", "disk-cd"):
            inserted = found[disk]
            assert isinstance(inserted, dict)
            assert (inserted["iops"], inserted["iops_max"], inserted["bps_rd"]) == (100, 200, 1024**2)
    finally:
        await session.close()
