"""A VM's user who broke out of QEMU can write any header into its disks. Whatever works on them as root afterwards must
not open what such a header names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostler.model.disk import DiskSource, ImageFormat
from hostler.model.errors import BadImage
from hostler.model.image import Soundness
from hostler.model.units import MiB
from hostler.storage.layer_images import LayerImages
from hostler.storage.qemu_img import QemuImg
from hostler.storage.validation import validate

pytestmark = pytest.mark.component


def run(*argv: object) -> None:
    subprocess.run([str(a) for a in argv], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file of somebody else's."""
    path = tmp_path / "theirs"
    path.write_bytes(b"theirs".ljust(MiB, b"."))
    return path


@pytest.fixture
def hostile(tmp_path: Path, theirs: Path) -> DiskSource:
    """A layer that says its data is in that file."""
    path = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'own'}", path, "1M")
    run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", f"data_file={theirs}", path)
    return DiskSource(path=str(path), format=ImageFormat.QCOW2, size=MiB)


async def test_a_merge_does_not_write_what_a_header_names(tmp_path: Path, theirs: Path, hostile: DiskSource) -> None:
    path = tmp_path / "top.qcow2"
    top = DiskSource(path=str(path), format=ImageFormat.QCOW2, size=MiB, node="abc", backing=hostile)
    layers = LayerImages()
    await layers.create(top)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 65 0 64k", _named(top))
    before = theirs.read_bytes()
    with pytest.raises(BadImage, match="external data file"):
        await layers.commit(top)
    assert theirs.read_bytes() == before


async def test_a_copy_does_not_read_what_a_header_names(tmp_path: Path, hostile: DiskSource) -> None:
    with pytest.raises(BadImage, match="external data file"):
        await LayerImages().flatten(hostile, str(tmp_path / "copy.raw"), ImageFormat.RAW)
    assert not (tmp_path / "copy.raw").exists()


async def test_a_repair_does_not_open_what_a_header_names(theirs: Path, hostile: DiskSource) -> None:
    theirs.unlink()  # QEMU would say that it is not there
    found = await validate(hostile.path, ImageFormat.QCOW2, QemuImg(), repair=True)
    assert found.verdict is Soundness.DAMAGED
    assert found.checked_by == ("hostler",)
    assert "external data file" in found.findings[0]


def _named(top: DiskSource) -> str:
    """The layer alone, since what is below it is hostile."""
    return "json:" + f'{{"driver": "qcow2", "backing": null, "file": {{"driver": "file", "filename": "{top.path}"}}}}'


async def test_a_new_name_of_what_is_below_opens_nothing_else(theirs: Path, hostile: DiskSource) -> None:
    theirs.unlink()  # QEMU would say that it is not there
    below = DiskSource(path=str(theirs), format=ImageFormat.RAW, size=MiB, node="b")
    with pytest.raises(BadImage, match="external data file"):
        await LayerImages().name_below(hostile, below)
