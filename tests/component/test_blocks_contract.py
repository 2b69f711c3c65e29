"""The contract of host.blocks, kept by the real QEMU and by the simulated one alike."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import images
import pytest

from hostler.host.hypervisor import Hypervisor, Machine
from hostler.model.blockjob import BlockJobState
from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, IoLimits, Media, SourceKind
from hostler.model.errors import Busy, Cancelled, InUse, InvalidInput, NotFound, QemuFailed, WrongState
from hostler.qemu import blockdev
from hostler.testing.machines import Rig
from hostler.testing.simulated import SimulatedHypervisor, World

pytestmark = pytest.mark.component

WAIT = 30.0
QCOW2 = ImageFormat.QCOW2


class Host:
    """A hypervisor and what a test needs around it."""

    def __init__(self, rig: Rig, hypervisor: Hypervisor) -> None:
        self.rig = rig
        self.hypervisor = hypervisor
        self._machines: list[Machine] = []

    async def start(self, *disks: Disk, place: str = "a") -> Machine:
        spec = self.rig.spec(place, disks=disks)
        machine = await self.hypervisor.launch(spec)
        self._machines.append(machine)
        await machine.run()
        return machine

    async def adopt(self, machine: Machine, place: str = "a") -> Machine:
        """The daemon was restarted."""
        await machine.close()
        spec = self.rig.spec(place)
        found = await self.hypervisor.adopt(spec.config.id, spec.run_dir)
        assert found is not None
        self._machines.append(found)
        return found

    async def source(self, format: ImageFormat = QCOW2, backing: DiskSource | None = None) -> DiskSource:
        """A new image; with `backing`, a layer on top of that."""
        token = secrets.token_hex(3)
        image = await self.rig.image(f"{token}.img", format)
        return image.but(node=token, backing=backing)

    async def disk(self, layers: int = 1, unit: int = 0, name: str = "data") -> Disk:
        """A disk of so many layers."""
        source = (await self.source()).but(node="")
        for _ in range(layers - 1):
            source = await self.source(backing=source)
        return Disk(id=name, source=source, unit=unit)

    async def on_top(self, disk: Disk) -> Disk:
        """The disk with a new layer, made but not pushed."""
        return disk.but(source=await self.source(backing=disk.source))

    async def clear(self) -> None:
        for machine in self._machines:
            await machine.quit()
            await machine.close()


@pytest.fixture(params=["simulated", "real"])
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    async with Rig() as rig:
        simulated = request.param == "simulated"
        made = Host(rig, SimulatedHypervisor(world=World()) if simulated else rig.hypervisor)
        try:
            yield made
        finally:
            await made.clear()


def nodes(disk: Disk) -> tuple[str, ...]:
    return tuple(blockdev.layer_node(disk, layer) for layer in disk.source.layers())


async def test_layers_of_a_chain_that_was_there_at_the_start(host: Host) -> None:
    one, two = await host.disk(3), await host.disk(1, unit=1, name="b" * 31)
    machine = await host.start(one, two)
    assert await machine.blocks.layers() == {one.id: nodes(one), two.id: nodes(two)}


async def test_push(host: Host) -> None:
    one, two = await host.disk(), await host.disk(2, unit=1, name="a-name-of-31-characters-exactly")
    machine = await host.start(one, two)
    higher = [await host.on_top(disk) for disk in (one, two)]
    for _ in range(2):
        await machine.blocks.push(higher)
    assert await machine.blocks.layers() == {disk.id: nodes(disk) for disk in higher}
    machine = await host.adopt(machine)
    highest = await host.on_top(higher[0])
    await machine.blocks.push([highest, higher[1]])
    assert await machine.blocks.layers() == {one.id: nodes(highest), two.id: nodes(higher[1])}
    for disk in (one, two):
        await machine.detach_disk(disk.id, WAIT)
    assert await machine.blocks.layers() == {}
    await machine.attach_disk(highest)


async def test_push_is_all_or_none(host: Host) -> None:
    one, two = await host.disk(), await host.disk(unit=1, name="other")
    machine = await host.start(one, two)
    good = await host.on_top(one)
    bad = await host.on_top(two)
    missing = bad.but(source=bad.source.but(path="/none/x"))
    with pytest.raises(NotFound):
        await machine.blocks.push([good, missing])
    elsewhere = bad.but(source=bad.source.but(backing=await host.source()))
    with pytest.raises(WrongState):
        await machine.blocks.push([good, elsewhere])
    assert await machine.blocks.layers() == {"data": nodes(one), "other": nodes(two)}
    await machine.blocks.push([good, bad])
    assert await machine.blocks.layers() == {"data": nodes(good), "other": nodes(bad)}


async def test_a_pushed_layer_is_written_by_one_machine_only(host: Host) -> None:
    disk = await host.on_top(await host.disk())
    machine = await host.start(disk.but(source=disk.source.backing))
    await machine.blocks.push([disk])
    with pytest.raises(InUse):
        await host.start(disk, place="b")


@pytest.mark.parametrize("format", [ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHD_FIXED])
@pytest.mark.parametrize("layers", [1, 3])
async def test_mirror(host: Host, format: ImageFormat, layers: int) -> None:
    disk = await host.disk(layers)
    machine = await host.start(disk)
    target = await host.source(format)
    for _ in range(2):
        await machine.blocks.mirror("move", disk, target)
    seen: list[float | None] = []
    ready = await machine.blocks.watch("move", lambda job: seen.append(job.fraction), until_ready=True)
    assert (ready.state, ready.kind) == (BlockJobState.READY, "mirror")
    assert seen
    assert await machine.blocks.layers() == {"data": nodes(disk)}
    with pytest.raises(Busy):
        await machine.detach_disk("data", WAIT)
    with pytest.raises(Busy):
        await machine.blocks.push([await host.on_top(disk)])
    await machine.stop()
    for _ in range(2):
        await machine.blocks.finish("move")
    moved = disk.but(source=target)
    assert await machine.blocks.layers() == {"data": nodes(moved)}
    job = await machine.blocks.job("move")
    assert job is not None
    assert job.state is BlockJobState.DONE
    await machine.run()
    for _ in range(2):
        await machine.blocks.forget("move")
    assert await machine.blocks.job("move") is None
    if format is not ImageFormat.VHD_FIXED:
        await machine.blocks.push([await host.on_top(moved)])
    other = await host.start(disk, place="b")  # the old image is free
    await other.quit()
    await machine.detach_disk("data", WAIT)


@pytest.mark.parametrize("how", ["running", "ready", "adopted"])
async def test_a_mirror_given_up(host: Host, how: str) -> None:
    disk = await host.disk(2)
    machine = await host.start(disk)
    target = await host.source()
    await machine.blocks.mirror("move", disk, target, speed=1 if how == "running" else 0)
    if how != "running":
        await machine.blocks.watch("move", until_ready=True)
        machine = await host.adopt(machine) if how == "adopted" else machine
    for _ in range(2):
        await machine.blocks.cancel("move")
    with pytest.raises(Cancelled):
        await machine.blocks.watch("move")
    for _ in range(2):
        await machine.blocks.forget("move")
    assert await machine.blocks.layers() == {"data": nodes(disk)}
    other = await host.start(disk.but(source=target), place="b")  # it is free
    await other.quit()
    await machine.blocks.push([await host.on_top(disk)])


async def test_jobs_nobody_knows(host: Host) -> None:
    machine = await host.start(await host.disk())
    assert await machine.blocks.job("none") is None
    await machine.blocks.cancel("none")
    await machine.blocks.forget("none")
    with pytest.raises(NotFound):
        await machine.blocks.watch("none")
    with pytest.raises(NotFound):
        await machine.blocks.finish("none")


async def test_a_mirror_to_nowhere(host: Host) -> None:
    disk = await host.disk()
    machine = await host.start(disk)
    with pytest.raises(NotFound):
        await machine.blocks.mirror("move", disk, DiskSource(path="/none/x", node="new"))
    assert await machine.blocks.job("move") is None
    assert await machine.blocks.layers() == {"data": nodes(disk)}


async def test_commit_of_the_top_layer(host: Host) -> None:
    disk = await host.disk(3)
    base = disk.source.backing
    assert base is not None
    machine = await host.start(disk)
    for _ in range(2):
        await machine.blocks.commit("merge", disk, disk.source, base)
    assert (await machine.blocks.watch("merge", until_ready=True)).state is BlockJobState.READY
    machine = await host.adopt(machine)
    await machine.stop()
    await machine.blocks.finish("merge")
    await machine.run()
    await machine.blocks.forget("merge")
    merged = disk.but(source=base)
    assert await machine.blocks.layers() == {"data": nodes(merged)}
    with pytest.raises(InUse):
        await host.start(merged, place="b")
    await machine.blocks.push([await host.on_top(merged)])


@pytest.mark.parametrize("top", [1, 2])
async def test_commit_in_the_middle(host: Host, top: int) -> None:
    disk = await host.disk(4)
    chain = list(disk.source.layers())
    machine = await host.start(disk)
    await machine.blocks.commit("merge", disk, chain[top], chain[3])
    assert (await machine.blocks.watch("merge")).state is BlockJobState.DONE
    await machine.blocks.forget("merge")
    left = [*nodes(disk)[:top], nodes(disk)[3]]
    assert await machine.blocks.layers() == {"data": tuple(left)}


async def test_a_commit_given_up(host: Host) -> None:
    disk = await host.disk(2)
    assert disk.source.backing is not None
    machine = await host.start(disk)
    await machine.blocks.commit("merge", disk, disk.source, disk.source.backing)
    await machine.blocks.watch("merge", until_ready=True)
    with pytest.raises(WrongState):
        await machine.blocks.forget("merge")
    await machine.blocks.cancel("merge")
    await machine.blocks.forget("merge")
    assert await machine.blocks.layers() == {"data": nodes(disk)}


async def test_what_cannot_be_merged(host: Host) -> None:
    disk = await host.disk(2)
    base = disk.source.backing
    assert base is not None
    machine = await host.start(disk)
    with pytest.raises(InvalidInput):
        await machine.blocks.commit("merge", disk, base, disk.source)
    grown = disk.but(source=disk.source.but(size=base.size * 2, backing=base.but(format=ImageFormat.VHDX)))
    with pytest.raises(InvalidInput):
        await machine.blocks.commit("merge", grown, grown.source, base.but(format=ImageFormat.VHDX))
    assert await machine.blocks.job("merge") is None


@pytest.mark.parametrize("whole", [True, False])
async def test_stream(host: Host, whole: bool) -> None:
    disk = await host.disk(4)
    chain = list(disk.source.layers())
    machine = await host.start(disk)
    for _ in range(2):
        await machine.blocks.stream("up", disk, None if whole else chain[2])
    machine = await host.adopt(machine)
    await machine.blocks.watch("up")
    await machine.blocks.forget("up")
    assert await machine.blocks.layers() == {"data": nodes(disk)[:1] + (() if whole else nodes(disk)[2:])}
    left = disk.but(source=disk.source.but(backing=None if whole else chain[2]))
    for _ in range(2):
        await machine.blocks.flush(left)
    with pytest.raises(WrongState):
        await machine.blocks.flush(left.but(source=left.source.but(node="other")))


async def test_a_job_ends_with_qemu(host: Host) -> None:
    disk = await host.disk()
    machine = await host.start(disk)
    await machine.blocks.mirror("move", disk, await host.source())
    await machine.blocks.watch("move", until_ready=True)
    watching = asyncio.create_task(machine.blocks.watch("move"))
    await asyncio.sleep(0)
    await machine.quit()
    with pytest.raises(QemuFailed) as caught:
        await asyncio.wait_for(watching, WAIT)
    assert caught.value.details["gone"] is True


async def test_bitmaps_over_layers(host: Host) -> None:
    disk = await host.disk(2)
    machine = await host.start(disk)
    blocks = machine.blocks
    assert await blocks.bitmaps(disk) == {}
    for _ in range(2):
        await blocks.add_bitmaps([disk], "day")
    assert list(await blocks.bitmaps(disk)) == ["day"]
    higher = await host.on_top(disk)
    await blocks.push([higher], {"data": ["day"]})
    await blocks.add_bitmaps([higher], "hour")
    machine = await host.adopt(machine)
    blocks = machine.blocks
    assert sorted(await blocks.bitmaps(higher)) == ["day", "hour"]
    cut = await host.on_top(higher)
    await blocks.push([cut], {"data": ["hour"]})
    assert sorted(await blocks.bitmaps(cut)) == ["hour"]
    for _ in range(2):
        await blocks.drop_bitmaps([cut], "hour")
    assert await blocks.bitmaps(cut) == {}
    await blocks.add_bitmaps([cut], "day")
    assert list(await blocks.bitmaps(cut)) == ["day"]


@pytest.mark.parametrize("how", ["commit the top", "commit below", "stream"])
async def test_bitmaps_outlive_a_merge(host: Host, how: str) -> None:
    low = await host.disk(2)
    machine = await host.start(low)
    blocks = machine.blocks
    await blocks.add_bitmaps([low], "day")
    disk = await host.on_top(low)
    await blocks.push([disk], {"data": ["day"]})
    chain = list(disk.source.layers())
    if how == "stream":
        await blocks.stream("merge", disk)
        left = chain[0].but(backing=None)
    elif how == "commit below":
        await blocks.commit("merge", disk, chain[1], chain[2])
        left = chain[0].but(backing=chain[2])
    else:
        await blocks.commit("merge", disk, chain[0], chain[2])
        left = chain[2]
        await blocks.watch("merge", until_ready=True)
        await machine.stop()
        await blocks.finish("merge")
    await blocks.watch("merge")
    await blocks.forget("merge")
    assert list(await blocks.bitmaps(disk.but(source=left))) == ["day"]


async def test_bitmaps_outlive_a_mirror(host: Host) -> None:
    disk = await host.disk(2)
    machine = await host.start(disk)
    blocks = machine.blocks
    await blocks.add_bitmaps([disk], "day")
    target = await host.source()
    await blocks.mirror("move", disk, target)
    await blocks.watch("move", until_ready=True)
    await machine.stop()
    for _ in range(2):
        await blocks.keep_bitmaps(disk, target)
    await blocks.finish("move")
    await machine.run()
    await blocks.forget("move")
    assert list(await blocks.bitmaps(disk.but(source=target))) == ["day"]


@pytest.mark.parametrize("media", [Media.CDROM, Media.FLOPPY])
async def test_media(host: Host, media: Media) -> None:
    empty = DiskSource(kind=SourceKind.EMPTY, path="")
    drive = Disk(id="drive", source=empty, bus=Bus.IDE if media is Media.CDROM else Bus.FLOPPY, media=media)
    machine = await host.start(drive)
    first, second = [await host.rig.image(f"{n}.img", size=1440 * 1024) for n in ("a", "b")]
    change = machine.blocks.change_medium
    for source in (first, first, second, second.but(node="x"), first):
        await change(drive.but(source=source))
        assert await machine.blocks.layers() == {"drive": nodes(drive.but(source=source))}
    with pytest.raises(NotFound):
        await change(drive.but(source=DiskSource(path="/none/x")))
    assert await machine.blocks.layers() == {"drive": nodes(drive.but(source=first))}
    machine = await host.adopt(machine)
    for _ in range(2):
        await machine.blocks.change_medium(drive.but(source=empty))
    assert (await machine.blocks.layers()).get("drive", ()) == ()
    other = await host.start(Disk(id="b", source=first), place="b")  # it is closed
    await other.quit()
    with pytest.raises(NotFound):
        await machine.blocks.change_medium(drive.but(id="none", source=first))


async def test_limits_from_the_start_and_later(host: Host) -> None:
    limits = IoLimits(iops=100, iops_burst=200, bandwidth_read=1024**2)
    first, second = await host.disk(), await host.disk(unit=1, name="other")
    machine = await host.start(first.but(limits=limits))
    await machine.attach_disk(second.but(limits=limits))
    for change in (IoLimits(bandwidth=1024**2, bandwidth_burst=1024**3), IoLimits(iops_write=5), IoLimits()):
        await machine.blocks.limit("data", change)
    with pytest.raises(NotFound):
        await machine.blocks.limit("none", limits)


async def test_growing(host: Host) -> None:
    for format, grows in ((QCOW2, True), (ImageFormat.RAW, True), (ImageFormat.VHD_FIXED, False)):
        disk = Disk(id="data", source=await host.source(format))
        machine = await host.start(disk)
        if grows:
            for _ in range(2):
                await machine.blocks.resize(disk, 2 * disk.source.size)
        else:
            with pytest.raises(InvalidInput):
                await machine.blocks.resize(disk, 2 * disk.source.size)
        await machine.quit()


async def begin(machine: Machine, kind: str, disk: Disk) -> None:
    chain = list(disk.source.layers())
    if kind == "commit below":
        await machine.blocks.commit("work", disk, chain[1], chain[2], speed=1)
    else:
        await machine.blocks.stream("work", disk, speed=1)


@pytest.mark.parametrize("kind", ["commit below", "stream"])
async def test_work_given_up_and_done_again(host: Host, kind: str) -> None:
    disk = await host.disk(3)
    for number, layer in enumerate(disk.source.layers()):
        await asyncio.to_thread(images.qemu_io, layer.path, layer.format, f"write -P 5 {number}M 1M")
    machine = await host.start(disk)
    await begin(machine, kind, disk)
    with pytest.raises(Busy):
        await machine.detach_disk("data", WAIT)
    machine = await host.adopt(machine)
    for _ in range(2):
        await machine.blocks.cancel("work")
    with pytest.raises(Cancelled):
        await machine.blocks.watch("work")
    assert await machine.blocks.bitmaps(disk) == {}
    await machine.blocks.forget("work")
    assert await machine.blocks.layers() == {"data": nodes(disk)}
    await begin(machine, kind, disk)
    await machine.blocks.speed("work", 0)
    for _ in range(2):
        assert (await machine.blocks.watch("work")).state is BlockJobState.DONE
    found = await machine.blocks.job("work")
    assert found is not None
    assert (found.state, found.fraction) == (BlockJobState.DONE, 1.0)
    await machine.attach_disk(await host.disk(unit=3, name="other"))
    await machine.blocks.forget("work")
    await machine.detach_disk("data", WAIT)
