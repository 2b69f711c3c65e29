"""The files of backups: written and read back, damaged, hostile; and the directory they are in."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostler.model.backup import BLOCK, BackedDisk, Backup
from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage, Busy, HostlerError, InvalidInput, NotFound
from hostler.storage.backups.copying import DiskFile, DiskSink
from hostler.storage.backups.directory import MANIFEST, BackupDirectory, disk_file
from hostler.storage.backups.qcow2 import Reader, Writer
from hostler.storage.backups.reading import Chain, Link, verify
from hostler.storage.backups.restoring import write_image
from hostler.storage.nbd import serving
from hostler.testing.nbd_client import writing
from hostler.testing.vm_variants import config

pytestmark = pytest.mark.unit

Content = dict[int, bytes | None]
ID = "20260101T000000Z-00000001"


def block(fill: int) -> bytes:
    return bytes([fill]) * BLOCK


def link(path: Path, size: int, content: Content, overlay: bool = False, compress: bool = False) -> Link:
    file = DiskFile(path, size, overlay, compress)
    for index, data in sorted(content.items()):
        file.put(index * BLOCK, data, min(BLOCK, size - index * BLOCK))
    copied = file.finish()
    since = ID if overlay else None
    disk = BackedDisk(
        id="disk0", size=size, format=ImageFormat.RAW, since=since, blocks=copied.blocks, sums=copied.sums
    )
    return Link(path.stem, disk, path)


def read(links: Sequence[Link]) -> Content:
    with Chain(links) as chain:
        return dict(chain.content())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(
        st.dictionaries(st.sampled_from([0, 1, 2, 7, 8191, 8192, 8193, 20000]), st.none() | st.integers(1, 255)),
        min_size=1,
        max_size=4,
    ),
    compress=st.booleans(),
)
def test_a_chain_reads_as_its_newest_blocks(
    tmp_path: Path, layers: list[dict[int, int | None]], compress: bool
) -> None:
    links: list[Link] = []
    expected: Content = {}
    for number, layer in enumerate(layers):
        content = {i: None if fill is None else block(fill) for i, fill in layer.items()}
        links.insert(0, link(tmp_path / f"{number}.qcow2", 20001 * BLOCK, content, number > 0, compress))
        expected.update(content)
    found = read(links)
    assert {i: d for i, d in found.items() if d} == {i: d for i, d in expected.items() if d}


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """Wherever one byte of a file is changed: it is found, or it was one that means nothing."""
    rng = random.Random(7)
    for compress in (False, True):
        good = {i: rng.randbytes(BLOCK // 2) + bytes(BLOCK // 2) for i in (0, 3, 5)}
        made = link(tmp_path / f"{compress}.qcow2", 8 * BLOCK, good, compress=compress)
        original = made.path.read_bytes()
        found = 0
        for _ in range(150):
            at = rng.randrange(len(original))
            made.path.write_bytes(original[:at] + bytes([original[at] ^ 0x41]) + original[at + 1 :])
            try:
                assert {i: d for i, d in read([made]).items() if d} == good
            except BadImage:
                found += 1
        assert found > 30


@pytest.mark.parametrize("cut", [0, 50, 104, BLOCK, BLOCK + 5, 3 * BLOCK])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    made = link(tmp_path / "a.qcow2", 8 * BLOCK, {0: block(1), 5: block(2)})
    os.truncate(made.path, cut)
    with pytest.raises(BadImage):
        read([made])
    with pytest.raises(BadImage):
        list(verify(made))


def test_a_file_that_was_not_finished_is_no_qcow2(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    Writer(fd, 8 * BLOCK).put(0, block(1))
    with pytest.raises(BadImage, match="never finished"):
        Reader(fd, "it")
    os.close(fd)


def test_a_header_that_asks_for_huge_tables_is_refused(tmp_path: Path) -> None:
    made = link(tmp_path / "a.qcow2", 8 * BLOCK, {0: block(1)})
    head = bytearray(made.path.read_bytes())
    head[24:32] = (2**60).to_bytes(8, "big")
    made.path.write_bytes(head)
    with pytest.raises(BadImage):
        read([made])


def test_checksums_that_never_come_are_refused(tmp_path: Path) -> None:
    made = link(tmp_path / "a.qcow2", 8 * BLOCK, {0: block(1)})
    sums = made.path.with_suffix(".sums")
    sums.unlink()
    os.mkfifo(sums)
    with pytest.raises(BadImage, match="checksums"):
        read([made])


def test_checksums_of_another_backup_are_refused(tmp_path: Path) -> None:
    one = link(tmp_path / "a.qcow2", 8 * BLOCK, {0: block(1)})
    two = link(tmp_path / "b.qcow2", 8 * BLOCK, {0: block(2)})
    two.path.with_suffix(".sums").rename(one.path.with_suffix(".sums"))
    with pytest.raises(BadImage, match="checksums"):
        read([one])
    assert list(verify(link(tmp_path / "c.qcow2", 8 * BLOCK, {0: block(1)}))) == [1]


@pytest.mark.parametrize("format", [ImageFormat.RAW, ImageFormat.QCOW2])
async def test_an_image_is_written_and_its_last_block_cut(tmp_path: Path, format: ImageFormat) -> None:
    size = 2 * BLOCK + 512
    made = link(tmp_path / "a.qcow2", size, {1: block(1), 2: b"\2" * 512})
    out = tmp_path / "out"
    out.touch()
    await write_image(str(out), [made], format, lambda _: None)
    if format is ImageFormat.RAW:
        assert out.read_bytes() == bytes(BLOCK) + block(1) + b"\2" * 512


async def test_what_qemu_writes_becomes_the_file(tmp_path: Path) -> None:
    told: list[int] = []
    sink = DiskSink(tmp_path / "a.qcow2", 4 * BLOCK + 512, True, False, told.append)
    path = str(tmp_path / "s")
    async with serving(path, {"disk0": sink}), writing(path, "disk0") as client:
        assert client.size == 4 * BLOCK + 512
        assert await client.write(0, block(3) + block(4)) == 0
        assert await client.zero(2 * BLOCK, BLOCK) == 0
        assert await client.write(4 * BLOCK, b"\5" * 512) == 0
        assert await client.flush() == 0
        assert await client.ask(0, 0, 512) == 22
        assert await client.write(8 * BLOCK, block(1)) == 22
    copied = await sink.finish()
    assert sum(told) == 3 * BLOCK + 512
    disk = BackedDisk(id="disk0", size=sink.size, format=ImageFormat.RAW, blocks=copied.blocks, sums=copied.sums)
    assert read([Link("x", disk, tmp_path / "a.qcow2")]) == {
        0: block(3),
        1: block(4),
        2: None,
        4: b"\5" * 512 + bytes(BLOCK - 512),
    }


async def test_blocks_out_of_order_are_refused_and_the_copy_is_spoilt(tmp_path: Path) -> None:
    sink = DiskSink(tmp_path / "a.qcow2", 8 * BLOCK, True, False, lambda _: None)
    path = str(tmp_path / "s")
    async with serving(path, {"disk0": sink}), writing(path, "disk0") as client:
        assert await client.write(BLOCK, block(1)) == 0
        assert await client.write(0, block(1)) == 5
        assert await client.write(2 * BLOCK, block(1)) == 5
    assert sink.error is not None
    sink.close()


async def test_a_client_has_no_more_connections_than_it_needs(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with serving(path, {}):
        opened = [await asyncio.open_unix_connection(path) for _ in range(6)]
        greetings = [await reader.read(8) for reader, _ in opened]
        assert sorted(greetings) == [b"", b"", *[b"NBDMAGIC"] * 4]
        for _, writer in opened:
            writer.close()


@pytest.mark.parametrize("junk", [b"", b"\0" * 4, b"GET / HTTP/1.0\r\n\r\n" * 9, b"\0\0\0\3IHAVEOPT" + b"\xff" * 64])
async def test_nonsense_ends_the_connection(tmp_path: Path, junk: bytes) -> None:
    path = str(tmp_path / "s")
    async with serving(path, {}):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(junk)
        writer.write_eof()
        assert len(await reader.read()) < 4096
        writer.close()
        with pytest.raises(LookupError):
            async with writing(path, "disk0"):
                raise AssertionError("there is no such export")


# the directory


def manifest() -> Backup:
    disk = BackedDisk(id="disk0", size=BLOCK, format=ImageFormat.RAW)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return Backup(id=ID, vm="v", vm_name="web", created=when, config=config(), disks=(disk,))


@pytest.fixture
def directory(tmp_path: Path) -> BackupDirectory:
    found = BackupDirectory(str(tmp_path / "backups"))
    found.prepare()
    return found


def make(directory: BackupDirectory) -> Backup:
    with directory.locked("v"):
        place = directory.begin("v", ID)
        disk_file(place, "disk0").write_bytes(b"x")
        directory.commit(manifest())
        directory.commit(manifest())
    return manifest()


def test_a_backup_is_there_when_its_manifest_is(directory: BackupDirectory) -> None:
    with directory.locked("v"):
        directory.begin("v", ID)
    assert directory.backups("v") == ([], [])
    assert not directory.exists("v", ID)
    made = make(directory)
    assert directory.backups("v") == ([made], [])
    assert directory.find(ID[:18]) == made
    assert directory.path.stat().st_mode & 0o077 == 0
    directory.remove("v", ID)
    directory.remove("v", ID)
    assert directory.backups("v") == ([], [])
    assert sorted(os.listdir(directory.path / "v")) == [".lock"]


def test_a_damaged_or_moved_manifest_is_told(directory: BackupDirectory) -> None:
    make(directory)
    place = directory.path / "v" / ID / MANIFEST
    good = json.loads(place.read_text())
    for bad in ("", "[]", '{"backup": 1}', "[" * 100_000, json.dumps(good | {"sha256": "0"})):
        place.write_text(bad)
        backups, damaged = directory.backups("v")
        assert not backups
        assert [d.id for d in damaged] == [ID]
    place.write_text(json.dumps(good))
    (directory.path / "v").rename(directory.path / "w")
    assert directory.backups("w")[0] == []


def test_only_one_works_on_a_vms_backups(directory: BackupDirectory) -> None:
    with directory.locked("v", shared=True), directory.locked("v", shared=True):
        with pytest.raises(Busy), directory.locked("v"):
            raise AssertionError("two have it")
        with directory.locked("w"):
            pass


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "passwd").touch()
    with pytest.raises(InvalidInput, match="not empty"):
        BackupDirectory(str(tmp_path)).prepare()
    with pytest.raises(NotFound):
        BackupDirectory(str(tmp_path)).require()
    with pytest.raises(InvalidInput):
        BackupDirectory("relative")


@pytest.mark.parametrize("name", ["..", "a/b", "", "../../etc", "x" * 65, "20260101T000000Z-0000000/"])
def test_ids_never_lead_elsewhere(directory: BackupDirectory, name: str) -> None:
    with pytest.raises(HostlerError):
        directory.begin("v", name)
    with pytest.raises(HostlerError), directory.locked(name):
        raise AssertionError("it was taken")
