"""Looking into volumes: details, checksum, validation, on real images of every format and on broken ones."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import images
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage, HostlerError
from hostler.model.image import Soundness
from hostler.model.limits import PROFILES, Profile
from hostler.model.units import MiB
from hostler.model.volume import Volume
from hostler.storage.changes import VolumeChanges
from hostler.storage.content import Content
from hostler.storage.qemu_img import QemuImg
from hostler.storage.volumes import VolumeService
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.component

SIZE = 24 * MiB


@pytest.fixture
async def changes(tmp_path: Path) -> AsyncIterator[VolumeChanges]:
    store = await SqliteStore.open(tmp_path / "state/hostler.db")
    service = VolumeService(store, tmp_path / "volumes", PROFILES[Profile.HOSTLER])
    yield VolumeChanges(store, service)
    await store.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, zeroes that take space, a hole, a few bytes, a hole."""
    path = tmp_path / "source.img"
    with path.open("wb") as file:
        file.write(os.urandom(5 * MiB) + bytes(3 * MiB))
        file.seek(17 * MiB + 512)
        file.write(b"needle")
        file.truncate(SIZE)
    return path


def seen(path: Path, format: ImageFormat, size: int = SIZE) -> Volume:
    return Volume(name="v", path=str(path), format=format, size=size)


@pytest.mark.parametrize("format", ImageFormat)
async def test_the_checksum_is_that_of_the_content_in_every_format(
    changes: VolumeChanges, source: Path, format: ImageFormat
) -> None:
    made = await changes.service.create_from("v", str(source), format, source_format=ImageFormat.RAW)
    told: list[float] = []
    found = await changes.checksum(made, told.append)
    assert found.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found.size == SIZE
    assert told[-1] == 1.0
    assert found.data < SIZE


async def test_compressed_clusters_are_read_too(changes: VolumeChanges, source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.qcow2"
    images.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", source, packed)
    found = await changes.checksum(seen(packed, ImageFormat.QCOW2), lambda _: None)
    assert found.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (await changes.inspect(str(packed))).compression == "zlib"


async def test_a_raw_image_that_ends_within_a_sector(changes: VolumeChanges, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 700)
    found = await changes.checksum(seen(path, ImageFormat.RAW, 1024), lambda _: None)
    assert found.sha256 == hashlib.sha256(b"x" * 700 + bytes(324)).hexdigest()


@pytest.mark.parametrize("format", ImageFormat)
async def test_any_place_is_read_alone(changes: VolumeChanges, source: Path, format: ImageFormat) -> None:
    made = await changes.service.create_from("v", str(source), format, source_format=ImageFormat.RAW)
    content = source.read_bytes()
    async with changes.open(made) as opened:
        for at, length in ((0, 512), (5 * MiB - 300, 600), (17 * MiB + 500, 4096), (SIZE - 512, 4096), (SIZE, 10)):
            assert await opened.read(at, length) == content[at : at + length]


async def test_what_a_running_writer_has_is_not_read(changes: VolumeChanges, tmp_path: Path) -> None:
    made = await changes.service.create("v", SIZE, ImageFormat.QCOW2)
    writer = subprocess.Popen(  # noqa: ASYNC220 - it takes a moment only
        ["stdbuf", "-o0", "qemu-io", "-f", "qcow2", made.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.read(9)  # its prompt
    try:
        with pytest.raises(HostlerError, match="uses it"):
            await changes.checksum(made, lambda _: None)
        looked = await changes.inspect("v")
        assert (looked.subformat, looked.map) == ("version 3", None)
    finally:
        writer.communicate(b"quit\n")


@pytest.mark.parametrize("format", ImageFormat)
async def test_details(changes: VolumeChanges, source: Path, format: ImageFormat) -> None:
    made = await changes.service.create_from("v", str(source), format, source_format=ImageFormat.RAW)
    found = await changes.inspect("v")
    assert found.known
    assert (found.name, found.format, found.size) == ("v", format, SIZE)
    assert found.file_size == os.path.getsize(made.path)
    assert found.map is not None
    assert found.map.complete
    assert found.map.data + found.map.zeroes == SIZE
    assert 5 * MiB < found.map.data < SIZE
    if format in (ImageFormat.VHD, ImageFormat.VHD_FIXED):
        assert found.creator.startswith("qem2")
        assert found.image_created is not None
        assert found.geometry is not None
        assert found.identifier in images.run("vhdiinfo", made.path)
    if format is ImageFormat.VHDX:
        assert (found.subformat, found.sector_size) == ("dynamic", 512)
        assert f"({SIZE} bytes)" in images.run("vhdiinfo", made.path)
    by_path = await changes.inspect(made.path)
    assert by_path == found


async def test_details_of_a_qcow2(changes: VolumeChanges, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    images.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8M")
    images.run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "monday")
    images.run("qemu-img", "snapshot", "-c", "first", path)
    images.qemu_io(path, ImageFormat.QCOW2, "write -P 1 0 4k", "write -P 1 64k 4k", "write -P 1 4k 4k")
    found = await changes.inspect(str(path))
    assert (found.block_size, found.known, found.name) == (4096, False, "a")
    assert [b.name for b in found.bitmaps] == ["monday"]
    assert [s.name for s in found.snapshots] == ["first"]
    assert found.map is not None
    assert found.map.fragments >= 1


async def validated(changes: VolumeChanges, path: Path, format: ImageFormat, repair: bool = False) -> Soundness:
    return (await changes.validate(seen(path, format), repair)).verdict


@pytest.mark.parametrize("format", ImageFormat)
async def test_a_sound_image_is_called_sound(changes: VolumeChanges, source: Path, format: ImageFormat) -> None:
    made = await changes.service.create_from("v", str(source), format, source_format=ImageFormat.RAW)
    assert await validated(changes, Path(made.path), format) is Soundness.SOUND
    assert await validated(changes, Path(made.path), format, repair=True) is Soundness.SOUND


async def test_leaks_and_errors_of_a_qcow2_are_told_apart_and_repaired(
    changes: VolumeChanges, source: Path, tmp_path: Path
) -> None:
    made = Path(
        (await changes.service.create_from("v", str(source), ImageFormat.QCOW2, source_format=ImageFormat.RAW)).path
    )
    content = made.read_bytes()
    with made.open("r+b") as file:  # a level 2 entry is forgotten: its cluster belongs to nobody
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        table = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(table)
        file.write(bytes(8))
    assert await validated(changes, made, ImageFormat.QCOW2) is Soundness.LEAKS
    assert await validated(changes, made, ImageFormat.QCOW2, repair=True) is Soundness.SOUND
    made.write_bytes(content)
    with made.open("r+b") as file:  # the counts of all clusters are lost
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        block = int.from_bytes(file.read(8), "big")
        file.seek(block)
        file.write(bytes(64))
    assert await validated(changes, made, ImageFormat.QCOW2) is Soundness.REPAIRABLE
    assert await validated(changes, made, ImageFormat.QCOW2, repair=True) is Soundness.SOUND
    assert "identical" in images.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, made)


async def test_the_log_of_a_vhdx_is_replayed_by_a_repair(changes: VolumeChanges, source: Path) -> None:
    made = await changes.service.create_from("v", str(source), ImageFormat.VHDX, source_format=ImageFormat.RAW)
    images.leave_log(made.path)
    assert (await changes.inspect("v")).log_pending
    assert await validated(changes, Path(made.path), ImageFormat.VHDX) is Soundness.REPAIRABLE
    found = await changes.checksum(made, lambda _: None)
    assert found.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert await validated(changes, Path(made.path), ImageFormat.VHDX, repair=True) is Soundness.SOUND
    assert not (await changes.inspect("v")).log_pending


async def test_blocks_of_a_vhd_that_lie_over_each_other(changes: VolumeChanges, source: Path) -> None:
    made = await changes.service.create_from("v", str(source), ImageFormat.VHD, source_format=ImageFormat.RAW)
    with open(made.path, "r+b") as file:
        file.seek(1536)  # the block table of a VHD that QEMU made
        first = file.read(4)
        file.write(first)
    verdict = await changes.validate(made, repair=True)
    assert verdict.verdict is Soundness.DAMAGED
    assert "blocks 0 and 1" in verdict.findings[0]


async def test_two_footers_that_differ_are_made_one(changes: VolumeChanges, source: Path) -> None:
    made = await changes.service.create_from("v", str(source), ImageFormat.VHD, source_format=ImageFormat.RAW)
    with open(made.path, "r+b") as file:  # as after a kill between a new block and the footer behind it
        file.truncate(os.path.getsize(made.path) - 512)
    path = Path(made.path)
    assert await validated(changes, path, ImageFormat.VHD) is Soundness.REPAIRABLE
    assert await validated(changes, path, ImageFormat.VHD, repair=True) is Soundness.SOUND
    assert path.read_bytes()[-512:] == path.read_bytes()[:512]


SOUND: dict[ImageFormat, bytes] = {}


def sound(format: ImageFormat, directory: Path) -> bytes:
    """A small real image with data, made once."""
    if format not in SOUND:
        path = directory / "sound"
        options = {
            ImageFormat.VHD: ["-o", "subformat=dynamic,force_size=on"],
            ImageFormat.VHDX: ["-o", "block_size=1M"],
        }
        driver = {ImageFormat.VHD: "vpc"}.get(format, str(format))
        images.run("qemu-img", "create", "-q", "-f", driver, *options.get(format, []), path, "4M")
        images.qemu_io(path, format, "write -P 7 0 64k", "write -P 8 3M 64k")
        SOUND[format] = path.read_bytes()
    return SOUND[format]


@pytest.mark.parametrize("format", [ImageFormat.QCOW2, ImageFormat.VHD, ImageFormat.VHDX])
@settings(max_examples=12)
@given(data=st.data())
async def test_hostile_images_are_read_validated_and_inspected_without_harm(
    tmp_path_factory: pytest.TempPathFactory, format: ImageFormat, data: st.DataObject
) -> None:
    """Whatever bytes are changed: an answer, or an error of ours; nothing hangs (each test has a time limit)."""
    directory = tmp_path_factory.mktemp("hostile")
    content = bytearray(sound(format, directory))
    for _ in range(data.draw(st.integers(1, 4))):
        tables = (0, 16, 28, 32, 36, 40, 48, 512, 528, 540, 544, 1536, 1540, 65_536, 131_072, 196_608, 262_144, 1048576)
        at = data.draw(st.sampled_from(tables)) + data.draw(st.integers(0, 64))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(piece)] = piece
    path = directory / "image"
    path.write_bytes(bytes(content))
    image = QemuImg()
    store = await SqliteStore.open(directory / "state.db")
    changes = VolumeChanges(store, VolumeService(store, directory, PROFILES[Profile.HOSTLER]), image)
    try:
        assert (await changes.validate(seen(path, format, 4 * MiB), repair=False)).verdict
        shape = await changes.inspect(str(path), format)
        async with Content(str(path), format, min(shape.size, 64 * MiB), image) as opened:
            await opened.read(0, MiB)
            await opened.read(3 * MiB, 64 * 1024)
    except BadImage as error:
        assert error.cause
    except HostlerError as error:
        assert error.cause
    finally:
        await store.close()
