"""Moving a disk: names and places, what is refused, and the one moment that decides which image is the disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hostler.host import disks as disk_service
from hostler.model.disk import Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.disk_requests import DiskMove
from hostler.model.errors import AlreadyExists, HostLacks, NoSpace, NotFound, QemuFailed, TimedOut, WrongState
from hostler.model.job import Job, JobState
from hostler.model.pool import PoolCreate
from hostler.model.requests import DiskAdd, VmCreate, VolumeRegister
from hostler.model.units import MiB
from hostler.model.vm import VmRecord, VmState
from hostler.testing.inprocess import Node, Site
from hostler.testing.scenarios import PLACES, Scenario, act
from hostler.testing.simulated_blocks import SimulatedBlocks
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit

SIZE = 8192


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


async def vm(node: Node, *actions: str, register: bool = True, **disk: Any) -> VmRecord:
    """A VM with one disk, on a volume called like its file."""
    path = node.site.image("a.img", SIZE)
    if register:
        await node.application.volumes.register(VolumeRegister(name="a", path=path, format=ImageFormat.RAW), "test")
    request = DiskAdd(volume=path, format=ImageFormat.RAW, **disk)
    await node.application.vms.create(VmCreate(name="web", memory=64 * MiB, disks=(request,)), "test")
    for action in actions:
        await node.finish(await node.application.vms.act("web", action, "test"))
    return node.application.vms.get("web")


async def move(node: Node, to: str | Path, **request: Any) -> Job:
    job = await node.application.disks.move("web", "disk0", DiskMove(to=str(to), **request), "test")
    assert isinstance(job, Job)
    return await node.finish(job)


def source(node: Node) -> DiskSource:
    return node.application.vms.get("web").config.disks[0].source


async def names(node: Node) -> dict[str, str]:
    return {v.name: Path(v.path).name for v in await node.application.volumes.list()}


def qemu(node: Node) -> SimulatedQemu:
    (found,) = node.site.world.running.values()
    return found


# names and places


@pytest.mark.parametrize("actions", [(), ("start",), ("start", "pause")], ids=["off", "running", "paused"])
async def test_a_volume_goes_to_a_directory_under_its_name(node: Node, actions: tuple[str, ...]) -> None:
    before = await vm(node, *actions)
    place = node.site.directory / "fast"
    place.mkdir(mode=0o711)
    job = await move(node, place)
    assert job.state is JobState.DONE, job.error
    assert source(node).path == str(place / "a.img")
    assert os.listdir(place) == ["a.img"]
    assert not (node.site.directory / "a.img").exists()
    assert await names(node) == {"a": "a.img"}
    after = node.application.vms.get("web")
    assert after.state is before.state
    assert after.config.disks[0].but(source=before.config.disks[0].source) == before.config.disks[0]
    assert [c.path for c in await node.application.host.claims.of(after.id)] == (
        [str(place / "a.img")] if actions else []
    )
    assert job.result is not None
    assert job.result["removed"] == [str(node.site.directory / "a.img")]


async def test_another_name_and_the_old_one_kept(node: Node) -> None:
    await vm(node, "start")
    job = await move(node, node.site.directory / "b.img", name="fast", keep_source=True)
    assert job.error is None
    assert await names(node) == {"a": "a.img", "fast": "b.img"}
    job = await move(node, node.site.directory / "c.img", keep_source=True)
    assert await names(node) == {"a": "a.img", "fast": "b.img", "fast-2": "c.img"}


async def test_an_image_that_is_no_volume_stays(node: Node) -> None:
    await vm(node, register=False)
    job = await move(node, node.site.directory / "b.img")
    assert job.result is not None
    assert job.result["kept"] == [str(node.site.directory / "a.img")]
    assert (node.site.directory / "a.img").exists()
    assert await names(node) == {"web-disk0": "b.img"}


async def test_a_name_taken_meanwhile_is_left_to_who_took_it(node: Node) -> None:
    await vm(node, "start")
    hang = node.faults.hang("disk.move/clean-up:before")
    running = asyncio.ensure_future(move(node, node.site.directory / "b.img", name="fast"))
    await hang.reached.wait()
    path = node.site.image("x.img")
    await node.application.volumes.register(VolumeRegister(name="fast", path=path, format=ImageFormat.RAW), "test")
    hang.release.set()
    job = await running
    assert job.state is JobState.DONE
    found = await names(node)
    assert found.pop("fast") == "x.img"
    assert list(found.values()) == ["b.img"]


async def test_a_dry_run_changes_nothing(node: Node) -> None:
    await vm(node, "start")
    request = DiskMove(to=str(node.site.directory / "b.qcow2"), format=ImageFormat.QCOW2)
    planned = await node.application.disks.move("web", "disk0", request, "test", dry_run=True)
    assert isinstance(planned, VmRecord)
    assert planned.config.disks[0].source.format is ImageFormat.QCOW2
    assert source(node).format is ImageFormat.RAW
    assert await names(node) == {"a": "a.img"}


# refused


async def test_what_is_refused_before_anything_is_made(node: Node) -> None:
    await vm(node, "start")
    taken = node.site.image("b.img")
    with pytest.raises(AlreadyExists, match="never overwritten"):
        await move(node, taken)
    with pytest.raises(NotFound, match="directory"):
        await move(node, node.site.directory / "nowhere" / "b.img")
    with pytest.raises(NotFound, match="directory"):
        await move(node, f"{node.site.directory}/nowhere/")
    with pytest.raises(AlreadyExists, match="volume with that name"):
        await move(node, node.site.directory / "c.img", name="a", keep_source=True)
    with pytest.raises(NotFound, match="it has: disk0"):
        await node.application.disks.move("web", "disk7", DiskMove(to="/x"), "test")
    assert sorted(p.name for p in node.site.directory.glob("*.img")) == ["a.img", "b.img"]


async def test_too_little_space_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (await vm(node),)
    monkeypatch.setattr(disk_service, "SPARSE", frozenset())

    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda _path: Full)
    with pytest.raises(NoSpace, match=r"needs 8 KiB .* 4 KiB are free"):
        await move(node, node.site.directory / "b.img")


def layered(disk: Disk) -> Disk:
    base = disk.source
    return disk.but(source=DiskSource(path="/x.qcow2", format=ImageFormat.QCOW2, size=SIZE, node="a1", backing=base))


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (layered, "chain of 2 images"),
        (lambda d: d.but(media=Media.CDROM), "removable media"),
        (lambda d: d.but(read_only=True), "read-only"),
        (lambda d: d.but(source=DiskSource(kind=SourceKind.DEVICE, path="/dev/x"), reservations=True), "reserves"),
    ],
)
async def test_disks_that_cannot_move(node: Node, edit: Callable[[Disk], Disk], word: str) -> None:
    await vm(node, "start")
    actor = node.application.host.actor("web")
    await actor.change(lambda now: now.but(config=now.config.but(disks=tuple(edit(d) for d in now.config.disks))))
    with pytest.raises(WrongState, match=word) as caught:
        await move(node, node.site.directory / "b.img")
    assert caught.value.advice


async def test_a_saved_vm_is_left_alone(node: Node) -> None:
    await vm(node, "start", "save")
    with pytest.raises(WrongState, match="saved"):
        await move(node, node.site.directory / "b.img")


# failures


async def test_a_copy_that_fails_leaves_everything_as_it_was(node: Node) -> None:
    await vm(node, "start")
    qemu(node).job_error = "No space left on device"
    job = await move(node, node.site.directory / "b.img")
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert "full" in job.error.cause or "space" in job.error.cause.lower()
    assert source(node).path.endswith("a.img")
    assert not (node.site.directory / "b.img").exists()
    assert qemu(node).jobs == {}
    assert await names(node) == {"a": "a.img"}


def switch_and_then(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """QEMU switches; the answer does not come."""
    original = SimulatedBlocks.finish

    async def finish(self: SimulatedBlocks, job: str) -> None:
        monkeypatch.setattr(SimulatedBlocks, "finish", original)
        await original(self, job)
        await what()

    monkeypatch.setattr(SimulatedBlocks, "finish", finish)


async def lost_answer() -> None:
    raise TimedOut("QEMU", "did not answer")


async def test_an_answer_that_is_lost_is_found_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await vm(node, "start")
    switch_and_then(monkeypatch, lost_answer)
    job = await move(node, node.site.directory / "b.img")
    assert job.state is JobState.DONE
    assert source(node).path.endswith("b.img")
    assert node.application.vms.get("web").state is VmState.RUNNING


async def test_nothing_goes_on_while_nobody_knows(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU has switched and then answers nothing for a while: the guest stands still until it is known and recorded."""
    await vm(node, "start")
    ran: list[str] = []
    monkeypatch.setattr(SimulatedQemu, "run", recording(ran, node))

    async def silent() -> None:
        node.faults.fail("layers", TimedOut("QEMU", "did not answer"), times=3)
        await lost_answer()

    switch_and_then(monkeypatch, silent)
    job = await move(node, node.site.directory / "b.img")
    assert job.state is JobState.DONE
    assert ran == ["b.img"]


def recording(ran: list[str], node: Node) -> Callable[[SimulatedQemu], None]:
    """A `run` that notes what the record names, and insists that QEMU has the same."""
    original = SimulatedQemu.run

    def run(self: SimulatedQemu) -> None:
        named = node.application.vms.get("web").config.disks[0].source
        assert self.disks["disk0"].source.path == named.path
        ran.append(Path(named.path).name)
        original(self)

    return run


async def test_a_switch_that_qemu_refuses_is_undone(node: Node) -> None:
    await vm(node, "start")
    node.faults.fail("finish", QemuFailed("QEMU", "no"))
    job = await move(node, node.site.directory / "b.img")
    assert job.state is JobState.FAILED
    assert source(node).path.endswith("a.img")
    assert qemu(node).status.value == "running"
    assert qemu(node).jobs == {}
    assert not (node.site.directory / "b.img").exists()


async def test_a_record_that_cannot_be_written_holds_the_guest(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await vm(node, "start")
    ran: list[str] = []
    monkeypatch.setattr(SimulatedQemu, "run", recording(ran, node))

    async def full() -> None:
        node.disk.fail("commit", NoSpace("store", "the disk is full"), times=3)

    switch_and_then(monkeypatch, full)
    job = await move(node, node.site.directory / "b.img")
    assert job.state is JobState.DONE
    assert ran == ["b.img"]


class Window:
    """The daemon stops between QEMU's switch and the record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        switch_and_then(monkeypatch, self._stand)

    async def _stand(self) -> None:
        self.reached.set()
        await asyncio.Event().wait()


async def begun(node: Node) -> Job:
    request = DiskMove(to=str(node.site.directory / "b.img"))
    job = await node.application.disks.move("web", "disk0", request, "test")
    assert isinstance(job, Job)
    return job


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_daemon_that_dies_in_the_window(node: Node, monkeypatch: pytest.MonkeyPatch, paused: bool) -> None:
    await vm(node, "start", *(["pause"] if paused else []))
    window = Window(monkeypatch)
    job = await begun(node)
    await window.reached.wait()
    assert qemu(node).status.value != "running"
    await node.die()
    await node.start()
    await node.quiet()
    assert node.application.jobs.get(job.id).state is JobState.DONE
    assert source(node).path.endswith("b.img")
    assert qemu(node).disks["disk0"].source.path.endswith("b.img")
    assert qemu(node).status.value == ("paused" if paused else "running")
    assert not (node.site.directory / "a.img").exists()


async def test_a_new_daemon_that_gets_no_answer_waits_for_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not undo: QEMU may have the new image, and a guest that went on would write to one nobody has on
    record."""
    await vm(node, "start")
    window = Window(monkeypatch)
    await begun(node)
    await window.reached.wait()
    await node.die()
    node.faults.fail("layers", TimedOut("QEMU", "did not answer"), times=3)
    await node.start()
    await node.quiet()
    assert source(node).path.endswith("b.img")
    assert qemu(node).status.value == "running"


async def test_qemu_dies_in_the_window_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record names the source, which is whole: nothing was written after QEMU's switch."""
    await vm(node, "start")
    window = Window(monkeypatch)
    job = await begun(node)
    await window.reached.wait()
    await node.die()
    qemu(node).die()
    await node.start()
    await node.quiet()
    assert node.application.jobs.get(job.id).state is JobState.FAILED
    assert source(node).path.endswith("a.img")
    assert (node.site.directory / "a.img").exists()
    assert not (node.site.directory / "b.img").exists()
    await act(node, "start")


MOVES = [place for place in PLACES if place[0].kind == "disk.move" and place[0].before]


@pytest.mark.parametrize(("scenario", "step", "edge"), MOVES, ids=str)
@pytest.mark.parametrize("how", ["fail", "die"])
async def test_the_guest_never_runs_on_what_is_not_recorded(
    node: Node, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, step: str, edge: str, how: str
) -> None:
    await scenario.prepare(node)
    original = SimulatedQemu.replace_chain

    def replace(self: SimulatedQemu, disk: Disk, new: DiskSource) -> None:
        assert self.status.value != "running", "QEMU switches while the guest runs"
        original(self, disk, new)

    monkeypatch.setattr(SimulatedQemu, "replace_chain", replace)
    monkeypatch.setattr(SimulatedQemu, "run", recording([], node))
    where = f"{scenario.kind}/{step}:{edge}"
    if how == "fail":
        node.faults.fail(where, HostLacks("this test", "wants it so"))
        await scenario.run(node)
    else:
        hang = node.faults.hang(where)
        await scenario.begin(node)
        await hang.reached.wait()
        await node.die()
        await node.start()
    await node.quiet()
    assert qemu(node).disks["disk0"].source.path == source(node).path
    assert qemu(node).status.value == "running"


async def test_a_disk_goes_to_a_pool(node: Node) -> None:
    await vm(node, "start")
    place = node.site.directory / "pool"
    place.mkdir(mode=0o711)
    await node.application.pools.create(PoolCreate(name="fast", path=str(place)), "test")
    job = await node.application.disks.move("web", "disk0", DiskMove(pool="fast"), "test")
    assert isinstance(job, Job)
    assert (await node.finish(job)).error is None
    volume = await node.application.volumes.get("a")
    assert (volume.pool, volume.path) == ("fast", str(place / "a.raw"))
    job = await move(node, node.site.directory / "b.img")
    assert (await node.application.volumes.get("a")).pool == ""
    await move(node, place)
    assert (await node.application.volumes.get("a")).pool == "fast"
    with pytest.raises(NotFound, match="pool"):
        await node.application.disks.move("web", "disk0", DiskMove(pool="slow"), "test")
    for nonsense in ({}, {"to": "/x", "pool": "fast"}):
        with pytest.raises(ValidationError):
            DiskMove.model_validate(nonsense)
