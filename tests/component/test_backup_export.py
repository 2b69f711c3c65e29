"""A backup served over NBD: read by programs we did not write, whole, with what changed; gone at its end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hostler.host.backups.exports import plan_export
from hostler.model.backup import BLOCK, BackedDisk, Backup
from hostler.model.disk import ImageFormat
from hostler.model.job import Job, JobState
from hostler.storage.backups.copying import DiskFile
from hostler.storage.backups.directory import BackupDirectory, disk_file
from hostler.testing.inprocess import Node, Site, short_directory, until
from hostler.testing.vm_variants import config

pytestmark = pytest.mark.component

FULL, NEXT = "20260101T000000Z-00000001", "20260101T000001Z-00000002"
SIZE = 8 * BLOCK


def make(directory: BackupDirectory, backup_id: str, since: str | None, blocks: dict[int, bytes | None]) -> None:
    with directory.locked("v"):
        place = directory.begin("v", backup_id)
        file = DiskFile(disk_file(place, "disk0"), SIZE, since is not None, False)
        for index, data in blocks.items():
            file.put(index * BLOCK, data, BLOCK)
        copied = file.finish()
        disk = BackedDisk(
            id="disk0", size=SIZE, format=ImageFormat.RAW, since=since, blocks=copied.blocks, sums=copied.sums
        )
        when = datetime(2026, 1, 1, tzinfo=UTC)
        directory.commit(Backup(id=backup_id, vm="v", vm_name="web", created=when, config=config(), disks=(disk,)))


async def served(node: Node, directory: BackupDirectory, timeout: float) -> tuple[Job, str]:
    plan = plan_export(node.application.host, {"directory": str(directory.path), "backup": NEXT, "timeout": timeout})
    job = await node.application.jobs.start(plan, "test")
    jobs = node.application.jobs
    await until(lambda: bool(jobs.get(job.id).progress.detail) or jobs.get(job.id).is_over)
    found = jobs.get(job.id)
    assert found.error is None, found.error
    exports: Any = found.progress.detail["exports"]
    return found, str(exports["disk0"])


async def run(*argv: str) -> str:
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


async def test_others_read_it_whole_and_see_what_changed() -> None:
    with short_directory() as path:
        directory = BackupDirectory(str(path / "backups"))
        directory.prepare()
        make(directory, FULL, None, {0: b"\1" * BLOCK, 1: b"\2" * BLOCK, 5: b"\3" * BLOCK})
        make(directory, NEXT, FULL, {1: b"\4" * BLOCK, 5: None})
        async with Site(path) as site:
            node = await site.add("a")
            job, uri = await served(node, directory, 60)
            out = path / "copy.raw"
            await run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(out))
            zero = bytes(BLOCK)
            assert out.read_bytes() == b"\1" * BLOCK + b"\4" * BLOCK + zero * 6
            listed = json.loads(await run("nbdinfo", "--json", "--map=qemu:allocation-depth", uri))
            changed = [(e["offset"] // BLOCK, e["length"] // BLOCK) for e in listed if e["type"] == 1]
            assert changed == [(1, 1), (5, 1)]
            done = await asyncio.to_thread(
                subprocess.run,
                ["qemu-io", "-f", "raw", "-c", "write 0 512", uri],
                capture_output=True,
                check=False,
                timeout=60,
            )
            assert done.returncode != 0
            await node.application.jobs.cancel(job.id, "test")
            assert (await node.finish(job)).state is JobState.CANCELLED
            assert not list((node.paths.run_dir / "exports").iterdir())
            assert not children()


def children() -> list[str]:
    """What this process has started and that still runs."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in listed if b"qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_it_ends_by_itself_and_with_the_daemon() -> None:
    with short_directory() as path:
        directory = BackupDirectory(str(path / "backups"))
        directory.prepare()
        make(directory, FULL, None, {0: b"\1" * BLOCK})
        make(directory, NEXT, FULL, {1: b"\4" * BLOCK})
        async with Site(path) as site:
            node = await site.add("a")
            job, _ = await served(node, directory, 0.5)
            assert (await node.finish(job)).state is JobState.DONE
            job, _ = await served(node, directory, 60)
            await node.die()
            assert not children()
            await node.start()
            await node.quiet()
            assert node.application.jobs.get(job.id).state is JobState.FAILED
