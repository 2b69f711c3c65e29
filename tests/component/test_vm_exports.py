"""Exports with real images and the real qemu-img, checked by programs we did not write, and read back."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import images
import pytest
from lxml import etree

from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import AlreadyExists, Cancelled, InvalidInput, NoSpace, NotFound, WrongState
from hostler.model.job import Job, JobState
from hostler.model.requests import DiskAdd, NicAdd, VmCreate
from hostler.model.transfer import ExportForm, ExportReport, ExportRequest, ImportRequest
from hostler.model.units import MiB
from hostler.model.vm import VmConfig
from hostler.qemu.paths import StateDir
from hostler.storage.formats import QEMU_DRIVER
from hostler.storage.qemu_img import QemuImg
from hostler.testing.inprocess import Node, Site, short_directory, until

pytestmark = pytest.mark.component

SIZE = 6 * MiB
FORMATS = (ImageFormat.QCOW2, ImageFormat.VHD_FIXED, ImageFormat.VHDX, ImageFormat.VHD, ImageFormat.RAW)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    with short_directory() as directory:
        async with Site(directory) as made:
            yield made


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a", images=QemuImg())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


async def vm(node: Node, formats: tuple[ImageFormat, ...] = FORMATS) -> VmConfig:
    """A VM "web" with a disk of each format, each with a mark of its own at 1 MiB; the first on IDE."""
    disks = []
    for number, format in enumerate(formats):
        made = await node.application.volumes.service.create(f"d{number}", SIZE, format)
        text = images.qemu_io(made.path, format, f"write -P {number + 1} 1M 64k")
        assert "wrote 65536/65536" in text
        disks.append(DiskAdd(volume=made.name, bus=Bus.SCSI if number else Bus.IDE, unit=number))
    request = VmCreate(
        name="web",
        vcpus=2,
        memory=96 * MiB,
        notes="a <note>",
        disks=(*disks, DiskAdd(media=Media.CDROM, bus=Bus.IDE, unit=3)),
        nics=(NicAdd(mac="52:54:00:00:00:0a"), NicAdd()),
    )
    return (await node.application.vms.create(request, "test")).config


async def exported(node: Node, out: Path, **more: object) -> ExportReport:
    request = ExportRequest.model_validate({"directory": str(out), **more})
    job = await node.finish(await node.application.vm_exports.run("web", request, "test"))
    assert job.state is JobState.DONE, job.error
    assert await node.application.host.store.list("claim/") == []
    return ExportReport.model_validate(job.result)


async def imported(node: Node, path: str, **more: object) -> VmConfig:
    request = ImportRequest.model_validate({"path": path, **more})
    job: Job = await node.finish(await node.application.imports.run(request, "test"))
    assert job.state is JobState.DONE, job.error
    return node.application.vms.get(job.target).config


def same(one: DiskSource, other: DiskSource) -> None:
    """By qemu-img, which compares what a guest sees."""
    names = []
    for source in (one, other):
        if source.format is ImageFormat.VHD_FIXED:
            names.append(f"driver=raw,size={source.size},file.driver=file,file.filename={source.path}")
        else:
            names.append(f"driver={QEMU_DRIVER[source.format]},file.driver=file,file.filename={source.path}")
    done = subprocess.run(
        ["qemu-img", "compare", "--image-opts", *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Images are identical" in done.stdout, (done.stdout, done.stderr)


async def test_a_folder_of_ours_comes_back_complete(site: Site, node: Node, out: Path) -> None:
    config = await vm(node)
    report = await exported(node, out)
    folder = out / "web"
    assert report.path == str(folder)
    assert sorted(os.listdir(folder)) == sorted(report.files)
    assert report.lost == ("the medium in drive disk5",)
    assert folder.stat().st_mode & 0o777 == 0o711
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert run("sha256sum", "-c", "manifest.sha256", cwd=folder).count(": OK") == len(report.files) - 1

    other = await site.add("b", images=QemuImg())
    back = await imported(other, str(folder), keep_id=True)
    expected = [d.but(source=d.source.but(path="", size=0)) for d in config.disks]
    assert [d.but(source=d.source.but(path="", size=0)) for d in back.disks] == expected
    assert back.but(disks=(), run_as=None) == config.but(disks=(), run_as=None)
    for one, two in zip(config.disks, back.disks, strict=True):
        if one.media is Media.DISK:
            same(one.source, two.source)
    copy = await imported(node, str(folder), name="copy", new_macs=True, format="qcow2")
    assert copy.id != config.id
    assert copy.generation_id != config.generation_id
    assert {d.source.format for d in copy.disks if d.media is Media.DISK} == {ImageFormat.QCOW2}
    same(config.disks[2].source, copy.disks[2].source)


async def test_an_ova_is_read_by_others_and_by_us(site: Site, node: Node, out: Path, tmp_path: Path) -> None:
    config = await vm(node)
    report = await exported(node, out, form="ova")
    path = out / "web.ova"
    assert report.path == str(path)
    assert os.listdir(out) == ["web.ova"]
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["web.ovf", "web.mf", *(f"disk{n}.vmdk" for n in range(5))]
    (tmp_path / "unpacked").mkdir()
    run("tar", "-xf", str(path), "-C", str(tmp_path / "unpacked"))
    root = etree.parse(tmp_path / "unpacked" / "web.ovf").getroot()
    ids = {e.get(f"{{{root.nsmap['ovf']}}}id") for e in root.iter() if etree.QName(e).localname == "File"}
    refs = {e.get(f"{{{root.nsmap['ovf']}}}fileRef") for e in root.iter() if etree.QName(e).localname == "Disk"}
    assert len(ids) == 5
    assert ids == refs
    run("qemu-img", "check", "-f", "vmdk", str(tmp_path / "unpacked" / "disk0.vmdk"))

    other = await site.add("b", images=QemuImg())
    back = await imported(other, str(path))
    assert (back.name, back.vcpus, back.memory, back.notes) == ("web", 2, 96 * MiB, "a <note>")
    assert [n.mac for n in back.nics] == [n.mac for n in config.nics]
    disks = [d for d in config.disks if d.media is Media.DISK]
    assert [(d.bus, d.unit) for d in back.disks] == [(d.bus, d.unit) for d in disks]
    for one, two in zip(disks, back.disks, strict=True):
        same(one.source, two.source)


async def test_an_ovf_in_a_folder(site: Site, node: Node, out: Path) -> None:
    config = await vm(node, (ImageFormat.VHDX,))
    report = await exported(node, out, form="ovf")
    assert sorted(os.listdir(report.path)) == ["disk0.vmdk", "web.mf", "web.ovf"]
    back = await imported(node, report.path, name="back", new_macs=True)
    same(config.disks[0].source, back.disks[0].source)
    with pytest.raises(InvalidInput, match="VMDK disks only"):
        await node.application.vm_exports.check(
            "web", ExportRequest(directory=str(out), form=ExportForm.OVF, format="raw")
        )  # type: ignore[arg-type]


async def test_layers_become_one_image(node: Node, out: Path, tmp_path: Path) -> None:
    config = await vm(node, (ImageFormat.QCOW2,))
    base, top = config.disks[0].source, tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(top), str(SIZE))
    run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", base.path, "-f", "qcow2", str(top))
    images.qemu_io(top, ImageFormat.QCOW2, "write -P 9 2M 64k")
    layered = DiskSource(path=str(top), format=ImageFormat.QCOW2, size=SIZE, node="aaaa", backing=base)
    disks = (config.disks[0].but(source=layered), *config.disks[1:])
    await node.application.host.actor("web").change(lambda record: record.but(config=record.config.but(disks=disks)))
    report = await exported(node, out)
    assert any("checkpoints" in text for text in report.lost)
    back = await imported(node, report.path, name="back", new_macs=True)
    path = back.disks[0].source.path
    assert back.disks[0].source.backing is None
    assert images.verified(path, ImageFormat.QCOW2, 1, "1M 64k")
    assert images.verified(path, ImageFormat.QCOW2, 9, "2M 64k")


async def test_uefi_variables_and_tpm_state_go_along(node: Node, out: Path, tmp_path: Path) -> None:
    await vm(node, (ImageFormat.RAW,))
    host = node.application.host
    template = tmp_path / "template.fd"
    template.write_bytes(b"v" * 4096)
    host.facts = host.facts.but(
        qemu=host.facts.qemu.but(firmware_code=str(template), firmware_vars=str(template), tpm=True)
    )
    actor = host.actor("web")
    await actor.change(lambda r: r.but(config=r.config.but(firmware="uefi", tpm=True)))
    state = host.paths.vm_state(actor.record.id)
    (state / "tpm").mkdir(parents=True)
    Path(StateDir(str(state)).uefi_vars).write_bytes(b"V" * 4096)
    (state / "tpm" / "tpm2-00.permall").write_bytes(b"T" * 100)
    report = await exported(node, out)
    assert {"uefi-vars.fd", "tpm2-00.permall"} <= set(os.listdir(report.path))
    back = await imported(node, report.path, name="back", new_macs=True)
    there = host.paths.vm_state(back.id)
    assert (there / "uefi-vars.fd").read_bytes() == b"V" * 4096
    assert (there / "tpm" / "tpm2-00.permall").read_bytes() == b"T" * 100
    if os.geteuid() == 0:
        assert (there / "uefi-vars.fd").stat().st_uid == back.run_as
    template.write_bytes(b"v" * 8192)
    seen = await node.application.imports.inspect(ImportRequest(path=report.path, name="x", new_macs=True))
    assert any(r.subject == "uefi-vars.fd" for r in seen.remarks)
    # a hostile guest's user put a link in the place of the variables
    os.unlink(state / "uefi-vars.fd")
    os.symlink("/etc/shadow", state / "uefi-vars.fd")
    (out / "again").mkdir()
    report = await exported(node, out / "again")
    assert "uefi-vars.fd" not in os.listdir(report.path)


async def test_what_is_in_the_way_is_said_before(node: Node, out: Path) -> None:
    await vm(node, (ImageFormat.RAW,))
    request = ExportRequest(directory=str(out))
    with pytest.raises(NotFound, match="does not exist"):
        await node.application.vm_exports.run("web", ExportRequest(directory=str(out / "no")), "test")
    (out / "web").mkdir()
    with pytest.raises(AlreadyExists, match="exists already"):
        await node.application.vm_exports.run("web", request, "test")
    (out / "web").rmdir()
    job = await node.application.vms.act("web", "start", "test")
    await node.finish(job)
    assert (await node.application.vm_exports.check("web", request)).files
    with pytest.raises(WrongState, match="to export it it must be off"):
        await node.application.vm_exports.run("web", request, "test")
    assert os.listdir(out) == []


async def test_a_name_that_is_taken_meanwhile_is_nobodys_loss(node: Node, out: Path) -> None:
    await vm(node, (ImageFormat.RAW,))
    hang = node.faults.hang("vm.export/publish:before")
    job = await node.application.vm_exports.run("web", ExportRequest(directory=str(out)), "test")
    await hang.reached.wait()
    (out / "web").mkdir()
    (out / "web" / "theirs").write_text("x")
    hang.release.set()
    ended = await node.finish(job)
    assert ended.state is JobState.FAILED
    assert os.listdir(out) == ["web"]
    assert os.listdir(out / "web") == ["theirs"]


async def test_cancelled_while_it_writes(node: Node, out: Path) -> None:
    await vm(node, (ImageFormat.RAW,))
    path = node.application.vms.get("web").config.disks[0].source.path
    os.truncate(path, 0)
    os.truncate(path, 4 * 1024 * MiB)
    with open(path, "r+b") as file:  # something to copy for some seconds
        for at in range(512):
            file.seek(at * 8 * MiB)
            file.write(os.urandom(65536))
    record = node.application.vms.get("web").config
    bigger = record.disks[0].but(source=record.disks[0].source.but(size=4 * 1024 * MiB))
    await node.application.host.actor("web").change(
        lambda r: r.but(config=r.config.but(disks=(bigger, *r.config.disks[1:])))
    )
    job = await node.application.vm_exports.run("web", ExportRequest(directory=str(out), form=ExportForm.OVA), "test")
    await until(
        lambda: (
            any(p.name.endswith(".hostler-part") for p in out.rglob(".*disk*") or out.rglob("*"))
            or bool(os.listdir(out))
        )
    )
    await node.application.jobs.cancel(job.id, "test")
    ended = await node.finish(job)
    assert ended.state is JobState.CANCELLED
    assert ended.error is not None
    assert isinstance(ended.error.to_error(), Cancelled)
    assert os.listdir(out) == []
    assert await node.application.host.store.list("claim/") == []


@contextmanager
def small(path: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
@pytest.mark.parametrize("form", list(ExportForm))
async def test_a_full_disk_leaves_nothing(node: Node, out: Path, form: ExportForm) -> None:
    config = await vm(node, (ImageFormat.RAW, ImageFormat.RAW))
    for disk in config.disks[:2]:
        with open(disk.source.path, "r+b") as file:
            file.write(os.urandom(SIZE))
    request = ExportRequest(directory=str(out), form=form)
    with small(out, SIZE + MiB):  # one disk fits, two do not
        job = await node.finish(await node.application.vm_exports.run("web", request, "test"))
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert isinstance(job.error.to_error(), NoSpace), job.error
        assert os.listdir(out) == []
    with small(out, MiB), pytest.raises(NoSpace) if form is ExportForm.FOLDER else _nothing():
        job = await node.finish(await node.application.vm_exports.run("web", request, "test"))
        assert job.state is JobState.FAILED
    assert node.application.vms.get("web").job is None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_devices_are_not_exported() -> None:
    from hostler.host.operations.export import plan_export  # noqa: PLC0415 - the one pure test here
    from hostler.model.vm import VmRecord  # noqa: PLC0415

    device = Disk(id="disk0", source=DiskSource(kind=SourceKind.DEVICE, path="/dev/sdz"))
    config = VmConfig(id="x", name="web", machine="m", cpu_model="c", disks=(device,))
    report = plan_export(VmRecord(config=config), ExportRequest(directory="/out"))
    assert report.files == ("vm.json", "manifest.sha256")
    assert report.lost == ("disk disk0: what it is on (/dev/sdz) stays here",)
