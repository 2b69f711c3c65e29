"""Growing, limiting, changing media and how a disk is attached: what is refused, what is kept, what waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hostler.model.disk import Bus, CacheMode, Disk, ImageFormat, IoLimits, Media, SourceKind
from hostler.model.disk_requests import DiskChange, DiskGrow, DiskLimits, DiskMedium
from hostler.model.errors import (
    GuestRefused,
    HostlerError,
    InUse,
    InvalidInput,
    LimitExceeded,
    NotFound,
    QemuFailed,
    WrongState,
)
from hostler.model.job import Job, JobState
from hostler.model.requests import DiskAdd, VmChange, VmCreate, VolumeRegister
from hostler.model.units import MiB, TiB
from hostler.model.vm import VmRecord, VmState
from hostler.testing.inprocess import Node, Site
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit

SIZE = 8192


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


async def vm(node: Node, *actions: str, name: str = "web", drives: bool = False) -> VmRecord:
    """A VM with one disk, and with drives if wanted: a CD drive (disk1) and a floppy drive (disk2)."""
    path = node.site.image(f"{name}.img", SIZE)
    await node.application.volumes.register(VolumeRegister(name=name, path=path, format=ImageFormat.RAW), "test")
    disks = [DiskAdd(volume=name)]
    disks += [DiskAdd(media=Media.CDROM, bus=Bus.IDE), DiskAdd(media=Media.FLOPPY)] if drives else []
    await node.application.vms.create(VmCreate(name=name, memory=64 * MiB, disks=tuple(disks)), "test")
    await act(node, *actions, name=name)
    return node.application.vms.get(name)


async def act(node: Node, *actions: str, name: str = "web") -> None:
    for action in actions:
        job = await node.finish(await node.application.vms.act(name, action, "test"))
        assert job.error is None


def disk(node: Node, number: int = 0) -> Disk:
    return node.application.vms.get("web").config.disks[number]


def qemu(node: Node) -> SimulatedQemu:
    return next(q for q in node.site.world.running.values() if q.spec.config.name == "web")


async def done(node: Node, job: Job) -> Job:
    job = await node.finish(job)
    if job.error is not None:
        raise job.error.to_error()
    return job


# growing


async def grow(node: Node, size: int) -> Job:
    return await done(node, await node.application.disks.grow("web", "disk0", DiskGrow(size=size), "test"))


@pytest.mark.parametrize("actions", [(), ("start",), ("start", "pause")], ids=["off", "running", "paused"])
async def test_a_disk_grows(node: Node, actions: tuple[str, ...]) -> None:
    await vm(node, *actions)
    await grow(node, 2 * SIZE)
    assert disk(node).source.size == 2 * SIZE
    volume = await node.application.volumes.get("web")
    assert volume.generation == 1
    if actions:
        assert qemu(node).disks["disk0"].source.size == 2 * SIZE
    else:
        assert Path(disk(node).source.path).stat().st_size == 2 * SIZE
        assert await node.application.host.claims.of(node.application.vms.get("web").id) == ()


async def test_a_waiting_configuration_grows_too(node: Node) -> None:
    await vm(node, "start")
    await node.application.vms.change("web", VmChange(vcpus=2), "test", when_off=True)
    await grow(node, 2 * SIZE)
    waiting = node.application.vms.get("web").next_config
    assert waiting is not None
    assert (waiting.disks[0].source.size, waiting.vcpus) == (2 * SIZE, 2)


async def test_what_cannot_grow(node: Node) -> None:
    await vm(node, "start", drives=True)
    with pytest.raises(InvalidInput, match="is not more"):
        await grow(node, SIZE)
    with pytest.raises(LimitExceeded):
        await grow(node, 65 * TiB)
    with pytest.raises(WrongState, match="cannot be written"):
        await node.application.disks.grow("web", "disk1", DiskGrow(size=2 * SIZE), "test")
    actor = node.application.host.actor("web")
    await actor.change(lambda now: with_format(now, ImageFormat.VHDX))
    with pytest.raises(WrongState, match="is a vhdx, which cannot grow while the VM runs"):
        await grow(node, 2 * SIZE)


def with_format(record: VmRecord, format: ImageFormat) -> VmRecord:
    first, *rest = record.config.disks
    return record.but(config=record.config.but(disks=(first.but(source=first.source.but(format=format)), *rest)))


async def test_a_disk_in_use_elsewhere_does_not_grow(node: Node) -> None:
    record = await vm(node)
    other = await node.application.vms.create(
        VmCreate(name="db", memory=64 * MiB, disks=(DiskAdd(volume="web"),)), "test"
    )
    await act(node, "start", name="db")
    with pytest.raises(InUse, match="VM db"):
        await grow(node, 2 * SIZE)
    assert disk(node).source.size == SIZE
    assert await node.application.host.claims.of(record.id) == ()
    assert len(await node.application.host.claims.of(other.id)) == 1


# limits


async def limit(node: Node, **limits: int) -> Job:
    return await done(node, await node.application.disks.limit("web", "disk0", DiskLimits(**limits), "test"))


async def test_limits_are_kept_and_said_to_qemu(node: Node) -> None:
    await vm(node, "start")
    await limit(node, iops=100)
    await limit(node, bandwidth=5 * MiB)
    expected = IoLimits(iops=100, bandwidth=5 * MiB)
    assert disk(node).limits == qemu(node).disks["disk0"].limits == expected
    await act(node, "turn-off", "start")
    assert qemu(node).disks["disk0"].limits == expected
    await limit(node, iops=0, bandwidth=0)
    assert disk(node).limits.unlimited


async def test_limits_that_make_no_sense(node: Node) -> None:
    await vm(node)
    await limit(node, iops=100)
    with pytest.raises(InvalidInput, match="both directions"):
        await limit(node, iops_read=5)
    with pytest.raises(InvalidInput, match="burst"):
        await limit(node, iops_burst=50)
    assert disk(node).limits == IoLimits(iops=100)
    for nonsense in ({}, {"iops": -1}, {"iops": 2**63}, {"speed": 5}):
        with pytest.raises(ValidationError):
            DiskLimits.model_validate(nonsense)


async def test_a_limit_that_qemu_refuses_is_not_kept(node: Node) -> None:
    await vm(node, "start")
    await limit(node, iops=100)
    node.faults.fail("limit", QemuFailed("QEMU", "no"))
    with pytest.raises(QemuFailed):
        await limit(node, iops=200)
    assert disk(node).limits == qemu(node).disks["disk0"].limits == IoLimits(iops=100)


# media


async def change_medium(node: Node, number: int, **request: Any) -> Job:
    job = await node.application.disks.change_medium("web", f"disk{number}", DiskMedium(**request), "test")
    return await done(node, job)


@pytest.mark.parametrize("number", [1, 2], ids=["cd", "floppy"])
@pytest.mark.parametrize("actions", [(), ("start",)], ids=["off", "running"])
async def test_media_come_and_go(node: Node, number: int, actions: tuple[str, ...]) -> None:
    record = await vm(node, *actions, drives=True)
    discs = [node.site.image(name) for name in ("one.iso", "two.iso")]
    for path in discs:
        await change_medium(node, number, volume=path, format=ImageFormat.RAW)
        assert disk(node, number).source.path == path
        claims = {c.path for c in await node.application.host.claims.of(record.id) if c.disk == f"disk{number}"}
        assert claims == ({path} if actions else set())
        if actions:
            assert qemu(node).disks[f"disk{number}"].source.path == path
    await change_medium(node, number)
    assert disk(node, number).source.kind is SourceKind.EMPTY
    await act(node, *(["turn-off"] if actions else []), "start")
    assert len(await node.application.host.claims.of(record.id)) == 1


async def test_the_same_medium_again_and_no_medium_again(node: Node) -> None:
    await vm(node, "start", drives=True)
    await change_medium(node, 1)
    path = node.site.image("one.iso")
    for _ in range(2):
        await change_medium(node, 1, volume=path, format=ImageFormat.RAW)
    assert disk(node, 1).source.path == path


async def test_a_locked_drive(node: Node) -> None:
    await vm(node, "start", drives=True)
    one, two = node.site.image("one.iso"), node.site.image("two.iso")
    await change_medium(node, 1, volume=one, format=ImageFormat.RAW)
    qemu(node).locked_trays.add("disk1")
    with pytest.raises(GuestRefused):
        await change_medium(node, 1, volume=two, format=ImageFormat.RAW)
    assert disk(node, 1).source.path == qemu(node).disks["disk1"].source.path == one
    assert await node.application.host.claims.on(two) == ()
    await change_medium(node, 1, volume=two, format=ImageFormat.RAW, force=True)
    assert disk(node, 1).source.path == qemu(node).disks["disk1"].source.path == two
    assert await node.application.host.claims.on(one) == ()


async def test_media_that_cannot_be(node: Node) -> None:
    await vm(node, "start", drives=True)
    await vm(node, "start", name="db")
    with pytest.raises(InvalidInput, match="no drive for removable media"):
        await change_medium(node, 0)
    with pytest.raises(NotFound):
        await change_medium(node, 1, volume="/none/x.iso", format=ImageFormat.RAW)
    with pytest.raises(HostlerError, match="no header of a known image format"):
        await change_medium(node, 1, volume=node.site.image("x.iso"))
    with pytest.raises(InUse, match="VM db"):
        await change_medium(node, 1, volume="db")
    assert disk(node, 1).source.kind is SourceKind.EMPTY


# how it is attached


async def change(node: Node, when_off: bool = False, number: int = 0, **request: Any) -> VmRecord:
    return await node.application.disks.change("web", f"disk{number}", DiskChange(**request), "test", when_off)


async def test_changes_of_a_vm_that_is_off(node: Node) -> None:
    before = (await vm(node)).config.disks[0]
    await change(node, cache=CacheMode.WRITEBACK, discard=False, read_only=True, serial="X1")
    expected = before.but(cache=CacheMode.WRITEBACK, discard=False, read_only=True, serial="X1")
    assert disk(node) == expected


async def test_changes_of_a_vm_that_runs_wait(node: Node) -> None:
    await vm(node, "start")
    with pytest.raises(WrongState, match="to change cache, discard it must be off") as refused:
        await change(node, cache=CacheMode.WRITEBACK, discard=False)
    assert "--when-off" in refused.value.advice
    record = await change(node, when_off=True, cache=CacheMode.WRITEBACK)
    assert record.config.disks[0].cache is CacheMode.NONE
    await limit(node, iops=100)
    await act(node, "turn-off", "start")
    assert (disk(node).cache, disk(node).limits) == (CacheMode.WRITEBACK, IoLimits(iops=100))
    assert node.application.vms.get("web").next_config is None
    assert node.application.vms.get("web").state is VmState.RUNNING


async def test_changes_that_cannot_be(node: Node) -> None:
    await vm(node, drives=True)
    with pytest.raises(InvalidInput, match="CD drive"):
        await change(node, number=1, read_only=True)
    with pytest.raises(NotFound, match="it has: disk0, disk1, disk2"):
        await change(node, number=7, discard=True)
    with pytest.raises(ValidationError):
        DiskChange()


async def test_a_job_that_was_refused_leaves_the_vm_free(node: Node) -> None:
    await vm(node, "start", "save")
    with pytest.raises(WrongState, match="saved"):
        await limit(node, iops=5)
    assert node.application.vms.get("web").job is None
    await act(node, "restore")
    await limit(node, iops=5)
    (job,) = [j for j in node.application.jobs.list() if j.kind == "disk.limit"]
    assert job.state is JobState.DONE
