"""Changes of volumes that no VM has open, on real images: what they do, and what is left when they are interrupted."""

from __future__ import annotations

import asyncio
import os
import struct
import uuid
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import images
import pytest
from volume_world import VolumeWorld, volume_world

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import AlreadyExists, Busy, InUse, InvalidInput, NoSpace, WrongState
from hostler.model.image import Preallocation
from hostler.model.job import JobState
from hostler.model.units import MiB
from hostler.model.volume_requests import (
    VolumeClone,
    VolumeCompact,
    VolumeConvert,
    VolumeGrow,
    VolumeShrink,
    VolumeValidate,
)
from hostler.storage import vhd_compact, vhd_size, vhdx_size
from hostler.storage.content import Content
from hostler.storage.formats import QEMU_DRIVER, recognise
from hostler.storage.qemu_img import QemuImg

pytestmark = pytest.mark.component

SIZE = 20 * MiB


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[VolumeWorld]:
    async with volume_world(tmp_path) as made:
        yield made


def fill(path: Path) -> Path:
    """Data, zeroes, data, and nothing in the last 11 MiB."""
    with path.open("wb") as file:
        file.write(os.urandom(3 * MiB) + bytes(4 * MiB) + os.urandom(2 * MiB))
        file.truncate(SIZE)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "source.img")


def same(path: str, format: ImageFormat, expected: bytes) -> bool:
    """Whether QEMU reads exactly this from an image (and zeroes behind it)."""
    raw = Path(path).with_name("expected.raw")
    size = recognise(path, format).size
    raw.write_bytes(expected[:size])
    os.truncate(raw, size)
    text = images.run("qemu-img", "compare", "-f", "raw", "-F", QEMU_DRIVER[format], raw, path)
    raw.unlink()
    return "identical" in text


# growing and shrinking


@pytest.mark.parametrize("format", ImageFormat)
async def test_grow_and_shrink(world: VolumeWorld, source: Path, format: ImageFormat) -> None:
    made = await world.volume(source, format)
    content = source.read_bytes()
    grown = await world.done(await world.work.grow("v", VolumeGrow(size=300 * MiB), "test"))
    assert (grown["size"], grown["generation"]) == (300 * MiB, made.generation + 1)
    assert same(made.path, format, content)
    images.qemu_io(made.path, format, f"write -P 7 {299 * MiB} 1M")
    assert images.verified(made.path, format, 7, f"{299 * MiB} 1M")
    with pytest.raises(InvalidInput, match="is not more"):
        await world.work.grow("v", VolumeGrow(size=300 * MiB), "test")
    refused = await world.end(await world.work.shrink("v", VolumeShrink(size=9 * MiB), "test"))
    assert refused.error is not None
    assert f"there is data at 299 MiB (byte {299 * MiB})" in refused.error.cause
    assert (await world.service.get("v")).size == 300 * MiB
    look = await world.done(
        await world.work.shrink("v", VolumeShrink(size=9 * MiB, dry_run=True, discard_data=True), "t")
    )
    assert len(look["obstacles"]) == 1
    shrunk = await world.done(await world.work.shrink("v", VolumeShrink(size=9 * MiB, discard_data=True), "test"))
    assert shrunk["size"] == 9 * MiB
    assert same(made.path, format, content)
    await world.done(await world.work.grow("v", VolumeGrow(size=320 * MiB), "test"))
    assert same(made.path, format, content[: 9 * MiB])
    assert (await world.done(await world.work.validate("v", VolumeValidate(), "t")))["verdict"] in ("sound", "leaks")


async def test_a_size_beyond_what_the_format_can_have(world: VolumeWorld) -> None:
    await world.service.create("v", SIZE, ImageFormat.VHD)
    with pytest.raises(Exception, match="2040 GiB"):
        await world.work.grow("v", VolumeGrow(size=3 * 1024**4), "test")
    assert await world.store.list("claim/") == []


async def test_a_vhd_grows_to_the_largest_there_is(world: VolumeWorld, source: Path) -> None:
    made = await world.volume(source, ImageFormat.VHD)
    await world.done(await world.work.grow("v", VolumeGrow(size=2040 * 1024**3), "test"))
    assert recognise(made.path, ImageFormat.VHD, deep=True).size == 2040 * 1024**3
    assert f"({2040 * 1024**3} bytes)" in images.run("vhdiinfo", made.path)
    assert os.path.getsize(made.path) < 20 * MiB


async def test_a_vhdx_whose_block_table_is_full_gets_a_new_file(
    world: VolumeWorld, tmp_path: Path, source: Path
) -> None:
    """QEMU makes block tables of 1 MiB: with blocks of 1 MiB it has room for 127.9 GiB."""
    path = tmp_path / "small.vhdx"
    await QemuImg().convert(str(source), ImageFormat.RAW, str(path), ImageFormat.VHDX, SIZE)
    small = tmp_path / "narrow.vhdx"
    images.run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", source, small)
    volume = await world.service.register("v", str(small))
    grown = await world.done(await world.work.grow("v", VolumeGrow(size=200 * 1024**3), "test"))
    assert (grown["size"], grown["path"]) == (200 * 1024**3, volume.path)
    assert images.names(tmp_path).count("narrow.vhdx") == 1
    async with Content(volume.path, ImageFormat.VHDX, grown["size"], QemuImg()) as content:
        assert await content.read(0, 3 * MiB) == source.read_bytes()[: 3 * MiB]


def with_gpt(path: Path, end: int) -> None:
    """A GPT with one partition that ends at `end`, on the disk's whole size."""
    size = path.stat().st_size
    last = size // 512 - 1
    entry = struct.pack(
        "<16s16sQQQ72s", uuid.uuid4().bytes_le, uuid.uuid4().bytes_le, 64, end // 512 - 1, 0, "data".encode("utf-16-le")
    )
    entries = entry.ljust(128 * 128, b"\0")

    def header(mine: int, other: int, at: int) -> bytes:
        fields = [
            b"EFI PART",
            0x10000,
            92,
            0,
            0,
            mine,
            other,
            34,
            last - 33,
            uuid.uuid4().bytes_le,
            at,
            128,
            128,
            zlib.crc32(entries),
        ]
        fields[3] = zlib.crc32(struct.pack("<8sIIIIQQQQ16sQIII", *fields))
        return struct.pack("<8sIIIIQQQQ16sQIII", *fields).ljust(512, b"\0")

    mbr = (
        bytes(446)
        + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 2**32 - 1))
        + bytes(48)
        + b"\x55\xaa"
    )
    with path.open("r+b") as file:
        file.write(mbr + header(1, last, 2) + entries)
        file.seek((last - 32) * 512)
        file.write(entries + header(last, 1, last - 32))


async def test_a_partition_beyond_the_new_end_is_named(world: VolumeWorld, tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    source.write_bytes(b"")
    os.truncate(source, SIZE)
    with_gpt(source, 12 * MiB)
    await world.volume(source, ImageFormat.QCOW2)
    ended = await world.end(await world.work.shrink("v", VolumeShrink(size=8 * MiB), "test"))
    assert ended.error is not None
    assert "partition 1 (data) ends at 12 MiB" in ended.error.cause
    assert (await world.service.get("v")).size == SIZE


# compacting


@pytest.mark.parametrize("format", ImageFormat)
@pytest.mark.parametrize("in_place", [False, True])
async def test_compact(world: VolumeWorld, source: Path, format: ImageFormat, in_place: bool) -> None:
    made = await world.volume(source, format)
    content = source.read_bytes()
    images.qemu_io(made.path, format, "write -P 9 10M 6M", "write -P 0 10M 6M", "write -P 5 18M 1M")
    expected = content[: 18 * MiB] + bytes([5]) * MiB + bytes(MiB)
    before = (await world.service.get("v")).allocated
    result = await world.done(await world.work.compact("v", VolumeCompact(in_place=in_place), "test"))
    assert result["allocated"] <= before - 5 * MiB
    assert result["generation"] == made.generation + 1
    assert same(made.path, format, expected)
    assert images.names(world.where) == [Path(made.path).name]
    again = await world.done(await world.work.compact("v", VolumeCompact(), "test"))
    assert again["allocated"] <= result["allocated"]
    assert same(made.path, format, expected)
    assert (await world.done(await world.work.validate("v", VolumeValidate(), "t")))["verdict"] == "sound"


async def test_dirty_bitmaps_outlive_a_new_file_and_snapshots_forbid_one(world: VolumeWorld, source: Path) -> None:
    made = await world.volume(source, ImageFormat.QCOW2)
    images.run("qemu-img", "bitmap", "--add", "-f", "qcow2", made.path, "monday")
    images.qemu_io(made.path, ImageFormat.QCOW2, "write -P 9 10M 6M", "write -z -u 10M 6M")
    await world.done(await world.work.compact("v", VolumeCompact(), "test"))
    assert [b.name for b in (await world.work.details("v")).bitmaps] == ["monday"]
    with pytest.raises(InUse, match="dirty bitmaps"):
        await world.work.convert("v", VolumeConvert(format=ImageFormat.RAW, replace=True), "test")
    images.run("qemu-img", "snapshot", "-c", "first", made.path)
    with pytest.raises(InUse, match="1 snapshots inside"):
        await world.work.compact("v", VolumeCompact(), "test")
    assert await world.store.list("claim/") == []


# converting and cloning


@pytest.mark.parametrize("format", ImageFormat)
async def test_convert_in_place_keeps_name_owner_and_mode(
    world: VolumeWorld, source: Path, format: ImageFormat
) -> None:
    made = await world.volume(source, ImageFormat.QCOW2 if format is not ImageFormat.QCOW2 else ImageFormat.RAW)
    os.chmod(made.path, 0o640)
    if os.geteuid() == 0:
        os.chown(made.path, 1234, 5678)
        images.run("setfacl", "-m", "u:4321:rw", made.path)
    result = await world.done(await world.work.convert("v", VolumeConvert(format=format, replace=True), "test"))
    found = await world.service.get("v")
    assert (found.format, found.size, found.generation) == (format, SIZE, made.generation + 1)
    assert images.names(world.where) == [Path(found.path).name]
    assert result["path"] == found.path
    assert same(found.path, format, source.read_bytes())
    if os.geteuid() == 0:
        assert (os.stat(found.path).st_uid, os.stat(found.path).st_gid) == (1234, 5678)
        assert "user:4321:rw-" in images.run("getfacl", "-n", "-p", found.path)
    await world.service.delete("v")
    assert images.names(world.where) == []


async def test_convert_to_a_new_volume_and_clone(world: VolumeWorld, source: Path, tmp_path: Path) -> None:
    made = await world.volume(source, ImageFormat.VHD)
    other = await world.done(await world.work.convert("v", VolumeConvert(format=ImageFormat.VHDX, name="w"), "test"))
    assert (other["format"], other["size"], other["name"]) == ("vhdx", SIZE, "w")
    assert same(other["path"], ImageFormat.VHDX, source.read_bytes())
    copy = await world.done(await world.work.clone("v", VolumeClone(name="x", path=str(tmp_path / "x.vhd")), "test"))
    assert Path(copy["path"]).read_bytes() == Path(made.path).read_bytes()
    assert copy["allocated"] <= made.allocated + MiB
    with pytest.raises(AlreadyExists):
        await world.done(await failing(world, world.work.clone("v", VolumeClone(name="x"), "test")))
    (world.where / "v.vhdx").write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        await world.work.convert("v", VolumeConvert(format=ImageFormat.VHDX, replace=True), "test")


async def failing(world: VolumeWorld, begun: Any) -> Any:
    """A job that must fail: its error is raised."""
    ended = await world.end(await begun)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    if ended.error.code == "already-exists":
        raise AlreadyExists(ended.error.object, ended.error.cause)
    return ended


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
async def test_a_clone_shares_its_blocks_where_the_file_system_can(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    image.write_bytes(b"")
    os.truncate(image, 400 * MiB)
    images.run("mkfs.btrfs", "-q", image)
    (tmp_path / "mnt").mkdir()
    images.run("mount", "-o", "loop", image, tmp_path / "mnt")
    try:
        async with volume_world(tmp_path, tmp_path / "mnt/v") as world:
            made = await world.volume(fill(tmp_path / "source.img"), ImageFormat.RAW)
            images.run("sync", "-f", made.path)
            free = os.statvfs(world.where).f_bfree * os.statvfs(world.where).f_frsize
            copy = await world.done(await world.work.clone("v", VolumeClone(name="w"), "test"))
            assert Path(copy["path"]).read_bytes() == Path(made.path).read_bytes()
            images.run("sync", "-f", made.path)
            assert free - os.statvfs(world.where).f_bfree * os.statvfs(world.where).f_frsize < 3 * MiB
    finally:
        images.run("umount", tmp_path / "mnt")


@pytest.mark.parametrize("format", ImageFormat)
@pytest.mark.parametrize("wanted", Preallocation)
async def test_preallocation(world: VolumeWorld, format: ImageFormat, wanted: Preallocation) -> None:
    able = {
        Preallocation.OFF: set(ImageFormat),
        Preallocation.METADATA: {ImageFormat.QCOW2},
        Preallocation.FULL: {ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHD_FIXED},
    }[wanted]
    if format not in able:
        with pytest.raises(InvalidInput, match="cannot take"):
            await world.service.create("v", SIZE, format, preallocation=wanted)
        assert not world.where.exists() or images.names(world.where) == []
        return
    made = await world.service.create("v", SIZE, format, preallocation=wanted)
    assert (made.allocated >= SIZE) == (wanted is Preallocation.FULL)
    assert same(made.path, format, b"")


# who else has it


async def test_two_jobs_and_a_vm_never_have_one_volume(world: VolumeWorld, source: Path) -> None:
    made = await world.volume(source, ImageFormat.QCOW2)
    disk = Disk(id="disk0", source=DiskSource(path=made.path, format=ImageFormat.QCOW2))
    reading = await world.work.checksum("v", "test")
    second = await world.work.checksum("v", "test")  # readers do not disturb each other
    with pytest.raises(Busy, match=f"job works on it \\({reading.id[:8]}|{second.id[:8]}"):
        await world.work.grow("v", VolumeGrow(size=2 * SIZE), "test")
    with pytest.raises(Busy):
        await world.claims.claim("vm1", [disk], 1)
    with pytest.raises(Busy):
        await world.service.delete("v")
    first = await world.end(reading)
    assert first.result == (await world.end(second)).result
    await world.claims.claim("vm1", [disk.but(read_only=True)], 1)
    await world.end(await world.work.checksum("v", "test"))
    with pytest.raises(InUse, match="VM vm1"):
        await world.work.compact("v", VolumeCompact(), "test")
    await world.claims.release("vm1")
    outcomes = await asyncio.gather(
        *(world.work.grow("v", VolumeGrow(size=SIZE * n), "test") for n in (2, 3, 4)), return_exceptions=True
    )
    assert sum(not isinstance(o, BaseException) for o in outcomes) == 1
    assert all(isinstance(o, Busy | WrongState) for o in outcomes if isinstance(o, BaseException))


async def test_a_job_that_comes_late_is_refused(world: VolumeWorld, source: Path) -> None:
    """Its volume was seen before somebody else changed it."""
    made = await world.volume(source, ImageFormat.RAW)
    await world.done(await world.work.grow("v", VolumeGrow(size=2 * SIZE), "test"))
    changes = world.work.tools.changes
    assert (await changes.record(made)).generation == made.generation + 1  # the one that was done
    await world.done(await world.work.grow("v", VolumeGrow(size=3 * SIZE), "test"))
    with pytest.raises(WrongState, match="generation 0, it has 2"):
        await changes.record(made)
    with pytest.raises(WrongState, match="generation 0, it has 2"):
        await changes.current(made)


async def test_cancelled_while_copying(world: VolumeWorld, tmp_path: Path) -> None:
    source = tmp_path / "large.img"
    source.write_bytes(os.urandom(48 * MiB))
    made = await world.volume(source, ImageFormat.RAW)
    for begun in (
        world.work.convert("v", VolumeConvert(format=ImageFormat.QCOW2, replace=True), "test"),
        world.work.convert("v", VolumeConvert(format=ImageFormat.VHDX, name="w"), "test"),
        world.work.clone("v", VolumeClone(name="w"), "test"),
        world.work.checksum("v", "test"),
        world.work.compact("v", VolumeCompact(), "test"),
    ):
        job = await begun
        await asyncio.sleep(0.02)
        try:
            await world.jobs.cancel(job.id, "test")
        except WrongState:
            await world.end(job)
            continue
        assert (await world.end(job)).state is JobState.CANCELLED
        assert images.names(world.where) == ["v.raw"]
        assert Path(made.path).read_bytes() == source.read_bytes()
        assert [v.name for v in await world.service.list()] == ["v"]
        assert await world.store.list("claim/") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("format", ImageFormat)
async def test_a_full_disk_changes_nothing(tmp_path: Path, format: ImageFormat) -> None:
    source = fill(tmp_path / "source.img")
    with images.small_disk(tmp_path / "small", "40m") as small:
        async with volume_world(tmp_path, small / "v") as world:
            made = await world.volume(source, format)
            free = os.statvfs(small)
            (small / "filling").write_bytes(bytes(free.f_bavail * free.f_frsize))
            before = images.names(world.where)
            other = ImageFormat.QCOW2 if format is not ImageFormat.QCOW2 else ImageFormat.RAW
            for begun in (
                world.work.convert("v", VolumeConvert(format=other, replace=True), "test"),
                world.work.clone("v", VolumeClone(name="w"), "test"),
            ):
                try:
                    ended = await world.end(await begun)
                except NoSpace:
                    continue
                assert ended.error is not None
                assert ended.error.code == "no-space", ended.error
            assert images.names(world.where) == before
            found = await world.service.get("v")
            assert (found.size, found.format, found.generation) == (SIZE, format, 0)
            (small / "filling").unlink()
            assert same(made.path, format, source.read_bytes())


# killed


class Killed(BaseException):
    """As a SIGKILL at this moment."""


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process dies instead of its `number`th change of a file."""
    left = [number]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **options)

        return call

    for name in ("pwrite", "ftruncate", "fsync"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


CHANGES: dict[str, tuple[ImageFormat, Callable[[str], None], int]] = {
    "fixed VHD larger": (ImageFormat.VHD_FIXED, lambda p: vhd_size.resize_vhd(p, SIZE, 300 * MiB), 300 * MiB),
    "fixed VHD smaller": (ImageFormat.VHD_FIXED, lambda p: vhd_size.resize_vhd(p, SIZE, 10 * MiB), 10 * MiB),
    "VHD larger": (ImageFormat.VHD, lambda p: vhd_size.resize_vhd(p, SIZE, 3000 * MiB), 3000 * MiB),
    "VHD smaller": (ImageFormat.VHD, lambda p: vhd_size.resize_vhd(p, SIZE, 10 * MiB), 10 * MiB),
    "VHDX larger": (ImageFormat.VHDX, lambda p: vhdx_size.resize_vhdx(p, 300 * MiB), 300 * MiB),
    "VHDX smaller": (ImageFormat.VHDX, lambda p: vhdx_size.resize_vhdx(p, 10 * MiB), 10 * MiB),
    "VHD compacted": (
        ImageFormat.VHD,
        lambda p: vhd_compact.compact_vhd(p, lambda _: None, __import__("threading").Event()),
        SIZE,
    ),
}


@pytest.mark.parametrize("case", CHANGES)
async def test_killed_at_each_write_it_is_the_old_or_the_new_image(
    world: VolumeWorld, source: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    format, change, size = CHANGES[case]
    made = await world.volume(source, format)
    images.qemu_io(made.path, format, "write -P 9 10M 2M", "write -P 0 10M 2M")
    sound, content = Path(made.path).read_bytes(), source.read_bytes()
    for number in range(200):
        Path(made.path).write_bytes(sound)
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                change(made.path)
            except Killed:
                done = False
            else:
                done = True
        shape = recognise(made.path, format, deep=True)
        assert shape.size in (SIZE, size), number
        stale = slice(SIZE, SIZE + 512) if case == "fixed VHD larger" else slice(size, size + 512)
        async with Content(made.path, format, shape.size, QemuImg()) as opened:
            read = bytearray(await opened.read(0, 24 * MiB if shape.size > 24 * MiB else shape.size))
        if format is ImageFormat.VHD_FIXED and not done:
            read[stale] = bytes(len(read[stale]))  # a footer, which the repetition removes
        assert bytes(read) == (content + bytes(4 * MiB))[: len(read)], number
        change(made.path)
        assert recognise(made.path, format, deep=True).size == size
        assert same(made.path, format, content)
        if done:
            return
    raise AssertionError("it never ended")
