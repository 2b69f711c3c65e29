"""A guest that writes and verifies while QEMU works on its disks: nothing is lost, whatever is done below it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostler.model.disk import Disk, DiskSource, ImageFormat, IoLimits, Media, SourceKind
from hostler.model.errors import GuestRefused, InvalidInput, NotFound
from hostler.model.machine import LaunchSpec, RunStatus
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot
from hostler.qemu.machine import QemuMachine
from hostler.storage.exports import Exports
from hostler.testing import microguest
from hostler.testing.guestclient import GuestSerial
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component

SIZE = 16 * MiB
SEED = 41
WAIT = 60.0


@dataclass
class Guest:
    """A running guest whose disk "data" is under a journal, and what is below it."""

    rig: Rig
    spec: LaunchSpec
    machine: QemuMachine
    serial: GuestSerial
    disk: Disk
    exports: Exports
    images: list[DiskSource] = field(default_factory=list)

    async def image(self, format: ImageFormat = ImageFormat.QCOW2, backing: DiskSource | None = None) -> DiskSource:
        token = secrets.token_hex(3)
        made = await self.rig.image(f"{token}.img", format, SIZE)
        return made.but(node=token, backing=backing)

    async def push(self) -> None:
        self.disk = self.disk.but(source=await self.image(backing=self.disk.source))
        await self.machine.blocks.push([self.disk])

    async def commit(self, top: int, base: int) -> None:
        chain = list(self.disk.source.layers())
        blocks = self.machine.blocks
        await blocks.commit("merge", self.disk, chain[top], chain[base])
        if top == 0:
            await self.switch("merge")
        else:
            await blocks.watch("merge")
        await blocks.forget("merge")
        self.disk = self.disk.but(source=without(self.disk.source, top, base))

    async def mirror(self, target: DiskSource, export: str | None = None) -> None:
        await self.machine.blocks.mirror("move", self.disk, target, export)
        await self.switch("move")
        await self.machine.blocks.forget("move")
        self.disk = self.disk.but(source=target)

    async def switch(self, job: str) -> None:
        await self.machine.blocks.watch(job, until_ready=True)
        await self.machine.stop()
        await self.machine.blocks.finish(job)
        await self.machine.run()

    async def writes_on(self) -> None:
        """Until the guest has written some more."""
        before = (await self.serial.pattern_status()).acked
        async with asyncio.timeout(WAIT):
            while (status := await self.serial.pattern_status()).acked < before + 5:
                assert status.errno == 0
                await asyncio.sleep(0.02)

    async def check(self) -> None:
        """Everything is there: the still part, and the journal up to its last block."""
        await self.serial.pattern_stop()
        reading = await self.serial.pattern_verify("data", SEED)
        assert reading.sound, reading
        assert (await self.serial.verify("data", 7, 4 * MiB, 8 * MiB)).bad_sectors == 0
        await self.serial.pattern_start("data", SEED, 1 * MiB)


def without(source: DiskSource, top: int, base: int) -> DiskSource:
    chain = list(source.layers())
    new = chain[base]
    for layer in reversed(chain[:top]):
        new = layer.but(backing=new)
    return new


@pytest.fixture
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[Guest]:
    format: ImageFormat = getattr(request, "param", ImageFormat.QCOW2)
    kept = microguest.build()
    kernel = KernelBoot(kernel=str(kept.kernel), initrd=str(kept.initrd), cmdline=kept.cmdline)
    exports = Exports()
    async with Rig() as rig:
        source = await rig.image("data.img", format, SIZE)
        disk = Disk(id="data", source=source, serial="data")
        spec = rig.spec(kernel=kernel, memory=192 * MiB, disks=(disk,), scsi_controllers=4)
        served = {}
        if source.exported:
            Path(spec.run_dir).mkdir()
            served = {"data": await exports.start(spec.run_dir, disk)}
        try:
            machine = await rig.launch(spec.but(exports=served))
            await machine.run()
            async with GuestSerial.unix(f"{spec.run_dir}/serial.sock") as serial:
                await serial.wait_ready(90)
                made = Guest(rig, spec, machine, serial, disk, exports)
                await serial.write("data", 7, 4 * MiB, 8 * MiB)
                await serial.pattern_start("data", SEED, 1 * MiB)
                yield made
        finally:
            await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
            await exports.stop_all(spec.run_dir)


async def between(guest: Guest, *steps: Callable[[], Awaitable[None]]) -> None:
    for step in steps:
        await step()
        await guest.writes_on()
        await guest.check()


@pytest.mark.parametrize("guest", [ImageFormat.QCOW2, ImageFormat.VHD, ImageFormat.RAW], indirect=True)
async def test_layers_come_and_go_under_a_writing_guest(guest: Guest) -> None:
    await between(guest, guest.push, guest.push, guest.push)
    assert len((await guest.machine.blocks.layers())["data"]) == 4
    await between(guest, lambda: guest.commit(1, 3))
    assert len((await guest.machine.blocks.layers())["data"]) == 2
    await between(guest, guest.push, lambda: guest.commit(0, 2))
    assert (await guest.machine.blocks.layers())["data"] == ("data",)
    await guest.push()
    target = await guest.image()
    await between(guest, lambda: guest.mirror(target))
    raw = await guest.image(ImageFormat.RAW)
    await between(guest, lambda: guest.mirror(raw))
    await between(guest, guest.push, guest.push)
    await guest.machine.blocks.stream("up", guest.disk)
    await guest.machine.blocks.watch("up")
    await guest.machine.blocks.forget("up")
    await guest.writes_on()
    await guest.check()
    assert len((await guest.machine.blocks.layers())["data"]) == 1


async def test_increments_over_layers_give_the_disk_back(guest: Guest) -> None:
    """A full backup and two increments, taken while the guest writes and layers come and go, are what the disk was."""
    blocks = guest.machine.blocks
    full = await copied(guest, fresh="day")
    await guest.serial.write("data", 8, 1 * MiB, 4 * MiB)
    guest.disk = guest.disk.but(source=await guest.image(backing=guest.disk.source))
    await blocks.push([guest.disk], {"data": ["day"]})
    await guest.serial.write("data", 9, 1 * MiB, 5 * MiB)
    marked = (await blocks.bitmaps(guest.disk))["day"]
    assert 2 * MiB <= marked <= 8 * MiB
    first = await copied(guest, bitmap="day", fresh="day", on=full)
    assert (await blocks.bitmaps(guest.disk))["day"] <= 2 * MiB
    await guest.serial.write("data", 10, 1 * MiB, 6 * MiB)
    await guest.commit(0, 1)
    await guest.serial.write("data", 11, 1 * MiB, 7 * MiB)
    await guest.machine.stop()
    second = await copied(guest, bitmap="day", on=first)
    truth = await copied(guest)
    await guest.machine.run()
    await compare(second, truth)
    await guest.check()


async def copied(
    guest: Guest, bitmap: str | None = None, fresh: str | None = None, on: DiskSource | None = None
) -> DiskSource:
    """A backup of the disk, finished; it builds on the one before."""
    target, blocks = await guest.image(), guest.machine.blocks
    await blocks.backup({"data": "copy"}, [guest.disk], {"data": target}, bitmap=bitmap, fresh=fresh)
    await blocks.watch("copy")
    await blocks.forget("copy")
    if on is not None:
        await run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", on.path, target.path)
    return target


async def compare(one: DiskSource, other: DiskSource) -> None:
    await run("qemu-img", "compare", "-f", one.format.value, "-F", other.format.value, one.path, other.path)


async def run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT):
        while True:
            if await done():
                return
            await asyncio.sleep(0.02)


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
