"""Chains made one disk by the real process: every format, as QEMU and 7-Zip see it; killed, cancelled, without room."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import chain_images
import images
import pytest

from hostler.model.chain import ChainRequest, FlattenRequest
from hostler.model.disk import ImageFormat
from hostler.model.errors import AlreadyExists, BadImage, Busy, InUse, InvalidInput, NotPermitted
from hostler.model.job import Job, JobState
from hostler.model.links import LinkState
from hostler.model.units import MiB
from hostler.model.volume import VolumeState
from hostler.storage.chains.flatten import PROGRAM, flatten
from hostler.storage.chains.journal import journal_of, read_journal
from hostler.storage.formats import SUFFIX, recognise
from hostler.storage.reserved import Reservations
from hostler.testing.hyperv_vhd import fixed
from hostler.testing.inprocess import Node, Site, short_directory

pytestmark = pytest.mark.component

Make = Callable[[Path], tuple[Path, bytes]]
MAKERS = [chain_images.vhd_chain, chain_images.vhdx_chain]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A directory as it comes from Hyper-V."""
    place = tmp_path / "export"
    place.mkdir()
    return place


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("format", ImageFormat)
async def test_every_format_has_the_disk_of_the_chain(
    tmp_path: Path, export: Path, make: Make, format: ImageFormat
) -> None:
    top, disk = make(export)
    before = {path: path.read_bytes() for path in export.iterdir()}
    fractions: list[float] = []
    part = str(tmp_path / f"new{SUFFIX[format]}")
    await flatten(str(top), part, format.value, on_progress=fractions.append)
    chain_images.check_by_qemu(part, format, disk, tmp_path)
    if format is not ImageFormat.RAW:
        assert chain_images.seen_by_7zip(part, tmp_path) == disk
    assert recognise(part, format, deep=True).size == len(disk)
    assert fractions[-1] == 1.0
    assert {path: path.read_bytes() for path in export.iterdir()} == before


@pytest.mark.parametrize("format", ImageFormat)
async def test_what_is_zeroes_takes_no_room(tmp_path: Path, export: Path, format: ImageFormat) -> None:
    """Also the holes of a fixed parent, in a disk of which most is empty."""
    size = 3 * 1024 * MiB
    base = export / "base.vhd"
    id = fixed(base, b"")
    edge = base.read_bytes()
    with base.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(edge[:40] + size.to_bytes(8, "big") * 2 + edge[56:64] + bytes(4) + edge[68:])
        file.seek(size - MiB)
        file.write(b"data" * 1024)
    with base.open("r+b") as file:
        file.seek(size)
        footer = file.read(512)
        file.seek(size + 64)
        file.write((~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big"))
    assert id.bytes == footer[68:84]
    part = str(tmp_path / "new")
    await flatten(str(base), part, format.value)
    assert os.stat(part).st_blocks * 512 < 2 * MiB
    assert images.verified(part, format, 0, f"0 {MiB}")
    assert images.verified(part, format, 0, f"{size - MiB + 4096} 4096")


async def test_a_larger_disk(tmp_path: Path, export: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    part = str(tmp_path / "new")
    await flatten(str(top), part, "qcow2", 30 * MiB)
    chain_images.check_by_qemu(part, ImageFormat.QCOW2, disk.ljust(30 * MiB, b"\0"), tmp_path)


# interrupted

SLOW = f"""
import sys, time
from hostler.storage.chains import copying, flatten_process
copying.CHECKPOINT = copying.TELL = 0.02
copying.BATCH = 4
fast = copying.Copier._move
def slow(self, move, buffer):
    time.sleep(0.01)
    fast(self, move, buffer)
copying.Copier._move = slow
sys.exit(flatten_process.main(sys.argv[1:]))  # as {PROGRAM}
"""


def killed_in_the_middle(top: Path, part: str, format: ImageFormat) -> int:
    """Start flattening, kill it when the journal says that something is done; how much that is."""
    argv = [sys.executable, "-c", SLOW, part, format.value, "0", str(top)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (found := read_journal(part)) or not found.done:
            assert process.poll() is None
            assert time.monotonic() < end
        process.send_signal(signal.SIGKILL)
    journal = read_journal(part)
    assert journal is not None
    return journal.done


@pytest.mark.parametrize("format", ImageFormat)
async def test_after_a_kill_it_goes_on_where_it_was(tmp_path: Path, export: Path, format: ImageFormat) -> None:
    top, disk = chain_images.vhd_chain(export)
    part = str(tmp_path / "new.part")
    done = killed_in_the_middle(top, part, format)
    assert 0 < done < len(disk)
    ruined = b"what was done before is not done again"
    if format is ImageFormat.RAW:
        with open(part, "r+b") as file:
            file.write(ruined)
    await flatten(str(top), part, format.value)
    if format is ImageFormat.RAW:
        disk = ruined + disk[len(ruined) :]
    chain_images.check_by_qemu(part, format, disk, tmp_path)


async def test_when_the_chain_has_changed_it_begins_anew(tmp_path: Path, export: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    part = str(tmp_path / "new.part")
    killed_in_the_middle(top, part, ImageFormat.QCOW2)
    os.utime(export / "base.vhd", (5, 5))
    with open(part, "r+b") as file:
        file.write(b"x" * 4096)
    await flatten(str(top), part, "qcow2")
    chain_images.check_by_qemu(part, ImageFormat.QCOW2, disk, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sources": 5}', b"\xff" * 100])
async def test_a_ruined_journal_means_to_begin_anew(tmp_path: Path, export: Path, content: bytes) -> None:
    top, disk = chain_images.vhd_chain(export)
    part = str(tmp_path / "new.part")
    Path(part).write_bytes(b"rubbish" * 1000)
    Path(journal_of(part)).write_bytes(content)
    await flatten(str(top), part, "raw")
    assert Path(part).read_bytes() == disk


async def test_a_chain_that_qemu_writes_is_not_read(tmp_path: Path, export: Path) -> None:
    top, _ = chain_images.vhd_chain(export)
    writer = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "vpc", str(export / "base.vhd"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        await writer.stdout.read(1)  # its prompt: the image is open
        with pytest.raises(InUse):
            await flatten(str(top), str(tmp_path / "new"), "raw")
    finally:
        await writer.communicate(b"q\n")
    await flatten(str(top), str(tmp_path / "new"), "raw")


async def test_a_parent_that_is_written_meanwhile_is_noticed(tmp_path: Path, export: Path) -> None:
    top, _ = chain_images.vhd_chain(export)
    argv = [sys.executable, "-c", SLOW, str(tmp_path / "new"), "raw", "0", str(top)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    with (export / "base.vhd").open("ab") as file:
        file.write(bytes(512))
    output, _ = await process.communicate()
    said = output.splitlines()[-1]
    assert "written to while" in json.loads(said)["error"]["cause"]


# as a job


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    with short_directory() as directory:
        async with Site(directory) as site:
            yield await site.add("a")


def traces(node: Node) -> list[str]:
    directory = node.paths.volumes
    return images.names(directory) if directory.exists() else []


async def begin(node: Node, top: Path, **more: object) -> Job:
    request = FlattenRequest.model_validate({"name": "whole", "source": str(top), **more})
    return await node.application.volumes.flatten(request, "test")


async def test_a_volume_is_made_by_a_job(node: Node, tmp_path: Path, export: Path) -> None:
    top, disk = chain_images.vhdx_chain(export)
    report = await node.application.volumes.chain(ChainRequest(path=str(export)))
    assert report.sound
    assert [image.log_pending for image in report.images] == [False, False, True]
    job = await node.finish(await begin(node, top, format="vhdx"))
    assert (job.state, job.error) == (JobState.DONE, None)
    volume = await node.application.volumes.get("whole")
    assert (volume.state, volume.size, volume.format, volume.job) == (
        VolumeState.READY,
        len(disk),
        ImageFormat.VHDX,
        "",
    )
    assert job.result is not None
    assert job.result.items() <= volume.to_json().items()
    assert traces(node) == ["whole.vhdx"]
    chain_images.check_by_qemu(volume.path, volume.format, disk, tmp_path)


async def test_a_chain_that_is_not_sound_is_refused_before_anything_begins(node: Node, export: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    with pytest.raises(InvalidInput, match="would be lost"):
        await begin(node, top, size=len(disk) - 512)
    (export / "base.vhd").rename(export / "other.vhd")
    with pytest.raises(BadImage, match=r"base\.vhd") as refused:
        await begin(node, top)
    assert refused.value.details["link"] == LinkState.MISSING
    assert node.application.jobs.list() == []
    assert traces(node) == []


async def test_names_that_are_taken(node: Node, tmp_path: Path, export: Path) -> None:
    top, _ = chain_images.vhd_chain(export)
    (tmp_path / "mine.raw").write_bytes(b"mine")
    job = await node.finish(await begin(node, top, path=str(tmp_path / "mine.raw")))
    assert job.error is not None
    assert isinstance(job.error.to_error(), AlreadyExists)
    assert (tmp_path / "mine.raw").read_bytes() == b"mine"
    await node.finish(await begin(node, top))
    again = await node.finish(await begin(node, top, path=str(tmp_path / "second.qcow2")))
    assert again.state is JobState.FAILED
    assert (await node.application.volumes.get("whole")).state is VolumeState.READY
    assert sorted(images.names(tmp_path)) == ["export", "mine.raw"]


async def test_what_a_job_could_not_remove_is_deleted_by_hand(
    node: Node, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, _ = chain_images.vhd_chain(export)
    hang = node.faults.hang("volume.flatten/copy:after")
    job = await begin(node, top)
    await asyncio.wait_for(hang.reached.wait(), 60)
    with pytest.raises(Busy):
        await node.application.volumes.delete("whole", "test")

    async def refused(*_: object) -> None:
        raise NotPermitted("directory", "is mounted read-only now")

    with monkeypatch.context() as patched:
        patched.setattr(Reservations, "give_up", refused)
        await node.application.jobs.cancel(job.id, "test")
        await node.finish(job)
    assert [volume.state for volume in await node.application.volumes.list()] == [VolumeState.CREATING]
    await node.application.volumes.delete("whole", "test")
    assert await node.application.volumes.list() == []
    assert traces(node) == []


EDGES = [f"volume.flatten/{step}:{edge}" for step in ("reserve", "copy", "finish") for edge in ("before", "after")]


@pytest.mark.parametrize("where", EDGES)
async def test_the_daemon_dies_at_any_step_and_the_next_one_goes_on(
    node: Node, tmp_path: Path, export: Path, where: str
) -> None:
    top, disk = chain_images.vhd_chain(export)
    hang = node.faults.hang(where)
    job = await begin(node, top)
    await asyncio.wait_for(hang.reached.wait(), 60)
    await node.die()
    await node.start()
    ended = await node.finish(node.application.jobs.get(job.id))
    assert (ended.state, ended.error) == (JobState.DONE, None)
    volume = await node.application.volumes.get("whole")
    assert (volume.state, volume.job) == (VolumeState.READY, "")
    assert traces(node) == ["whole.qcow2"]
    chain_images.check_by_qemu(volume.path, volume.format, disk, tmp_path)


@pytest.mark.parametrize("where", EDGES[:-1])
async def test_a_failure_or_a_cancel_at_any_step_leaves_nothing(node: Node, export: Path, where: str) -> None:
    top, _ = chain_images.vhd_chain(export)
    hang = node.faults.hang(where)
    job = await begin(node, top)
    await asyncio.wait_for(hang.reached.wait(), 60)
    await node.application.jobs.cancel(job.id, "test")
    assert (await node.finish(job)).state is JobState.CANCELLED
    assert traces(node) == []
    assert await node.application.volumes.list() == []
    node.faults.fail(where, BadImage("image", "failed"))
    assert (await node.finish(await begin(node, top))).state is JobState.FAILED
    assert traces(node) == []
    assert await node.application.volumes.list() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
@pytest.mark.parametrize("format", ImageFormat)
async def test_a_full_disk(node: Node, tmp_path: Path, export: Path, format: ImageFormat) -> None:
    top, _ = chain_images.vhd_chain(export, 40 * MiB)
    with images.small_disk(tmp_path / "small", "1m") as small:
        job = await node.finish(await begin(node, top, format=format.value, path=str(small / "new")))
        assert job.error is not None
        assert job.error.code == "no-space"
        assert images.names(small) == []
    assert await node.application.volumes.list() == []
