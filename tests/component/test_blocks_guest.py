"""A guest that writes and verifies while QEMU works on its disks: nothing is lost, whatever is done below it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from writing_guest import SEED, SPAN, WAIT, Guest, until, writing_guest

from hostler.host.resources import base_of
from hostler.model.disk import Disk, DiskSource, ImageFormat, IoLimits, Media, SourceKind
from hostler.model.errors import GuestRefused, InvalidInput, NotFound, NotPermitted
from hostler.model.machine import MigrationEnd, RunStatus
from hostler.model.migration import MigrationSettings
from hostler.model.units import MiB

pytestmark = pytest.mark.component


@pytest.fixture
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[Guest]:
    async with writing_guest(getattr(request, "param", ImageFormat.QCOW2)) as made:
        yield made


async def between(guest: Guest, *steps: Callable[[], Awaitable[None]]) -> None:
    for step in steps:
        await step()
        await guest.writes_on()
        await guest.check()


@pytest.mark.parametrize("guest", [ImageFormat.QCOW2, ImageFormat.VHD], indirect=True)
async def test_layers_come_and_go_under_a_writing_guest(guest: Guest) -> None:
    if guest.disk.source.format is ImageFormat.QCOW2:
        await check_sparse_copy(guest)
    await between(guest, guest.push, guest.push, guest.push)
    assert len((await guest.machine.blocks.layers())["data"]) == 4
    await between(guest, lambda: guest.commit(1, 3))
    assert len((await guest.machine.blocks.layers())["data"]) == 2
    await between(guest, guest.push, lambda: guest.commit(0, 2))
    assert (await guest.machine.blocks.layers())["data"] == ("data",)
    await guest.push()
    target = await guest.image()
    await between(guest, lambda: guest.mirror(target))
    served = await guest.image(ImageFormat.VHDX)
    socket = await guest.export(guest.disk.but(source=served))
    await between(guest, lambda: guest.mirror(served, socket))
    raw = await guest.image(ImageFormat.RAW)
    await between(guest, lambda: guest.mirror(raw))
    assert os.stat(raw.path).st_blocks * 512 < raw.size, "what the VHDX never held is a hole in the copy"
    await between(guest, guest.push, guest.push)
    await guest.machine.blocks.stream("up", guest.disk)
    await guest.machine.blocks.watch("up")
    await guest.machine.blocks.forget("up")
    await guest.writes_on()
    await guest.check()
    assert len((await guest.machine.blocks.layers())["data"]) == 1


async def check_sparse_copy(guest: Guest) -> None:
    """Of a qcow2 that never held zeroes a VHDX takes only what was written: 5 of 16 MiB."""
    target = await guest.image(ImageFormat.VHDX)
    socket = await guest.export(guest.disk.but(source=target))
    await guest.machine.blocks.mirror("move", guest.disk, target, socket)
    await guest.machine.blocks.watch("move", until_ready=True)
    await guest.machine.blocks.cancel("move")
    await guest.machine.blocks.forget("move")
    assert os.stat(target.path).st_blocks * 512 < 12 * MiB


async def test_what_is_marked_over_layers(guest: Guest) -> None:
    """At least what was written since, and not the whole disk, wherever layers come and go."""
    blocks = guest.machine.blocks
    await blocks.add_bitmaps([guest.disk], "day")
    await guest.serial.write("data", 8, 1 * MiB, 4 * MiB)
    above = guest.disk.but(source=await guest.image(backing=guest.disk.source))
    await blocks.push([above], {"data": ["day"]})
    guest.disk = above
    await guest.serial.write("data", 9, 1 * MiB, 5 * MiB)
    assert 2 * MiB <= (await blocks.bitmaps(guest.disk))["day"] <= 8 * MiB
    await guest.commit(0, 1)
    await guest.serial.write("data", 10, 1 * MiB, 6 * MiB)
    assert 3 * MiB <= (await blocks.bitmaps(guest.disk))["day"] <= 8 * MiB
    target = await guest.image()
    await blocks.mirror("move", guest.disk, target)
    await blocks.watch("move", until_ready=True)
    await guest.machine.stop()
    await blocks.keep_bitmaps(guest.disk, target)
    await blocks.finish("move")
    await guest.machine.run()
    await blocks.forget("move")
    guest.disk = guest.disk.but(source=target)
    assert 3 * MiB <= (await blocks.bitmaps(guest.disk))["day"] <= 8 * MiB
    await guest.check()


async def size_seen(guest: Guest, size: int) -> None:
    async def done() -> bool:
        return (await guest.serial.wait_disk("data")).size == size

    await until(done)


async def test_what_changes_on_a_running_guests_disks(guest: Guest) -> None:
    await check_resize(guest)
    await check_limits(guest)
    await check_media(guest)
    await check_freezing(guest)
    await guest.check()


async def check_resize(guest: Guest) -> None:
    blocks = guest.machine.blocks
    await guest.push()
    for size in (24 * MiB, 24 * MiB, 32 * MiB):
        await blocks.resize(guest.disk, size)
        await size_seen(guest, size)
    await guest.serial.write("data", 12, 1 * MiB, 30 * MiB)
    guest.disk = guest.disk.but(source=guest.disk.source.but(size=32 * MiB))
    await guest.commit(0, 1)
    assert (await guest.serial.verify("data", 12, 1 * MiB, 30 * MiB)).bad_sectors == 0
    guest.disk = guest.disk.but(source=guest.disk.source.but(size=32 * MiB))
    with pytest.raises(InvalidInput):
        await blocks.resize(guest.disk.but(source=guest.disk.source.but(format=ImageFormat.VHD_FIXED)), 64 * MiB)


async def check_limits(guest: Guest) -> None:
    """At least as slow as the limit says; how fast without one, no test can say."""
    await guest.machine.blocks.limit("data", IoLimits(iops_read=500, bandwidth=2 * MiB))
    clock = asyncio.get_running_loop().time
    before = clock()
    await guest.serial.write("data", 13, 4 * MiB, 12 * MiB)
    assert clock() - before > 1.0
    await guest.machine.blocks.limit("data", IoLimits(bandwidth=64 * MiB, bandwidth_burst=128 * MiB))
    await guest.machine.blocks.limit("data", IoLimits())
    with pytest.raises(NotFound):
        await guest.machine.blocks.limit("none", IoLimits(iops=5))


async def check_media(guest: Guest) -> None:
    rig, blocks = guest.rig, guest.machine.blocks
    discs = [(await rig.image(f"{size}.iso", size=size * MiB)) for size in (1, 2)]
    empty = DiskSource(kind=SourceKind.EMPTY, path="")
    drive = Disk(id="cd", source=empty, media=Media.CDROM, controller=1)
    await guest.machine.attach_disk(drive)

    async def drive_there() -> bool:
        return any(disk.cdrom for disk in await guest.serial.disks())

    await until(drive_there)
    for disc in (*discs, discs[1]):
        await blocks.change_medium(drive.but(source=disc))
        assert await guest.serial.hold("sr0") == disc.size
        await guest.serial.release()
    await guest.serial.hold("sr0")
    with pytest.raises(GuestRefused):
        await blocks.change_medium(drive.but(source=discs[0]))
    with pytest.raises(NotFound):
        await blocks.change_medium(drive.but(source=DiskSource(path="/none/x")))
    await blocks.change_medium(drive.but(source=discs[0].but(node="other")), force=True)
    assert (await blocks.layers())["cd"] == ("cd.other",)
    await guest.serial.release()
    assert await guest.serial.hold("sr0") == discs[0].size
    await guest.serial.release()
    for _ in range(2):
        await blocks.change_medium(drive.but(source=empty))
    assert (await blocks.layers()).get("cd", ()) == ()
    with pytest.raises(GuestRefused):
        await guest.serial.hold("sr0")


async def check_freezing(guest: Guest) -> None:
    blocks = guest.machine.blocks
    await blocks.thaw()
    assert await blocks.freeze(WAIT) == 1
    still = (await guest.serial.pattern_status()).acked
    await guest.push()
    assert (await guest.serial.pattern_status()).acked == still
    for _ in range(2):
        await blocks.thaw()
    await guest.writes_on()


async def test_all_256_disks_are_seen(guest: Guest) -> None:
    """Four controllers, each full: hot added side by side, all seen by the guest, none missing or twice."""
    sources = []
    for number in range(255):
        path = guest.rig.path / f"m{number}.img"
        with path.open("wb") as file:
            file.truncate(1 * MiB)
        sources.append(DiskSource(path=str(path), size=1 * MiB))
    disks = [
        Disk(id=f"d{n}", source=source, controller=n // 64, unit=n % 64, serial=f"s{n}")
        for n, source in enumerate(sources, start=1)
    ]
    await asyncio.gather(*(guest.machine.attach_disk(disk) for disk in disks))
    wanted = {"data", *(disk.serial for disk in disks)}

    async def all_there() -> bool:
        return {disk.serial for disk in await guest.serial.disks() if not disk.cdrom} == wanted

    await until(all_there)
    seen = {disk.serial: disk for disk in await guest.serial.disks() if not disk.cdrom}
    assert len(seen) == 256
    assert {seen[disk.serial].hctl.split(":")[3] for disk in disks if disk.controller == 3} == set(map(str, range(64)))
    assert len(await guest.machine.attached_disks()) == 256
    assert await guest.machine.status() is RunStatus.RUNNING
    await guest.check()


@pytest.mark.parametrize("guest", [ImageFormat.VHD], indirect=True)
async def test_a_chain_moves_with_its_guest(guest: Guest) -> None:
    """Three layers, the lowest one served over NBD, and a dirty bitmap: to another QEMU and back into a file."""
    await guest.machine.blocks.limit("data", IoLimits(iops=5000))
    await guest.push()
    await guest.machine.blocks.add_bitmaps([guest.disk], "day")
    above = guest.disk.but(source=await guest.image(backing=guest.disk.source))
    await guest.machine.blocks.push([above], {"data": ["day"]})
    guest.disk = above
    marked = (await guest.machine.blocks.bitmaps(guest.disk))["day"]
    await move(guest)
    await guest.check()
    assert (await guest.machine.blocks.bitmaps(guest.disk))["day"] >= marked
    state = guest.rig.path / "state"
    await guest.machine.save_to(str(state), lambda _: None)
    await guest.machine.quit()
    guest.machine = await guest.rig.launch(await guest.at(guest.spec.run_dir, incoming=True))
    await guest.exports.open_image(guest.spec.run_dir, base_of(guest.disk))
    await guest.machine.load_from(str(state))
    await guest.machine.run()
    assert (await guest.machine.blocks.bitmaps(guest.disk))["day"] >= marked
    await guest.check()
    await between(guest, lambda: guest.commit(0, 1))
    assert (await guest.machine.blocks.bitmaps(guest.disk))["day"] >= marked


async def move(guest: Guest) -> None:
    """To another QEMU, as the hosts do it."""
    here, there = guest.spec.run_dir, f"{guest.rig.path}/b.run"
    target = await guest.rig.launch(await guest.at(there, incoming=True))
    address = await target.listen(MigrationSettings(), "ab" * 32, "127.0.0.1")
    result = await guest.machine.migrate_to(address, MigrationSettings(), "ab" * 32, lambda _: None)
    assert result.end is MigrationEnd.COMPLETED
    await guest.exports.close_image(here, base_of(guest.disk))
    await guest.exports.open_image(there, base_of(guest.disk))
    await target.run()
    await guest.machine.quit()
    await guest.exports.stop_all(here)
    guest.machine, guest.spec = target, guest.spec.but(run_dir=there)
    guest.serial.move_to(f"{there}/serial.sock")


@pytest.mark.parametrize("guest", [ImageFormat.VHD], indirect=True)
async def test_a_merge_into_what_was_served_for_reading_only(guest: Guest) -> None:
    """After a restart the base below another layer is only read; its export is started anew for the merge."""
    await guest.push()
    await guest.serial.pattern_stop()
    await guest.machine.quit()
    await guest.exports.stop_all(guest.spec.run_dir)
    await guest.boot()
    await guest.serial.pattern_start("data", SEED, SPAN)
    chain = list(guest.disk.source.layers())
    with pytest.raises(NotPermitted):
        await guest.machine.blocks.commit("merge", guest.disk, chain[0], chain[1])
    served = base_of(guest.disk)
    await guest.exports.close_image(guest.spec.run_dir, served)
    await guest.exports.open_image(guest.spec.run_dir, served.but(read_only=False))
    await between(guest, lambda: guest.commit(0, 1))
    assert (await guest.machine.blocks.layers())["data"] == ("data",)
