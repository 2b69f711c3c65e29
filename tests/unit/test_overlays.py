"""Overlays on images that others may read, and disks of several layers made one image while the VM runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hostler.model.disk import ImageFormat
from hostler.model.disk_requests import DiskFlatten
from hostler.model.errors import InUse, InvalidInput, NoSpace, WrongState
from hostler.model.job import Job, JobState
from hostler.model.requests import DiskAdd, VmCreate, VolumeRegister
from hostler.model.units import MiB
from hostler.model.vm import VmRecord
from hostler.model.volume import VolumeState
from hostler.testing.inprocess import Node, Site, until
from hostler.testing.scenarios import act
from hostler.testing.simulated_world import SimulatedQemu

pytestmark = pytest.mark.unit


@pytest.fixture
async def node(site: Site) -> Node:
    """A VM "web" without disks, and a volume "base"."""
    node = await site.add("a")
    known = VolumeRegister(name="base", path=node.site.image("base.img"), format=ImageFormat.RAW)
    await node.application.volumes.register(known, "test")
    await node.application.vms.create(VmCreate(name="web", memory=64 * MiB), "test")
    return node


async def add(node: Node, vm: str = "web", **request: Any) -> Job:
    job = await node.application.vms.attach_disk(vm, DiskAdd(**{"volume": "base", **request}), "test")
    assert isinstance(job, Job)
    return await node.finish(job)


async def overlay(node: Node, *actions: str) -> VmRecord:
    job = await add(node, overlay=True)
    assert job.state is JobState.DONE, job.error
    for action in actions:
        await act(node, action)
    return node.application.vms.get("web")


async def flatten(node: Node) -> Job:
    return await node.finish(await node.application.disks.flatten("web", "disk0", DiskFlatten(), "test"))


def qemu(node: Node) -> SimulatedQemu:
    (found,) = node.site.world.running.values()
    return found


async def test_the_volume_knows_what_it_builds_on(node: Node) -> None:
    record = await overlay(node)
    source = record.config.disks[0].source
    volume = await node.application.volumes.get("web-disk0")
    assert (volume.path, volume.backing, volume.state) == (source.path, source.base.path, VolumeState.READY)
    assert (source.fixed, source.base.fixed) == (False, True)
    with pytest.raises(InUse, match="builds on it"):
        await node.application.vms.create(
            VmCreate(name="other", memory=64 * MiB, disks=(DiskAdd(volume="base"),)), "test"
        )
    with pytest.raises(InUse):
        await node.application.volumes.delete("base", "test")


async def test_two_vms_build_on_one_image(node: Node) -> None:
    await overlay(node, "start")
    await node.application.vms.create(VmCreate(name="other", memory=64 * MiB), "test")
    job = await add(node, "other", overlay=True)
    assert job.state is JobState.DONE, job.error
    assert (await node.finish(await node.application.vms.act("other", "start", "test"))).state is JobState.DONE
    deleted = await node.finish(await node.application.vms.act("other", "turn-off", "test"))
    assert deleted.state is JobState.DONE
    gone = await node.application.vms.delete("other", "test", disks=True)
    assert [Path(path).name for path in gone.removed] == ["other-disk0.qcow2"]
    assert os.path.exists(node.site.directory / "base.img")


async def test_detached_it_comes_back_with_its_base(node: Node) -> None:
    before = (await overlay(node)).config.disks[0].source
    await node.finish(await node.application.vms.detach_disk("web", "disk0", "test"))
    assert (await add(node, volume="web-disk0")).state is JobState.DONE
    assert node.application.vms.get("web").config.disks[0].source == before


async def test_checkpoints_merge_into_it_and_never_into_its_base(node: Node) -> None:
    before = (await overlay(node, "start", "checkpoint")).config.disks[0].source.backing
    with pytest.raises(WrongState, match="checkpoints need: first"):
        await flatten(node)
    job = await node.application.checkpoints.delete("web", "first", "test")
    assert (await node.finish(job)).state is JobState.DONE
    assert node.application.vms.get("web").config.disks[0].source == before
    assert (await flatten(node)).state is JobState.DONE


@pytest.mark.parametrize("request_", [{"read_only": True}, {"media": "cdrom"}, {"volume": None, "media": "cdrom"}])
def test_requests_that_make_no_sense(request_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="overlay"):
        DiskAdd(**{"volume": "base", "overlay": True, **request_})


async def test_what_is_refused(node: Node) -> None:
    disks = (DiskAdd(volume="base", overlay=True),)
    with pytest.raises(InvalidInput, match="only made"):
        await node.application.vms.create(VmCreate(name="other", memory=64 * MiB, disks=disks), "test")
    await node.application.vms.create(VmCreate(name="writer", memory=64 * MiB, disks=(DiskAdd(volume="base"),)), "test")
    with pytest.raises(InUse, match="disk0 of vm writer, which writes it"):
        await overlay(node)
    with pytest.raises(WrongState, match="is off"):
        await flatten(node)
    assert (await add(node, volume=node.site.image("b.img"), format="raw")).state is JobState.DONE
    await act(node, "start")
    with pytest.raises(WrongState, match="one image already"):
        await flatten(node)


async def test_a_dry_run_makes_nothing(node: Node) -> None:
    planned = await node.application.vms.attach_disk("web", DiskAdd(volume="base", overlay=True), "test", dry_run=True)
    assert isinstance(planned, VmRecord)
    assert not os.path.exists(planned.config.disks[0].source.path)


async def test_flattened_it_needs_nothing_else(node: Node) -> None:
    record = await overlay(node, "start")
    job = await flatten(node)
    base = str(node.site.directory / "base.img")
    assert job.result == {"disk": "disk0", "path": record.config.disks[0].source.path, "freed": [base]}
    volume = await node.application.volumes.get("web-disk0")
    assert (volume.backing, volume.generation) == (None, 1)
    assert [c.path for c in await node.application.host.claims.of(record.id)] == [volume.path]
    assert (await node.application.volumes.delete("base", "test")).removed == (base,)


@pytest.mark.parametrize("where", ["stream", "flush"])
async def test_what_did_not_get_onto_the_storage_is_not_recorded(node: Node, where: str) -> None:
    """After a failed flush the lower layers stay in use, though QEMU does not need them any more."""
    before = await overlay(node, "start")
    node.faults.fail(where, NoSpace("disk disk0", "the storage is full"))
    job = await flatten(node)
    assert (job.state, job.error.code if job.error else "") == (JobState.FAILED, "no-space")
    assert node.application.vms.get("web").config == before.config
    assert (await flatten(node)).state is JobState.DONE
    assert node.application.vms.get("web").config.disks[0].source.backing is None


async def test_cancelled_in_the_middle(node: Node) -> None:
    before = await overlay(node, "start")
    qemu(node).jobs_stand = True
    job = await node.application.disks.flatten("web", "disk0", DiskFlatten(), "test")
    await until(lambda: bool(qemu(node).jobs))
    await node.application.jobs.cancel(job.id, "test")
    assert (await node.finish(job)).state is JobState.CANCELLED
    assert (node.application.vms.get("web").config, qemu(node).jobs) == (before.config, {})


async def test_it_ended_while_no_daemon_was_there(node: Node) -> None:
    """QEMU knows nothing of the job any more; its layers tell."""
    await overlay(node, "start")
    qemu(node).jobs_stand = True
    job = await node.application.disks.flatten("web", "disk0", DiskFlatten(), "test")
    await until(lambda: bool(qemu(node).jobs))
    await node.die()
    (ended,) = qemu(node).jobs.values()
    ended.end("")
    qemu(node).jobs.clear()
    await node.start()
    assert (await node.finish(node.application.jobs.get(job.id))).state is JobState.DONE
    assert node.application.vms.get("web").config.disks[0].source.backing is None
