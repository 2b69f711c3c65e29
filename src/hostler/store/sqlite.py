"""The embedded store: one SQLite file, one process, one writer.

All writes go through one thread and are therefore ordered; reads have a connection and a thread of their own, so that
they never wait for an fsync (in WAL mode a reader does not wait for a writer). An ordinary transaction is in the
write-ahead log when it returns and survives a killed process; a durable one is also fsynced and survives a power cut.
A lock file beside the database (flock: the kernel drops it with the process) keeps a second daemon out.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from hostler.model.errors import InternalError, TimedOut
from hostler.store.contract import Change, CheckFailed, Entry, Put, Transaction, Value
from hostler.store.sqlite_file import SqliteFile, explain, open_file
from hostler.store.watcher import Watcher

DEADLINE = 30.0
"""Seconds for one call. Only a hanging disk takes longer; the outcome of a write is then unknown."""

_T = TypeVar("_T")
_Rows = list[tuple[str, str, int]]


class SqliteStore:
    """The Store contract on one file. Made with `open`."""

    def __init__(self, file: SqliteFile) -> None:
        self._path = file.path
        self._file = file
        self._writer = file.writer
        self._reader = file.reader
        self._write_thread = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._read_thread = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open or create the store at `path` (its directory too, mode 0700). InUse when another process has it,
        HostLacks when a newer Hostler wrote it, NoSpace, NotPermitted, InternalError when it is damaged."""
        return cls(await asyncio.to_thread(open_file, path))

    async def get(self, key: str) -> Entry | None:
        """The entry of that key, None if there is none."""
        found = await self._read(lambda db: db.execute("SELECT * FROM entry WHERE key = ?", (key,)).fetchall())
        return _entry(found[0]) if found else None

    async def list(self, prefix: str) -> Sequence[Entry]:
        """Every entry whose key starts with `prefix`, ordered by key; one statement, hence one revision."""
        query = "SELECT * FROM entry WHERE key >= ? AND key < ? ORDER BY key"
        bounds = (prefix, prefix + "\U0010ffff")
        return [_entry(row) for row in await self._read(lambda db: db.execute(query, bounds).fetchall())]

    async def commit(self, transaction: Transaction) -> int:
        """Apply it; returns the new revision (the present one where there was nothing to write).

        CheckFailed when a check does not hold, NoSpace when the disk is full; nothing is written then. After TimedOut,
        or when the caller is cancelled, the outcome is unknown and has to be read back.
        """
        return await self._call(self._write_thread, lambda: self._apply(transaction), "write")

    def watch(self, prefix: str) -> Watcher:
        """Every change from this call on. Watch first, then list, then skip what is not newer than the list."""
        watcher = Watcher(prefix)
        if self._closed:
            watcher.end()
        self._watchers.add(watcher)
        return watcher

    async def close(self) -> None:
        """Wait for what is under way, end the watches, release the file. Harmless when closed."""
        if self._closed:
            return
        self._closed = True
        for watcher in list(self._watchers):
            watcher.end()
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._write_thread.shutdown()
        self._read_thread.shutdown()
        self._file.close()

    async def _read(self, query: Callable[[sqlite3.Connection], _Rows]) -> _Rows:
        return await self._call(self._read_thread, lambda: query(self._reader), "read")

    async def _call(self, thread: ThreadPoolExecutor, work: Callable[[], _T], verb: str) -> _T:
        if self._closed:
            raise InternalError(f"store {self._path}", "is closed")
        try:
            async with asyncio.timeout(DEADLINE):
                return await self._loop.run_in_executor(thread, work)
        except TimeoutError as error:
            raise TimedOut(
                f"store {self._path}", f"did not {verb} within {DEADLINE:.0f} s", "look at the disk it is on"
            ) from error
        except sqlite3.Error as error:
            raise explain(self._path, error) from error

    def _apply(self, transaction: Transaction) -> int:
        """In the writer thread. Watchers are told from here and not by the waiting caller, who may be cancelled; the
        loop runs call_soon_threadsafe in order, so they hear of changes in the order of revisions."""
        db = self._writer
        rows = [
            (w.key, json.dumps(w.value, allow_nan=False) if isinstance(w, Put) else None) for w in transaction.writes
        ]
        db.execute(f"PRAGMA synchronous = {'FULL' if transaction.durable else 'NORMAL'}")
        db.execute("BEGIN IMMEDIATE")
        try:
            revision, changes = _write(db, transaction, rows)
            db.execute("COMMIT")
        except BaseException:
            # SQLite rolls back by itself on some errors (disk full); a second ROLLBACK would then fail.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        if changes:
            self._loop.call_soon_threadsafe(self._publish, changes)
        return revision

    def _publish(self, changes: Sequence[Change]) -> None:
        for watcher in list(self._watchers):
            watcher.offer(changes)


def _write(
    db: sqlite3.Connection, transaction: Transaction, rows: Sequence[tuple[str, str | None]]
) -> tuple[int, list[Change]]:
    """Inside a transaction: test the checks, do the writes; the revision and what to tell watchers."""
    for check in transaction.checks:
        found = db.execute("SELECT revision FROM entry WHERE key = ?", (check.key,)).fetchone()
        if (found[0] if found else 0) != check.revision:
            raise CheckFailed(check.key)
    (present,) = db.execute("SELECT number FROM meta WHERE name = 'revision'").fetchone()
    revision = int(present)
    if not rows:
        return revision, []
    revision += 1
    db.execute("UPDATE meta SET number = ? WHERE name = 'revision'", (revision,))
    changes: list[Change] = []
    for (key, text), write in zip(rows, transaction.writes, strict=True):
        if text is None:
            if db.execute("DELETE FROM entry WHERE key = ?", (key,)).rowcount:
                changes.append(Change(key, None, revision))
        else:
            db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (key, text, revision))
            # Decoded again: watchers must not share a mutable value with the writer.
            changes.append(Change(key, json.loads(text) if isinstance(write, Put) else None, revision))
    return revision, changes


def _entry(row: tuple[str, str, int]) -> Entry:
    value: Value = json.loads(row[1])
    return Entry(row[0], value, row[2])
