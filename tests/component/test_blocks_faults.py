"""Work on a running guest's disks that does not come to its end: full and failing storage, a killed QEMU."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import images
import pytest
from writing_guest import WAIT, Guest, until, without, writing_guest

from hostler.model.blockjob import BlockJobState
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import HostlerError, NoSpace, QemuFailed
from hostler.model.machine import RunStatus
from hostler.qemu import blockdev, commands
from hostler.qemu.qmp import QmpSession

pytestmark = pytest.mark.component

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with writing_guest() as made:
        yield made


async def session_of(guest: Guest) -> QmpSession:
    """A session of the test's own, in place of the machine's."""
    await guest.machine.close()
    return await QmpSession.connect(f"{guest.spec.run_dir}/qmp.sock", deadline=30)


async def adopt(guest: Guest) -> None:
    found = await guest.rig.adopt(guest.spec)
    assert found is not None
    guest.machine = found


async def failing(guest: Guest, target: DiskSource) -> None:
    """Open the target so that writes beyond its first megabyte fail, as on a disk that breaks."""
    copy = guest.disk.but(source=target)
    options = blockdev.blockdev_options(copy)
    broken = options | {
        "file": {
            "driver": "blkdebug",
            "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": False}],
            "image": options["file"],
        }
    }
    session = await session_of(guest)
    await commands.blockdev_add(session, broken)
    await session.close()
    await adopt(guest)


async def gives_up(guest: Guest, job: str, kind: type[HostlerError]) -> None:
    """The job fails as it should, the guest does not notice, and the next try may come."""
    blocks = guest.machine.blocks
    before = await blocks.layers()
    with pytest.raises(kind):
        await blocks.watch(job, until_ready=False)
    found = await blocks.job(job)
    assert found is not None
    assert found.state is BlockJobState.FAILED
    assert found.error
    await blocks.forget(job)
    assert await blocks.layers() == before
    assert await guest.machine.status() is RunStatus.RUNNING
    await guest.writes_on()
    await guest.check()


async def test_a_copy_to_a_failing_disk(guest: Guest) -> None:
    target = await guest.image()
    await failing(guest, target)
    await guest.machine.blocks.mirror("move", guest.disk, target)
    await gives_up(guest, "move", QemuFailed)
    await guest.mirror(await guest.image())
    await guest.check()


@ROOT
async def test_a_full_disk(guest: Guest) -> None:
    """Below a copy and a new layer: the work fails or the guest stops; nothing is lost."""
    with images.small_disk(guest.rig.path / "small", "3m") as small:
        target = await guest.image(place=small)
        await guest.machine.blocks.mirror("move", guest.disk, target)
        await gives_up(guest, "move", NoSpace)
        (small / f"{target.node}.img").unlink()
        await guest.push(small)
        await guest.check()
        await full_top_layer(guest)
        await guest.mirror(await guest.image())


async def full_top_layer(guest: Guest) -> None:
    """The guest stops when its top layer's storage is full, and goes on when it was moved to where there is room."""
    with suppress(HostlerError):
        async with asyncio.timeout(3):
            await guest.serial.write("data", 9, 4 * 1024**2, 4 * 1024**2, deadline=2)

    async def stopped() -> bool:
        return await guest.machine.status() is RunStatus.IO_ERROR

    await until(stopped)
    assert await guest.machine.io_failed() == {"data": "nospace"}
    chain = list(guest.disk.source.layers())
    room = await guest.image()
    await guest.machine.blocks.mirror("rescue", guest.disk, room)
    await guest.machine.blocks.watch("rescue", until_ready=True)
    await guest.machine.blocks.finish("rescue")
    await guest.machine.blocks.forget("rescue")
    guest.disk = guest.disk.but(source=room)
    await guest.machine.run()
    await guest.writes_on()
    await guest.check()
    assert len(chain) == 2


@ROOT
async def test_a_merge_into_a_full_disk(guest: Guest) -> None:
    with images.small_disk(guest.rig.path / "small", "3m") as small:
        await guest.push(small)
        await guest.push()
        await guest.push()
        await guest.serial.write("data", 9, 4 * 1024**2, 4 * 1024**2)
        chain = list(guest.disk.source.layers())
        await guest.machine.blocks.commit("merge", guest.disk, chain[0], chain[2])
        await gives_up(guest, "merge", NoSpace)
        await guest.machine.blocks.commit("merge", guest.disk, chain[1], chain[2])
        await guest.machine.blocks.watch("merge")
        await guest.machine.blocks.forget("merge")
        guest.disk = guest.disk.but(source=without(guest.disk.source, 1, 2))
        await guest.mirror(await guest.image())
        assert (await guest.serial.verify("data", 9, 4 * 1024**2, 4 * 1024**2)).bad_sectors == 0
        await guest.check()


async def begin_mirror(guest: Guest) -> Disk:
    await guest.machine.blocks.mirror("move", guest.disk, await guest.image())
    await guest.machine.blocks.watch("move", until_ready=True)
    return guest.disk


async def begin_switch(guest: Guest) -> Disk:
    """Switched over, and recorded: the source has no part in it any more."""
    await guest.mirror(await guest.image())
    await guest.writes_on()
    return guest.disk


async def begin_merge(guest: Guest) -> Disk:
    await guest.push()
    chain = list(guest.disk.source.layers())
    await guest.machine.blocks.commit("merge", guest.disk, chain[0], chain[1])
    await guest.machine.blocks.watch("merge", until_ready=True)
    await guest.writes_on()
    return guest.disk


async def begin_merge_below(guest: Guest) -> Disk:
    for _ in range(2):
        await guest.push()
        await guest.writes_on()
    chain = list(guest.disk.source.layers())
    await guest.machine.blocks.commit("merge", guest.disk, chain[1], chain[2], speed=65536)
    await guest.writes_on()
    return guest.disk


async def begin_stream(guest: Guest) -> Disk:
    await guest.push()
    await guest.machine.blocks.stream("up", guest.disk, speed=65536)
    await guest.writes_on()
    return guest.disk


@pytest.mark.parametrize("begin", [begin_mirror, begin_switch, begin_merge, begin_merge_below, begin_stream])
async def test_qemu_is_killed(guest: Guest, begin: Callable[[Guest], Awaitable[Disk]]) -> None:
    """At any moment the recorded chain holds everything that the guest knows as written."""
    disk = await begin(guest)
    acked = (await guest.serial.pattern_status()).acked
    os.kill(guest.machine.process.pid, signal.SIGKILL)
    await asyncio.wait_for(guest.machine.wait_gone(), WAIT)
    with pytest.raises(QemuFailed):
        await guest.machine.blocks.layers()
    await guest.check_from_outside(acked, disk)


async def test_everything_with_a_guest_that_stands_still(guest: Guest) -> None:
    await guest.machine.stop()
    blocks = guest.machine.blocks
    for _ in range(3):
        await guest.push()
    for top, base in ((1, 2), (0, 1)):
        chain = list(guest.disk.source.layers())
        await blocks.commit("merge", guest.disk, chain[top], chain[base])
        if top == 0:
            await blocks.watch("merge", until_ready=True)
            await blocks.finish("merge")
        await blocks.watch("merge")
        await blocks.forget("merge")
        guest.disk = guest.disk.but(source=without(guest.disk.source, top, base))
    target = await guest.image(ImageFormat.RAW)
    await blocks.mirror("move", guest.disk, target)
    await blocks.watch("move", until_ready=True)
    await blocks.finish("move")
    await blocks.forget("move")
    guest.disk = guest.disk.but(source=target)
    await guest.push()
    await blocks.stream("up", guest.disk)
    await blocks.watch("up")
    await blocks.forget("up")
    guest.disk = guest.disk.but(source=guest.disk.source.but(backing=None))
    assert await guest.machine.status() is RunStatus.PAUSED
    await guest.machine.run()
    await guest.writes_on()
    await guest.check()


async def test_what_was_streamed_and_flushed_needs_no_lower_layer(guest: Guest) -> None:
    """QEMU keeps the top layer's tables in memory when a stream has ended. After the flush all is on the storage, whose
    lower layer may go: a QEMU that is killed right then loses nothing."""
    await guest.push()
    await guest.writes_on()
    blocks = guest.machine.blocks
    await guest.serial.pattern_stop()  # which would flush by itself
    acked = (await guest.serial.pattern_status()).acked
    await blocks.stream("up", guest.disk)
    await blocks.watch("up")
    await blocks.forget("up")
    alone = guest.disk.but(source=guest.disk.source.but(backing=None))
    await blocks.flush(alone)
    os.kill(guest.machine.process.pid, signal.SIGKILL)
    await asyncio.wait_for(guest.machine.wait_gone(), WAIT)
    await guest.check_from_outside(acked, alone)
