"""Imports with real images and the real qemu-img: the report, the job, and what is left when it goes wrong."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import images
import pytest

from hostler.model.disk import Bus, ImageFormat, Media, SourceKind
from hostler.model.errors import BadImage, Blocked, Busy, InUse, InvalidInput, NotFound
from hostler.model.foreign import DiskFate, ImportReport, RemarkKind
from hostler.model.job import Job, JobState
from hostler.model.nic import Network
from hostler.model.requests import NicAdd, VmCreate
from hostler.model.transfer import ImportRequest
from hostler.model.units import MiB
from hostler.storage.qemu_img import QemuImg
from hostler.testing import hyperv_export as made
from hostler.testing import hyperv_vhd
from hostler.testing.exported import exported_folder
from hostler.testing.hyperv_export import Adapter, Drive, Machine
from hostler.testing.inprocess import Node, Site, short_directory

pytestmark = pytest.mark.component

SIZE = 8 * MiB


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    with short_directory() as directory:
        async with Site(directory) as site:
            yield await site.add("a", images=QemuImg())


def image(path: Path, format: str, pattern: int) -> Path:
    """An image with a mark of 64 KiB at 1 MiB."""
    options = {"vhd-fixed": ["-o", "subformat=fixed,force_size=on"], "vhd": ["-o", "force_size=on"]}.get(format, [])
    options = ["-o", "subformat=streamOptimized"] if format == "vmdk" else options
    driver = "vpc" if format.startswith("vhd") and format != "vhdx" else format
    raw = path.with_suffix(".tmp")
    raw.write_bytes(b"")
    os.truncate(raw, SIZE)
    with raw.open("r+b") as file:
        file.seek(MiB)
        file.write(bytes([pattern]) * 65536)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, *options, str(raw), str(path)], check=True)
    raw.unlink()
    return path


def hyper_v(folder: Path, machine: Machine, form: str = "xml") -> Path:
    (folder / "Virtual Machines").mkdir(parents=True)
    (folder / "Virtual Hard Disks").mkdir()
    data = made.vmcx(machine) if form == "vmcx" else made.xml(machine)
    (folder / "Virtual Machines" / f"{made.VM_ID}.{form}").write_bytes(data)
    return folder


def ova(path: Path, envelope: str, files: dict[str, bytes], manifest: bool = True) -> Path:
    content = {"web.ovf": envelope.encode(), **files}
    if manifest:
        lines = [f"SHA256({n})= {hashlib.sha256(d).hexdigest()}\n" for n, d in content.items()]
        content = {"web.ovf": content["web.ovf"], "web.mf": "".join(lines).encode(), **files}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


ENVELOPE = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:id="f1" ovf:href="disk1.vmdk"/></References>
 <DiskSection><Info/><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="8388608"/></DiskSection>
 <VirtualSystem ovf:id="web"><Info/><Name>web</Name><VirtualHardwareSection><Info/>
  <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
   <rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
  <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID>
   <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>256</rasd:VirtualQuantity></Item>
  <Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>20</rasd:ResourceType></Item>
  <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d1</rasd:HostResource>
   <rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
 </VirtualHardwareSection></VirtualSystem>
</Envelope>"""


async def look(node: Node, path: Path, **more: object) -> ImportReport:
    return await node.application.imports.inspect(ImportRequest.model_validate({"path": str(path), **more}))


async def imported(node: Node, path: Path, **more: object) -> Job:
    request = ImportRequest.model_validate({"path": str(path), **more})
    return await node.finish(await node.application.imports.run(request, "test"))


def files(node: Node) -> list[str]:
    return sorted(p.name for p in node.paths.volumes.glob("*")) if node.paths.volumes.exists() else []


async def nothing_is_left(node: Node) -> None:
    assert files(node) == []
    assert list(await node.application.volumes.list()) == []
    assert list(node.application.vms.list()) == []


MACHINE = Machine(
    name="Web 01",
    ide={(0, 0): Drive("D:\\VM\\Boot.VHD"), (1, 0): Drive("C:\\iso\\gone.iso", "ISO")},
    scsi=({1: Drive("D:\\VM\\data.vhd"), 2: Drive("\\\\.\\PHYSICALDRIVE3", "Physical")},),
    nics=(Adapter("00-15-5D-01-07-DC", "LAN"), Adapter("00-15-5D-01-07-DD", "Backup")),
)


@pytest.mark.parametrize("form", ["xml", "vmcx"])
async def test_a_folder_of_hyper_v(node: Node, tmp_path: Path, form: str) -> None:
    folder = hyper_v(tmp_path / "web01", MACHINE, form)
    boot = image(folder / "Virtual Hard Disks" / "boot.vhd", "vhd-fixed", 7)
    image(folder / "Virtual Hard Disks" / "data.vhd", "vhd", 9)
    before = boot.read_bytes()

    report = await look(node, folder)
    assert report.possible, report.remarks
    assert (report.name, report.machine.memory) == ("Web 01", 512 * MiB)
    fates = {d.place: (d.fate, d.source_format, d.size, d.volume) for d in report.disks}
    assert fates == {
        "ide 0:0": (DiskFate.COPY, "vhd-fixed", SIZE, "Web 01"),
        "ide 1:0": (DiskFate.ATTACH, "", 0, ""),
        "scsi 0:1": (DiskFate.COPY, "vhd", SIZE, "Web 01-2"),
        "scsi 0:2": (DiskFate.LEAVE, "", 0, ""),
    }
    assert 0 < report.space_needed <= 2 * SIZE + 2 * MiB
    about = {(r.kind, r.subject) for r in report.remarks}
    assert (RemarkKind.GUEST, "SCSI disks") in about
    assert (RemarkKind.LOST, "disk scsi 0:2") in about
    assert (RemarkKind.LOST, "cdrom ide 1:0") in about
    await nothing_is_left(node)

    job = await imported(node, folder, networks={"LAN": "user"}, format="qcow2")
    assert job.state is JobState.DONE, job.error
    vm = node.application.vms.get("Web 01")
    assert job.target == vm.id
    assert [(d.bus, d.controller, d.unit, d.boot_index) for d in vm.config.disks] == [
        (Bus.IDE, 0, 0, 2),
        (Bus.IDE, 0, 2, 1),
        (Bus.SCSI, 0, 1, 3),
    ]
    assert [d.source.kind for d in vm.config.disks if d.media is Media.CDROM] == [SourceKind.EMPTY]
    assert [(n.mac, n.network) for n in vm.config.nics] == [
        ("00:15:5d:01:07:dc", Network.USER),
        ("00:15:5d:01:07:dd", Network.NONE),
    ]
    for disk, pattern in zip([d for d in vm.config.disks if d.media is Media.DISK], (7, 9), strict=True):
        assert disk.source.format is ImageFormat.QCOW2
        assert images.verified(disk.source.path, ImageFormat.QCOW2, pattern, "1M 64k")
    assert boot.read_bytes() == before
    with pytest.raises(Blocked, match="a VM of this name exists"):
        await imported(node, folder)
    report = await look(node, folder, name="again")
    assert [r.subject for r in report.remarks if r.kind is RemarkKind.BLOCKER] == [
        "network adapter 1",
        "network adapter 2",
    ]
    job = await imported(node, folder, name="again", new_macs=True)
    assert job.state is JobState.DONE, job.error
    again = node.application.vms.get("again").config
    assert not {n.mac for n in again.nics} & {n.mac for n in vm.config.nics}


async def test_in_place_nothing_is_copied(node: Node, tmp_path: Path) -> None:
    folder = hyper_v(tmp_path / "w", Machine(name="w", ide={(0, 0): Drive("D:\\a.vhdx")}, nics=()))
    path = image(folder / "Virtual Hard Disks" / "a.vhdx", "vhdx", 5)
    job = await imported(node, folder, in_place=True)
    assert job.state is JobState.DONE, job.error
    disk = node.application.vms.get("w").config.disks[0]
    assert (disk.source.path, disk.source.format) == (str(path), ImageFormat.VHDX)
    assert files(node) == []
    assert [v.path for v in await node.application.volumes.list()] == [str(path)]
    with pytest.raises(Blocked, match="is volume 'w' already"):
        await imported(node, folder, name="x", in_place=True)
    assert [v.name for v in node.application.vms.list()] == ["w"]
    assert path.exists()


async def test_an_ova_is_read_where_it_lies(node: Node, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk1.vmdk", "vmdk", 3).read_bytes()
    path = ova(tmp_path / "web.ova", ENVELOPE, {"disk1.vmdk": disk})
    report = await look(node, path)
    assert report.possible
    assert [(d.source_format, d.size, d.target_bus, d.target_unit) for d in report.disks] == [
        ("vmdk", SIZE, Bus.IDE, 0)
    ]
    assert report.disks[0].offset > 0
    job = await imported(node, path, format="vhdx")
    assert job.state is JobState.DONE, job.error
    config = node.application.vms.get("web").config
    assert (config.vcpus, config.memory) == (2, 256 * MiB)
    assert images.verified(config.disks[0].source.path, ImageFormat.VHDX, 3, "1M 64k")
    assert sorted(os.listdir(tmp_path)) == ["disk1.vmdk", "web.ova"]


async def test_an_ova_whose_disk_is_not_what_the_manifest_says(node: Node, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk1.vmdk", "vmdk", 3).read_bytes()
    path = ova(tmp_path / "web.ova", ENVELOPE, {"disk1.vmdk": disk})
    data = bytearray(path.read_bytes())
    data[-4096 * 4] ^= 1
    path.write_bytes(data)
    job = await imported(node, path)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert "is not what its manifest says" in job.error.cause
    await nothing_is_left(node)


async def test_an_ovf_beside_its_files(node: Node, tmp_path: Path) -> None:
    image(tmp_path / "disk1.vmdk", "vmdk", 4)
    (tmp_path / "web.ovf").write_text(ENVELOPE)
    job = await imported(node, tmp_path / "web.ovf")
    assert job.state is JobState.DONE, job.error
    config = node.application.vms.get("web").config
    assert images.verified(config.disks[0].source.path, ImageFormat.QCOW2, 4, "1M 64k")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'createType="streamOptimized"', b'createType="monolithicFlat"', "of the kind"),
        (b"parentCID=ffffffff", b"parentCID=12345678", "changes to a parent"),
        (b"# Extent description", b'parentFileNameHint="x"', "changes to a parent"),
    ],
)
async def test_a_vmdk_that_refers_to_other_files(node: Node, tmp_path: Path, old: bytes, new: bytes, why: str) -> None:
    disk = image(tmp_path / "disk1.vmdk", "vmdk", 3).read_bytes()
    assert disk.count(old) == 1, disk[512:1024]
    disk = disk.replace(old, new.ljust(len(old), b"\n"))
    report = await look(node, ova(tmp_path / "web.ova", ENVELOPE, {"disk1.vmdk": disk}))
    blockers = [r.text for r in report.remarks if r.kind is RemarkKind.BLOCKER]
    assert len(blockers) == 1
    assert why in blockers[0]


async def test_a_disk_image_alone(node: Node, tmp_path: Path) -> None:
    path = image(tmp_path / "old.vhd", "vhd", 6)
    report = await look(node, path, memory=128 * MiB, vcpus=2)
    assert report.possible
    assert (report.name, report.machine.vcpus, report.machine.memory) == ("old", 2, 128 * MiB)
    job = await imported(node, path, name="fresh", memory=128 * MiB)
    assert job.state is JobState.DONE, job.error
    disk = node.application.vms.get("fresh").config.disks[0]
    assert disk.bus is Bus.IDE
    assert images.verified(disk.source.path, ImageFormat.QCOW2, 6, "1M 64k")
    raw = tmp_path / "plain.img"
    raw.write_bytes(b"\1" * 65536)
    assert not (await look(node, raw)).possible
    assert (await look(node, raw, raw=True)).possible


async def test_disks_that_are_missing_or_damaged(node: Node, tmp_path: Path) -> None:
    machine = Machine(name="m", ide={(0, 0): Drive("D:\\a.vhd"), (0, 1): Drive("D:\\b.vhd")}, nics=())
    folder = hyper_v(tmp_path / "m", machine)
    image(folder / "Virtual Hard Disks" / "a.vhd", "vhd-fixed", 1)
    with pytest.raises(Blocked, match=r"file b\.vhd|is not there"):
        await imported(node, folder)
    job = await imported(node, folder, skip_missing=True)
    assert job.state is JobState.DONE, job.error
    assert len(node.application.vms.get("m").config.disks) == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "B.vhd").write_bytes(b"x" * 5000)
    report = await look(node, folder, name="n", search=(str(elsewhere),))
    assert [r.subject for r in report.remarks if r.kind is RemarkKind.BLOCKER] == ["disk ide 0:1"]
    image(elsewhere / "B.vhd", "vhd", 2)
    assert (await look(node, folder, name="n", search=(str(elsewhere),))).possible


async def test_a_cd_that_is_there_is_attached_where_it_lies(node: Node, tmp_path: Path) -> None:
    folder = hyper_v(tmp_path / "c", Machine(name="c", ide={(1, 0): Drive("C:\\a.iso", "ISO")}, nics=()))
    (folder / "a.iso").write_bytes(bytes(65536))
    job = await imported(node, folder)
    assert job.state is JobState.DONE, job.error
    disk = node.application.vms.get("c").config.disks[0]
    assert (disk.media, disk.read_only, disk.source.path, disk.unit) == (
        Media.CDROM,
        True,
        str(folder / "a.iso"),
        2,
    )


async def test_a_chosen_snapshot(node: Node, tmp_path: Path) -> None:
    folder = hyper_v(tmp_path / "s", Machine(name="s", ide={(0, 0): Drive("D:\\now.vhd")}, nics=()))
    (folder / "Snapshots").mkdir()
    old = Machine(name="before", ide={(0, 0): Drive("D:\\old.vhd")}, nics=())
    (folder / "Snapshots" / "1.xml").write_bytes(made.xml(old))
    for name, pattern in (("now", 1), ("old", 2)):
        image(folder / "Virtual Hard Disks" / f"{name}.vhd", "vhd", pattern)
    with pytest.raises(NotFound, match="is not in the description"):
        await look(node, folder, checkpoint="befor")
    job = await imported(node, folder, checkpoint="before")
    assert job.state is JobState.DONE, job.error
    path = node.application.vms.get("s").config.disks[0].source.path
    assert images.verified(path, ImageFormat.QCOW2, 2, "1M 64k")


async def test_names_that_are_taken_meanwhile_are_nobodys_loss(node: Node, tmp_path: Path) -> None:
    """Between the plan and the job somebody makes a volume, or a VM, of the same name: theirs stays."""
    folder = exported_folder(tmp_path / "e", {"disk0": b"1" * 4096})
    plan = await node.application.imports.plan(ImportRequest(path=str(folder)))
    theirs = await node.application.volumes.service.create("exported", 4096, ImageFormat.RAW)
    job = await node.finish(await node.application.jobs.start(plan, "test"))
    assert job.state is JobState.FAILED
    assert [v.name for v in await node.application.volumes.list()] == ["exported"]
    assert Path(theirs.path).exists()
    plan = await node.application.imports.plan(ImportRequest(path=str(folder)))
    await node.application.vms.create(VmCreate(name="exported", nics=(NicAdd(),)), "somebody")
    job = await node.finish(await node.application.jobs.start(plan, "test"))
    assert job.state is JobState.FAILED
    assert files(node) == ["exported.raw"]
    assert len(node.application.vms.list()) == 1


async def test_our_own_folder_comes_back_as_it_was(node: Node, tmp_path: Path) -> None:
    folder = exported_folder(tmp_path / "e", {"disk0": b"0" * 4096, "disk1": b"1" * 8192}, vcpus=3, notes="kept")
    job = await imported(node, folder, keep_id=True)
    assert job.state is JobState.DONE, job.error
    config = node.application.vms.get("exported").config
    assert (config.id, config.vcpus, config.notes) == ("8c5ab1c6-21f8-4c4c-9d5e-35a1a9f0a001", 3, "kept")
    assert [(d.serial, d.wwn, d.boot_index, d.unit) for d in config.disks] == [
        ("HL000000000000", 5 << 60, 1, 0),
        ("HL000000000001", (5 << 60) | 1, 2, 1),
    ]
    assert [n.slot for n in config.nics] == [2]
    assert [Path(d.source.path).read_bytes() for d in config.disks] == [b"0" * 4096, b"1" * 8192]
    report = await look(node, folder, name="x", new_macs=True, keep_id=True)
    assert [r.text for r in report.remarks if r.kind is RemarkKind.BLOCKER] == ["a VM with its id exists on this host"]
    (folder / "disk1.raw").write_bytes(b"2" * 8192)
    job = await imported(node, folder, name="x", new_macs=True)
    assert job.error is not None
    assert isinstance(job.error.to_error(), BadImage)
    (folder / "manifest.sha256").unlink()
    with pytest.raises(InvalidInput, match=r"no manifest\.sha256"):
        await look(node, folder)


# chains

SECTOR = 512


def sectors(pattern: int, first: int, count: int) -> dict[int, bytes]:
    return {number: bytes([pattern]) * SECTOR for number in range(first, first + count)}


def chained(folder: Path) -> Path:
    """The export of a VM with one snapshot: the base has 1s in its first two ranges, the present state 2s in the second
    and third."""
    now = Machine(name="chained", ide={(0, 0): Drive("D:\\VM\\Snapshots\\boot_A1B2.avhd")}, nics=())
    hyper_v(folder, now)
    (folder / "Snapshots").mkdir()
    before = Machine(name="clean", ide={(0, 0): Drive("D:\\VM\\Virtual Hard Disks\\boot.vhd")}, nics=())
    (folder / "Snapshots" / "5A5A.xml").write_bytes(made.xml(before))
    base = folder / "Virtual Hard Disks" / "boot.vhd"
    id = hyperv_vhd.dynamic(base, SIZE, {**sectors(1, 2048, 8), **sectors(1, 4096, 8)})
    top = folder / "Snapshots" / "boot_A1B2.avhd"
    changed = {**sectors(2, 4096, 8), **sectors(2, 8192, 8)}
    names = {b"W2ru": "..\\Virtual Hard Disks\\boot.vhd", b"W2ku": "D:\\VM\\Virtual Hard Disks\\boot.vhd"}
    hyperv_vhd.differencing(top, SIZE, changed, (id, base), names=names)
    return folder


async def test_a_chain_becomes_one_disk(node: Node, tmp_path: Path) -> None:
    folder = chained(tmp_path / "chained")
    report = await look(node, folder)
    assert report.possible, report.remarks
    disk = report.disks[0]
    assert (disk.fate, disk.size) == (DiskFate.FLATTEN, SIZE)
    assert disk.chain == (str(folder / "Virtual Hard Disks" / "boot.vhd"),)
    assert [s.name for s in report.machine.snapshots] == ["clean"]
    job = await imported(node, folder, format="vhdx")
    assert job.state is JobState.DONE, job.error
    path = node.application.vms.get("chained").config.disks[0].source.path
    for pattern, where in ((1, "1M 4k"), (2, "2M 4k"), (2, "4M 4k"), (0, "5M 4k")):
        assert images.verified(path, ImageFormat.VHDX, pattern, where)
    assert await node.application.host.store.list("claim/") == []
    assert files(node) == ["chained.vhdx"]
    job = await imported(node, folder, checkpoint="clean", name="before", in_place=True)
    assert job.state is JobState.DONE, job.error
    before = node.application.vms.get("before").config.disks[0].source
    assert before.path == str(folder / "Virtual Hard Disks" / "boot.vhd")
    assert images.verified(before.path, ImageFormat.VHD, 1, "2M 4k")


async def test_a_chain_that_is_broken_is_in_the_way(node: Node, tmp_path: Path) -> None:
    folder = chained(tmp_path / "c")
    base = folder / "Virtual Hard Disks" / "boot.vhd"
    hyperv_vhd.dynamic(base, SIZE, sectors(1, 0, 1))  # another disk of the same name
    report = await look(node, folder)
    blockers = [r.text for r in report.remarks if r.kind is RemarkKind.BLOCKER]
    assert len(blockers) == 1
    assert "another image" in blockers[0]
    base.unlink()
    with pytest.raises(Blocked, match="which is not in"):
        await imported(node, folder)
    await nothing_is_left(node)


async def test_a_chain_that_breaks_meanwhile_leaves_nothing(node: Node, tmp_path: Path) -> None:
    folder = chained(tmp_path / "c")
    hang = node.faults.hang("vm.import/volumes:before")
    job = await node.application.imports.run(ImportRequest(path=str(folder)), "test")
    await hang.reached.wait()
    (folder / "Virtual Hard Disks" / "boot.vhd").unlink()
    hang.release.set()
    ended = await node.finish(job)
    assert ended.state is JobState.FAILED
    await nothing_is_left(node)
    assert await node.application.host.store.list("claim/") == []


async def test_a_vhdx_that_was_not_closed_is_read_with_its_log(node: Node, tmp_path: Path) -> None:
    path = image(tmp_path / "open.vhdx", "vhdx", 8)
    images.leave_log(path)
    report = await look(node, path)
    assert report.disks[0].fate is DiskFate.FLATTEN
    job = await imported(node, path)
    assert job.state is JobState.DONE, job.error
    made_of = node.application.vms.get("open").config.disks[0].source.path
    assert images.verified(made_of, ImageFormat.QCOW2, 8, "1M 64k")


async def test_two_imports_that_want_the_same_id(node: Node, tmp_path: Path) -> None:
    folder = exported_folder(tmp_path / "e", {"disk0": b"0" * 4096})
    hang = node.faults.hang("vm.import/define:before")
    request = ImportRequest(path=str(folder), keep_id=True)
    first = await node.application.imports.run(request, "test")
    await hang.reached.wait()
    with pytest.raises(Busy, match="is being imported already"):
        await node.application.imports.run(request, "test")
    hang.release.set()
    assert (await node.finish(first)).state is JobState.DONE
    assert [v.name for v in await node.application.volumes.list()] == ["exported"]


async def test_an_address_that_is_taken_meanwhile(node: Node, tmp_path: Path) -> None:
    folder = exported_folder(tmp_path / "e", {"disk0": b"0" * 4096})
    plan = await node.application.imports.plan(ImportRequest(path=str(folder)))
    await node.application.vms.create(VmCreate(name="x", nics=(NicAdd(mac="52:54:00:aa:bb:01"),)), "somebody")
    job = await node.finish(await node.application.jobs.start(plan, "test"))
    assert job.error is not None
    assert isinstance(job.error.to_error(), InUse)
    assert files(node) == []


async def test_a_directory_that_is_not_there_is_in_the_way(node: Node, tmp_path: Path) -> None:
    path = image(tmp_path / "a.vhd", "vhd", 1)
    report = await look(node, path, directory=str(tmp_path / "no"))
    assert [r.text for r in report.remarks if r.kind is RemarkKind.BLOCKER] == ["does not exist"]
    (tmp_path / "yes").mkdir()
    job = await imported(node, path, directory=str(tmp_path / "yes"))
    assert job.state is JobState.DONE, job.error
    assert (tmp_path / "yes" / "a.qcow2").exists()
