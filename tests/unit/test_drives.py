"""Drives for removable media: empty ones, floppies, and where they may be."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hostler.cli import parsing
from hostler.model.disk import Bus, ImageFormat, Media, SourceKind
from hostler.model.errors import InUse, InvalidInput, LimitExceeded
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import VmRecord
from hostler.testing.inprocess import Node, Site

pytestmark = pytest.mark.unit

CD = DiskAdd(media=Media.CDROM, bus=Bus.IDE)
FLOPPY = DiskAdd(media=Media.FLOPPY)


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


async def create(node: Node, *disks: DiskAdd) -> VmRecord:
    return await node.application.vms.create(VmCreate(name="web", memory=64 * MiB, disks=disks), "test")


async def test_drives_are_made_empty_and_start(node: Node) -> None:
    record = await create(node, CD, DiskAdd(media=Media.CDROM), FLOPPY, FLOPPY)
    assert [d.address for d in record.config.disks] == [
        (Bus.IDE, 0, 0),
        (Bus.SCSI, 0, 0),
        (Bus.FLOPPY, 0, 0),
        (Bus.FLOPPY, 0, 1),
    ]
    assert {d.source.kind for d in record.config.disks} == {SourceKind.EMPTY}
    assert [d.boot_index for d in record.config.disks] == [1, 2, None, None]
    job = await node.finish(await node.application.vms.act("web", "start", "test"))
    assert job.error is None
    assert await node.application.host.claims.of(record.id) == ()


async def test_a_third_floppy_drive_has_no_place(node: Node) -> None:
    with pytest.raises(LimitExceeded):
        await create(node, FLOPPY, FLOPPY, FLOPPY)
    with pytest.raises(InUse):
        await create(node, FLOPPY, DiskAdd(media=Media.FLOPPY, unit=0))


async def test_an_empty_drive_comes_and_goes_while_the_vm_runs(node: Node) -> None:
    vms = node.application.vms
    await create(node)
    await node.finish(await vms.act("web", "start", "test"))
    job = await vms.attach_disk("web", DiskAdd(media=Media.CDROM), "test")
    assert not isinstance(job, VmRecord)
    assert (await node.finish(job)).error is None
    assert [d.source.kind for d in vms.get("web").config.disks] == [SourceKind.EMPTY]
    assert (await node.finish(await vms.detach_disk("web", "disk0", "test"))).error is None
    with pytest.raises(InvalidInput, match="floppy controller takes no disk"):
        await vms.attach_disk("web", FLOPPY, "test")


async def test_media_are_not_deleted_with_their_vm(node: Node) -> None:
    path = node.site.image("a.vfd")
    await create(node, DiskAdd(volume=path, format=ImageFormat.RAW, media=Media.FLOPPY), CD)
    outcome = await node.application.vms.delete("web", "test", disks=True)
    assert (outcome.removed, outcome.kept) == ((), (path,))


def test_only_drives_can_be_empty() -> None:
    with pytest.raises(ValidationError, match="only a CD or floppy drive can be empty"):
        DiskAdd()
    with pytest.raises(ValidationError, match="floppy drives only"):
        DiskAdd(volume="a", bus=Bus.FLOPPY)


def test_drives_on_the_command_line() -> None:
    assert parsing.cdrom("none") == DiskAdd(media=Media.CDROM, bus=Bus.IDE, read_only=True)
    assert parsing.cdrom("./none").volume
    assert parsing.floppy("/srv/a.vfd") == DiskAdd(volume="/srv/a.vfd", format=ImageFormat.RAW, media=Media.FLOPPY)
