"""Folders and backups that somebody else wrote: what they name and link to outside of themselves is not taken."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.host.backups.restoring import restored_config
from hostler.host.checkpoints.layer_changes import layers_of
from hostler.model.disk import Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.foreign import ImportReport, RemarkKind
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.transfer import ImportRequest
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot, VmConfig
from hostler.storage.qemu_img import QemuImg
from hostler.testing import hyperv_export as made
from hostler.testing.hyperv_export import Drive, Machine
from hostler.testing.inprocess import Node, Site, short_directory

pytestmark = pytest.mark.component


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    with short_directory() as directory:
        async with Site(directory) as site:
            yield await site.add("a", images=QemuImg())


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The disk of somebody else."""
    path = tmp_path / "volumes" / "boot.vhdx"
    path.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "vhdx", path, "8M"], check=True)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "Virtual Machines").mkdir(parents=True)
    machine = Machine(name="hostile", ide={(0, 0): Drive("D:\\boot.vhdx")}, nics=())
    (folder / "Virtual Machines" / "1.xml").write_bytes(made.xml(machine))
    return folder


async def blockers(node: Node, folder: Path, **options: object) -> list[str]:
    report: ImportReport = await node.application.imports.inspect(
        ImportRequest.model_validate({"path": str(folder), **options})
    )
    return [r.text for r in report.remarks if r.kind is RemarkKind.BLOCKER]


async def test_a_link_in_a_folder_leads_nowhere_else(node: Node, folder: Path, theirs: Path) -> None:
    (folder / "Virtual Hard Disks").mkdir()
    (folder / "Virtual Hard Disks" / "boot.vhdx").symlink_to(theirs)
    found = await blockers(node, folder)
    assert len(found) == 1
    assert "outside of what is imported" in found[0]
    assert await blockers(node, folder, search=[str(theirs.parent)]) == []


async def test_nor_does_a_linked_directory(node: Node, folder: Path, theirs: Path) -> None:
    (folder / "Virtual Hard Disks").symlink_to(theirs.parent)
    assert len(await blockers(node, folder)) == 1


async def test_a_link_inside_the_folder_is_followed(node: Node, folder: Path, theirs: Path) -> None:
    (folder / "Virtual Hard Disks").mkdir()
    os.rename(theirs, folder / "real.vhdx")
    (folder / "Virtual Hard Disks" / "boot.vhdx").symlink_to("../real.vhdx")
    assert await blockers(node, folder) == []


async def test_an_image_that_somebody_names_may_be_a_link(node: Node, tmp_path: Path, theirs: Path) -> None:
    (tmp_path / "mine.vhdx").symlink_to(theirs)
    assert await blockers(node, tmp_path / "mine.vhdx") == []


async def test_a_manifest_gives_a_vm_nothing_of_this_host(node: Node, tmp_path: Path) -> None:
    host = node.application.host
    mine, everybodys = tmp_path / "mine", tmp_path / "everybodys"
    for path, mode in ((mine, 0o600), (everybodys, 0o644)):
        path.write_bytes(bytes(MiB))
        path.chmod(mode)

    def disk(number: int, path: Path, kind: SourceKind = SourceKind.VOLUME, read_only: bool = True) -> Disk:
        source = DiskSource(kind=kind, path=str(path), format=ImageFormat.RAW, size=MiB)
        return Disk(id=f"d{number}", unit=number, source=source, read_only=read_only, media=Media.DISK)

    await node.application.vms.create(VmCreate(name="plain", memory=64 * MiB), "test")
    plain = node.application.vms.get("plain").config
    disks = (
        disk(0, mine),
        disk(1, everybodys),
        disk(2, everybodys, read_only=False),
        disk(3, Path("/dev/null"), SourceKind.DEVICE),
    )
    kernel = KernelBoot(kernel=str(everybodys), initrd=str(mine))
    old: VmConfig = plain.but(id="9c5ab1c6-21f8-4c4c-9d5e-35a1a9f0a001", disks=disks, kernel=kernel)
    config, changed = await restored_config(host, old, old.id, "back", {})
    assert [d.id for d in config.disks] == ["d1"]
    assert config.kernel is None
    assert len(changed) == 4
    kernel = kernel.but(initrd=None)
    config, _ = await restored_config(host, old.but(kernel=kernel), old.id, "back", {})
    assert config.kernel == kernel


async def test_a_layer_that_another_vm_reads_by_another_name_stays(node: Node, tmp_path: Path, base: Path) -> None:
    path, link = base, tmp_path / "link.qcow2"
    link.symlink_to(path)
    vms = node.application.vms
    await vms.create(VmCreate(name="one", memory=64 * MiB, disks=(DiskAdd(volume=str(path)),)), "test")
    record = vms.get("one")
    layers, _ = await layers_of(node.application.host, record, [])
    assert [layer.fixed for layer in layers] == [False]
    await vms.create(VmCreate(name="two", memory=64 * MiB, disks=(DiskAdd(volume=str(link), read_only=True),)), "test")
    layers, _ = await layers_of(node.application.host, record, [])
    assert [layer.fixed for layer in layers] == [True]
