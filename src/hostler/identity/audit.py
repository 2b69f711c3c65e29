"""The audit trail: one JSON line for every request that changes something, and for every refused one.

Append-only for this process; the file belongs to the daemon's user alone (0600). It never holds secrets: lines are made
of names, paths and outcomes, not of bodies.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from hostler.model.base import Record, utc_now

MAX_BYTES = 16 * 1024**2
KEEP = 8
"""Rotated files kept: with MAX_BYTES 144 MiB at most, some 700,000 lines."""


class AuditEntry(Record):
    """`what` is the endpoint, `object` the path it was called with, `outcome` "done" or an error code, `status` the
    HTTP status; `facts` names inside the request."""

    who: str
    what: str
    object: str
    outcome: str
    status: int
    facts: dict[str, str] = {}


class AuditTrail:
    """Writes the trail at `path`, keeping `keep` older files beside it (`.1` is the newest of them)."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, keep: int = KEEP) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file: int | None = None
        self._size = 0

    def record(self, entry: AuditEntry) -> None:
        """Append one line, in one write, so that a kill leaves no half of it. OSError when it cannot be written."""
        line = {"time": utc_now().isoformat(), **entry.model_dump(exclude_defaults=True)}
        data = (json.dumps(line) + "\n").encode()  # all ASCII: half a surrogate, which JSON lets through, is no error
        file = self._open()
        if self._size + len(data) > self._max_bytes:
            self._rotate()
            file = self._open()
        os.write(file, data)
        self._size += len(data)

    def close(self) -> None:
        """Release the file. Harmless when closed; a later `record` opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._file).st_size
        return self._file

    def _rotate(self) -> None:
        self.close()
        for number in range(self._keep - 1, 0, -1):
            older = self._aged(number)
            if older.exists():
                older.rename(self._aged(number + 1))
        if self._path.exists():
            self._path.rename(self._aged(1))

    def _aged(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
