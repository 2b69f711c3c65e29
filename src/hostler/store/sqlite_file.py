"""The file under the embedded store: its lock, its two connections, its tables, and what its errors mean."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hostler.model.errors import HostLacks, HostlerError, InternalError, InUse, NoSpace, NotPermitted

SCHEMA = 1
"""Version of the tables. A database with a newer one is refused: an old daemon would misread it."""

WAL_KEPT = 4 * 1024 * 1024
"""Bytes the write-ahead log is cut back to after a checkpoint."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS entry"
    " (key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT OR IGNORE INTO meta VALUES ('revision', 0)",
    f"PRAGMA user_version = {SCHEMA}",
)


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """An open and locked database; each connection is used by one thread at a time."""

    path: Path
    writer: sqlite3.Connection
    reader: sqlite3.Connection
    release: ExitStack

    def close(self) -> None:
        """Close both connections and let the lock go. Harmless when closed."""
        self.release.close()


def open_file(path: Path) -> SqliteFile:
    """Lock, connect, prepare; may wait for the disk. Errors: see SqliteStore.open."""
    with ExitStack() as undo:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            undo.callback(os.close, _lock(path))
            # Made by us first, so that it (and SQLite's files beside it, which copy its mode) is private from birth.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            writer = _connect(path)
            undo.callback(writer.close)
            _prepare(path, writer)
            reader = _connect(path)
            undo.callback(reader.close)
            reader.execute("PRAGMA query_only = ON")
            return SqliteFile(path, writer, reader, undo.pop_all())
        except sqlite3.Error as error:
            raise explain(path, error) from error
        except OSError as error:
            raise _explain_os(path, error) from error


def _lock(path: Path) -> int:
    """Take the lock file beside the database; it stays locked while the descriptor is open (not inherited)."""
    lock = path.with_name(path.name + ".lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode("ascii", "replace").strip()
        os.close(fd)
        raise InUse(
            f"store {path}",
            f"another process{f' (pid {holder})' if holder else ''} holds {lock}",
            "one daemon only may use a state directory: stop the other one, or give this one its own directory",
            holder=holder,
        ) from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _connect(path: Path) -> sqlite3.Connection:
    # Explicit BEGIN and COMMIT only (isolation_level None). The threads that use it are not the one that made it.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _prepare(path: Path, db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA:
        raise HostLacks(
            f"store {path}",
            f"was written by a newer Hostler (schema {version}, this one knows {SCHEMA})",
            "install that version or a newer one, or restore a backup made before the upgrade",
        )
    if version == SCHEMA:
        return
    db.execute("PRAGMA synchronous = FULL")
    db.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        db.execute(statement)
    db.execute("COMMIT")


def explain(path: Path, error: sqlite3.Error) -> HostlerError:
    """What an error of SQLite means for people."""
    name = getattr(error, "sqlite_errorname", "") or ""
    subject = f"store {path}"
    if name == "SQLITE_FULL" or "SHMSIZE" in name:
        return NoSpace(subject, "the disk it is on is full; nothing was changed", f"free some space in {path.parent}")
    if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
        return InternalError(
            subject, "is damaged or is no state file of Hostler", "move it away, or restore it from a backup"
        )
    if name.startswith("SQLITE_IOERR"):
        return InternalError(subject, f"reading or writing failed ({name}: {error})", "look at the disk it is on")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return NotPermitted(subject, f"cannot be opened for writing ({error})", "check its owner and mode")
    return InternalError(subject, f"SQLite refused ({name}: {error})", "this is a defect, please report it")


def _explain_os(path: Path, error: OSError) -> HostlerError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"store {path}", "the disk it is on is full; nothing was changed", f"free some space in {path.parent}"
        )
    return NotPermitted(f"store {path}", f"cannot be opened: {error.strerror}", "check its directory, owner and mode")
