"""Copies that share blocks: on a real file system that can, whole, and never of an image somebody writes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import AlreadyExists, InUse
from hostler.model.limits import PROFILES, Profile
from hostler.model.units import MiB
from hostler.storage.cloning import cloned
from hostler.storage.formats import Shape, recognise
from hostler.storage.pools import filesystem
from hostler.storage.volumes import VolumeService
from hostler.store.sqlite import SqliteStore

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(shutil.which("mkfs.btrfs") is None, reason="needs btrfs-progs"),
]

SIZE = 4 * MiB


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("reflink")
    image, mount = base / "image", base / "mount"
    image.touch()
    os.truncate(image, 160 * MiB)
    mount.mkdir()
    run("mkfs.btrfs", "-q", image)
    run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        run("umount", mount)


@pytest.fixture
async def volumes(tmp_path: Path, place: Path) -> AsyncIterator[VolumeService]:
    store = await SqliteStore.open(tmp_path / "state" / "hostler.db")
    yield VolumeService(store, place, PROFILES[Profile.HOSTLER])
    await store.close()


@pytest.fixture
def original(place: Path) -> Iterator[Path]:
    path = place / "original.raw"
    path.write_bytes(os.urandom(SIZE))
    yield path
    for left in place.iterdir():
        left.unlink()


def taken(place: Path) -> int:
    run("sync", "-f", place)
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_the_file_system_says_that_it_can(place: Path) -> None:
    assert filesystem.features(str(place)).reflink


@pytest.mark.parametrize("format", [ImageFormat.RAW, ImageFormat.QCOW2])
async def test_a_copy_takes_no_room_and_is_its_own(
    volumes: VolumeService, place: Path, original: Path, format: ImageFormat
) -> None:
    source = original
    if format is ImageFormat.QCOW2:
        source = place / "original.qcow2"
        run("qemu-img", "convert", "-O", "qcow2", original, source)
    before = taken(place)
    made = await volumes.create_from("copy", str(source), format, source_format=format)
    assert taken(place) - before < SIZE // 4
    assert (made.size, made.format) == (SIZE, format)
    run("qemu-img", "compare", "-f", format.value, "-F", "raw", made.path, original)
    run("qemu-io", "-f", format.value, "-c", "write -P 7 0 1M", made.path)
    run("qemu-img", "compare", "-f", format.value, "-F", "raw", source, original)


async def test_what_cannot_be_cloned_is_converted(
    volumes: VolumeService, place: Path, original: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere.raw"
    shutil.copyfile(original, other)
    for name, source, size in (("far", other, None), ("larger", original, 2 * SIZE)):
        made = await volumes.create_from(name, str(source), ImageFormat.RAW, size, source_format=ImageFormat.RAW)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", made.path, original)
    vhd = await volumes.create_from("vhd", str(original), ImageFormat.VHD_FIXED, source_format=ImageFormat.RAW)
    assert not await cloned(vhd.path, recognise(vhd.path), str(place / "x"), ImageFormat.VHD_FIXED, vhd.size)
    assert not (place / "x").exists()


async def test_an_image_with_more_in_it_than_its_content_is_not_cloned(place: Path, original: Path) -> None:
    """Snapshots and bitmaps would come along, and mean something else in the copy."""
    image = place / "more.qcow2"
    for change in (("qemu-img", "snapshot", "-c", "s", image), ("qemu-img", "bitmap", "--add", image, "b")):
        run("qemu-img", "convert", "-O", "qcow2", original, image)
        shape = recognise(str(image))
        assert await cloned(str(image), shape, str(place / "plain"), ImageFormat.QCOW2, SIZE)
        run(*change)
        assert not await cloned(str(image), shape, str(place / "copy"), ImageFormat.QCOW2, SIZE)
        (place / "plain").unlink()
    assert sorted(p.name for p in place.iterdir()) == ["more.qcow2", "original.raw"]


async def test_an_image_that_somebody_writes_is_not_cloned(volumes: VolumeService, place: Path, original: Path) -> None:
    shape = Shape(ImageFormat.RAW, SIZE, SIZE)
    writer = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "raw", original, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdin is not None and writer.stdout is not None
    try:
        writer.stdin.write(b"write 0 4k\n")
        await writer.stdout.readuntil(b"wrote")
        assert not await cloned(str(original), shape, str(place / "copy"), ImageFormat.RAW, SIZE)
        with pytest.raises(InUse):
            await volumes.create_from("copy", str(original), ImageFormat.RAW, source_format=ImageFormat.RAW)
    finally:
        writer.stdin.close()
        await writer.wait()
    assert await cloned(str(original), shape, str(place / "copy"), ImageFormat.RAW, SIZE)
    with pytest.raises(AlreadyExists):
        await cloned(str(original), shape, str(place / "copy"), ImageFormat.RAW, SIZE)
