"""The embedded store against what happens to real files: a second process, kill -9, a full disk, foreign files."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.model.errors import HostLacks, InternalError, InUse, NoSpace, NotPermitted
from hostler.store.contract import Put, Transaction
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.component

WRITER = """
import asyncio, sys
from pathlib import Path
from hostler.store.contract import Put, Transaction
from hostler.store.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    entry = await store.get("pair/a")
    n = entry.value["n"] if entry else 0
    while True:
        n += 1
        value = {"n": n, "filling": "x" * (n % 5000)}
        await store.commit(Transaction([Put("pair/a", value), Put("pair/b", value)], durable=n % 50 == 0))
        print(n, flush=True)

asyncio.run(main())
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


def killed_after(writer: subprocess.Popen[str], commits: int) -> int:
    """Kill it in the middle of its work; the last commit it has told of."""
    last = 0
    assert writer.stdout is not None
    for _ in range(commits):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in writer.stdout.read().splitlines() if line)])
    writer.wait(60)
    writer.stdout.close()
    return last


async def test_kill_in_the_middle_of_writes_loses_nothing_told_and_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state/hostler.db"
    for commits in (1, 7, 120, 400):
        last = await asyncio.to_thread(killed_after, start_writer(path), commits)
        store = await SqliteStore.open(path)
        a, b = await store.get("pair/a"), await store.get("pair/b")
        await store.close()
        assert a is not None
        assert b is not None
        assert a.value == b.value
        assert a.revision == b.revision
        assert a.value["n"] in (last, last + 1)


async def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "hostler.db"
    writer = start_writer(path)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(InUse, match=f"pid {writer.pid}.*hostler.db.lock"):
            await SqliteStore.open(path)
    finally:
        killed_after(writer, 0)
    store = await SqliteStore.open(path)
    with pytest.raises(InUse):
        await SqliteStore.open(path)
    await store.close()
    await (await SqliteStore.open(path)).close()


async def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = await SqliteStore.open(tmp_path / "state/hostler.db")
        await store.commit(Transaction([Put("a", {})]))
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}
    assert {"hostler.db", "hostler.db-wal", "hostler.db.lock"} <= set(modes)
    await store.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "hostler.db"
    await (await SqliteStore.open(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(HostLacks, match="schema 99"):
        await SqliteStore.open(path)
    assert path.read_bytes() == before


async def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostler.db"
    path.write_bytes(b"this is not a database at all, and long enough to look like one" * 100)
    with pytest.raises(InternalError, match="damaged"):
        await SqliteStore.open(path)
    (tmp_path / "dir.db").mkdir()
    with pytest.raises(NotPermitted):
        await SqliteStore.open(tmp_path / "dir.db")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotPermitted):
        await SqliteStore.open(tmp_path / "file/hostler.db")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
async def test_a_full_disk_is_said_and_nothing_is_half_written(small_disk: Path) -> None:
    store = await SqliteStore.open(small_disk / "hostler.db")
    watch = store.watch("")
    written = 0
    with pytest.raises(NoSpace) as full:
        for written in range(1000):
            filling = {"filling": "x" * 40_000}
            await store.commit(Transaction([Put(f"a/{written}", filling), Put(f"b/{written}", filling)]))
    assert str(small_disk) in full.value.advice
    assert 0 < written < 100
    revision = await store.commit(Transaction([]))
    assert revision == written
    assert len(await store.list("a/")) == len(await store.list("b/")) == written
    for _ in range(2 * written):
        assert (await anext(watch)).revision <= revision
    await store.close()
    store = await SqliteStore.open(small_disk / "hostler.db")
    assert len(await store.list("a/")) == len(await store.list("b/")) == written
    await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
async def test_a_new_store_on_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"), (small_disk / "filling").open("wb", buffering=0) as filling:
        while filling.write(b"x" * 4096) == 4096:
            pass
        filling.write(b"x" * 4096)
    with pytest.raises(NoSpace):
        await SqliteStore.open(small_disk / "hostler.db")
