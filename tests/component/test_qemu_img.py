"""The wrapper around the real qemu-img: exact sizes, progress, cancellation, clear errors, nothing half made."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import images
import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import AlreadyExists, BadImage, HostLacks, InUse, NoSpace, NotFound, TimedOut
from hostler.model.units import GiB, MiB, TiB
from hostler.storage import programs, qemu_img
from hostler.storage.footer import checksum
from hostler.storage.formats import QEMU_DRIVER, recognise
from hostler.storage.qemu_img import QemuImg

pytestmark = pytest.mark.component

SIZES = [512, 10 * MiB + 512, 137 * GiB + 1024]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", ImageFormat)
async def test_the_size_is_exactly_what_was_asked(tmp_path: Path, format: ImageFormat, size: int) -> None:
    path = str(tmp_path / "image")
    img = QemuImg()
    await img.create(path, format, size)
    shape = recognise(path, deep=True)
    assert (shape.format, shape.size) == (format, size)
    assert (await img.info(path, format)).virtual_size == size
    assert format is not ImageFormat.VHD_FIXED or os.path.getsize(path) == size + 512
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert images.names(tmp_path) == ["image"]
    assert shape.allocated < 20 * MiB


@pytest.mark.parametrize("target", ImageFormat)
@pytest.mark.parametrize("source", ImageFormat)
async def test_content_survives_every_conversion(tmp_path: Path, source: ImageFormat, target: ImageFormat) -> None:
    img, before, after = QemuImg(), str(tmp_path / "before"), str(tmp_path / "after")
    await img.create(before, source, 8 * MiB)
    images.qemu_io(before, source, "write -P 5 0 1M", "write -P 6 7M 1M")
    told: list[float] = []
    await img.convert(before, source, after, target, 12 * MiB, told.append)
    assert images.verified(after, target, 5, "0 1M")
    assert images.verified(after, target, 6, "7M 1M")
    assert images.verified(after, target, 0, "8M 4M")
    assert recognise(after, target, deep=True).size == 12 * MiB
    assert told
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] == 1.0


async def test_a_backing_file_named_since_the_look_is_not_followed(tmp_path: Path) -> None:
    img, secret, source, copy = QemuImg(), tmp_path / "secret", str(tmp_path / 'a,"b'), str(tmp_path / "copy")
    secret.write_bytes(b"\5" * MiB)
    await img.create(source, ImageFormat.QCOW2, MiB)
    images.qemu_io(source, ImageFormat.QCOW2, "write -P 7 512k 64k")
    name_backing_file(source, secret)
    assert images.verified(source, ImageFormat.QCOW2, 5, "0 64k")
    await img.convert(source, ImageFormat.QCOW2, copy, ImageFormat.RAW, MiB)
    assert images.verified(copy, ImageFormat.RAW, 0, "0 512k")
    assert images.verified(copy, ImageFormat.RAW, 7, "512k 64k")


def name_backing_file(path: str, backing: Path) -> None:
    """In the header only, as whoever may write the file can do it."""
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(backing), path]
    subprocess.run(rebase, check=True, timeout=60)


async def test_a_conversion_has_a_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[programs.Bounds] = []
    run = programs.run

    async def watch(argv: Sequence[str], subject: str, deadline: float | None, *rest: Any) -> programs.Outcome:
        if argv[1] == "convert":
            seen.append(rest[0])
        return await run(argv, subject, deadline, *rest)

    monkeypatch.setattr(programs, "run", watch)
    source = tmp_path / "source"
    source.write_bytes(bytes(MiB))
    await QemuImg().convert(str(source), ImageFormat.RAW, str(tmp_path / "copy"), ImageFormat.QCOW2, MiB)
    assert [bounds.memory for bounds in seen] == [4 * GiB]


async def test_a_name_that_is_taken_is_never_overwritten(tmp_path: Path) -> None:
    img = QemuImg()
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dir").mkdir()
    for name in ("file", "dangling", "dir"):
        with pytest.raises(AlreadyExists):
            await img.create(str(tmp_path / name), ImageFormat.QCOW2, MiB)
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert images.names(tmp_path) == ["dangling", "dir", "file"]


async def test_a_name_taken_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with pytest.raises(AlreadyExists):
        async with qemu_img.new_file(str(path)) as part:
            Path(part).write_bytes(b"ours")
            path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert images.names(tmp_path) == ["image"]


async def test_of_many_creations_of_one_file_one_wins(tmp_path: Path) -> None:
    img, path = QemuImg(), str(tmp_path / "image")
    results = await asyncio.gather(
        *(img.create(path, ImageFormat.QCOW2, (n + 1) * MiB) for n in range(5)), return_exceptions=True
    )
    winners = [n for n, result in enumerate(results) if result is None]
    assert len(winners) == 1
    assert all(isinstance(r, AlreadyExists) for n, r in enumerate(results) if n not in winners)
    assert (await img.info(path, ImageFormat.QCOW2)).virtual_size == (winners[0] + 1) * MiB
    assert images.names(tmp_path) == ["image"]


async def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    img = QemuImg()
    await img.create(str(tmp_path / "image"), ImageFormat.VHDX, MiB)
    assert images.names(tmp_path) == ["image"]
    with pytest.raises(AlreadyExists):
        async with qemu_img.new_file(str(tmp_path / "other")):
            (tmp_path / "other").write_bytes(b"theirs")
    assert (tmp_path / "other").read_bytes() == b"theirs"


async def test_cancelling_a_conversion_ends_the_child_and_removes_the_file(tmp_path: Path) -> None:
    img, source = QemuImg(), tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MiB))
    started = asyncio.Event()
    converting = asyncio.create_task(
        img.convert(
            str(source), ImageFormat.RAW, str(tmp_path / "new"), ImageFormat.QCOW2, 64 * MiB, lambda _: started.set()
        )
    )
    async with asyncio.timeout(60):
        await started.wait()
    converting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await converting
    assert images.names(tmp_path) == ["source"]
    assert children_with(str(tmp_path)) == []


def children_with(text: str) -> list[str]:
    """Command lines of living processes that contain a text."""
    lines = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            try:
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in line and "qemu-img" in line:
                lines.append(line)
    return lines


KILLED = """
import asyncio, sys
from hostler.model.disk import ImageFormat
from hostler.storage.qemu_img import QemuImg

async def main():
    tell = lambda fraction: print(fraction, flush=True)
    await QemuImg().convert(sys.argv[1], ImageFormat.RAW, sys.argv[2], ImageFormat.QCOW2, 64 * 1024**2, tell)

asyncio.run(main())
"""


async def test_a_killed_daemon_leaves_no_writer_and_a_file_that_is_found(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new"
    source.write_bytes(os.urandom(64 * MiB))
    daemon = subprocess.Popen(  # noqa: ASYNC220 - it takes a moment only
        [sys.executable, "-c", KILLED, str(source), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    await asyncio.to_thread(daemon.stdout.readline)
    daemon.send_signal(signal.SIGKILL)
    await asyncio.to_thread(daemon.wait, 60)
    daemon.stdout.close()
    async with asyncio.timeout(60):
        while children_with(str(tmp_path)):  # noqa: ASYNC110 - the kernel ends it a moment later
            await asyncio.sleep(0.01)
    assert not target.exists()
    (part,) = qemu_img.leftovers(str(target))
    assert part.name in images.names(tmp_path)
    assert qemu_img.leftovers(str(tmp_path / "other")) == []
    assert qemu_img.leftovers("/no/such/directory/x") == []


async def test_a_missing_directory_file_or_program(tmp_path: Path) -> None:
    img = QemuImg()
    with pytest.raises(NotFound, match="directory"):
        await img.create(str(tmp_path / "no/image"), ImageFormat.RAW, MiB)
    with pytest.raises(NotFound):
        await img.info(str(tmp_path / "no"), ImageFormat.QCOW2)
    with pytest.raises(NotFound, match="no-source"):
        await img.convert(str(tmp_path / "no-source"), ImageFormat.RAW, str(tmp_path / "new"), ImageFormat.RAW, MiB)
    with pytest.raises(HostLacks, match="no-such-program"):
        await QemuImg("no-such-program").create(str(tmp_path / "x"), ImageFormat.RAW, MiB)
    assert images.names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("format", ImageFormat)
async def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, format: ImageFormat) -> None:
    img, source = QemuImg(), tmp_path / "source"
    source.write_bytes(os.urandom(8 * MiB))
    with images.small_disk(tmp_path / "small", "4m") as small:
        with pytest.raises(NoSpace):
            await img.convert(str(source), ImageFormat.RAW, str(small / "new"), format, 8 * MiB)
        assert images.names(small) == []
        (small / "filling").write_bytes(b"x" * 4 * MiB)
        if format not in (ImageFormat.RAW,):  # an empty raw image needs no block
            with pytest.raises(NoSpace):
                await img.create(str(small / "new"), format, 8 * MiB)
        assert images.names(small) == ["filling"]


async def test_a_file_system_that_cannot_hold_the_size(tmp_path: Path) -> None:
    with pytest.raises(NoSpace):
        await QemuImg().create(str(tmp_path / "x"), ImageFormat.RAW, 2**62)
    assert images.names(tmp_path) == []


async def test_an_image_that_is_written_can_be_looked_at_but_not_copied(tmp_path: Path) -> None:
    img, path = QemuImg(), str(tmp_path / "image")
    await img.create(path, ImageFormat.QCOW2, MiB)
    writer = await asyncio.create_subprocess_exec(
        "stdbuf", "-o0", "qemu-io", "-f", "qcow2", path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert writer.stdout is not None
    async with asyncio.timeout(60):
        await writer.stdout.readuntil(b"qemu-io> ")
    try:
        assert (await img.info(path, ImageFormat.QCOW2)).virtual_size == MiB
        with pytest.raises(InUse, match="image"):
            await img.convert(path, ImageFormat.QCOW2, str(tmp_path / "new"), ImageFormat.RAW, MiB)
    finally:
        await writer.communicate(b"quit\n")
    assert images.names(tmp_path) == ["image"]


async def test_the_end_of_a_fixed_vhd_of_another_program_is_not_lost(tmp_path: Path) -> None:
    """Its geometry says less than its size; the name has a comma, which QEMU's option syntax would split at."""
    img, source, target = QemuImg(), tmp_path / "a,b.vhd", tmp_path / "new"
    await img.create(str(source), ImageFormat.VHD_FIXED, 8 * MiB + 512)
    content = bytearray(source.read_bytes())
    content[-1024:-512] = b"E" * 512
    content[-512 + 28 : -512 + 32] = b"vpc "
    content[-512 + 56 : -512 + 60] = bytes((0, 100, 4, 17))  # cylinders, heads, sectors: 3.3 MiB
    content[-512 + 64 : -512 + 68] = checksum(bytes(content[-512:]), 64).to_bytes(4, "big")
    source.write_bytes(bytes(content))
    assert (await img.info(str(source), ImageFormat.VHD_FIXED)).virtual_size < 8 * MiB + 512
    shape = recognise(str(source))
    assert (shape.format, shape.size) == (ImageFormat.VHD_FIXED, 8 * MiB + 512)
    await img.convert(str(source), ImageFormat.VHD_FIXED, str(target), ImageFormat.RAW, shape.size)
    assert target.read_bytes()[-512:] == b"E" * 512


async def test_resize_and_check(tmp_path: Path) -> None:
    img = QemuImg()
    for format in ImageFormat:
        path = str(tmp_path / format)
        await img.create(path, format, MiB)
        await img.check(path, format)
        if format in (ImageFormat.RAW, ImageFormat.QCOW2):
            await img.resize(path, format, 2 * MiB)
            assert recognise(path, format).size == 2 * MiB
        else:
            with pytest.raises(BadImage, match="cannot resize"):
                await img.resize(path, format, 2 * MiB)


async def test_check_finds_a_damaged_qcow2(tmp_path: Path) -> None:
    img, path = QemuImg(), tmp_path / "image"
    await img.create(str(path), ImageFormat.QCOW2, 8 * MiB)
    images.qemu_io(path, ImageFormat.QCOW2, "write -P 1 0 4M")
    content = bytearray(path.read_bytes())
    content[2 * 65_536 : 2 * 65_536 + 64] = bytes(64)  # reference counts of the first clusters
    path.write_bytes(bytes(content))
    with pytest.raises(BadImage) as damaged:
        await img.check(str(path), ImageFormat.QCOW2)
    assert damaged.value.details["errors"]


async def test_a_look_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-img"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr(qemu_img, "LOOK", 0.3)
    with pytest.raises(TimedOut):
        await QemuImg(str(slow)).info(str(tmp_path / "x"), ImageFormat.QCOW2)


async def test_a_look_is_bounded_in_memory_processor_time_and_output(tmp_path: Path) -> None:
    greedy = tmp_path / "greedy-img"
    greedy.write_text("#!/bin/sh\nulimit -v; ulimit -t; ulimit -c\nhead -c 50000000 /dev/zero\n")
    greedy.chmod(0o755)
    bounds = qemu_img.LOOK_BOUNDS
    outcome = await qemu_img.programs.run([str(greedy)], "x", 60, bounds)
    assert outcome.status == 0
    assert len(outcome.out) == qemu_img.programs.MAX_OUTPUT
    assert outcome.out.splitlines()[:3] == [str(1024**3 // 1024), "20", "0"]


@pytest.mark.parametrize("format", [f for f in ImageFormat if f is not ImageFormat.RAW])
async def test_a_large_image_is_looked_at_within_the_bounds(tmp_path: Path, format: ImageFormat) -> None:
    size = 2040 * GiB if QEMU_DRIVER[format] == "vpc" else 64 * TiB
    img, path = QemuImg(), str(tmp_path / "image")
    if format is ImageFormat.VHDX:
        size = 16 * TiB
    if format is ImageFormat.VHD_FIXED:
        size = 1024 * GiB  # a sparse file, but ext4 ends at 16 TiB and tmpfs counts
    await img.create(path, format, size)
    assert recognise(path, format, deep=True).size == size
    assert (await img.info(path, format)).virtual_size >= size
