"""How far an interrupted copy got, in a file beside it: what it copies from, into which layout, and up to which place
on the disk everything is safely in the new file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

from hostler.storage.chains.layer import Layer

MAX_JOURNAL = 1024 * 1024
"""Bytes of a journal that is read; a sound one has less than 64 KiB."""


@dataclass(frozen=True, slots=True)
class Journal:
    """`sources`: device, inode, size and time (ns) of each file of the chain; `id` of the new image; `done`: bytes from
    the start of the disk that are copied and on the new file's disk; `units`: what the layout had placed by then."""

    format: str
    size: int
    id: str
    sources: tuple[tuple[int, int, int, int], ...]
    done: int = 0
    units: int = 0

    def continues(self, other: Journal) -> bool:
        """Whether `other` is an earlier state of the same copy: same sources, unchanged, and same target."""
        mine = (self.format, self.size, self.sources)
        return mine == (other.format, other.size, other.sources)

    def write(self, part: str) -> None:
        """Put it beside the file `part`, whole or not at all. OSError."""
        path = journal_of(part)
        fresh = journal_of(path)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(asdict(self)).encode())
            if self.done:
                os.fsync(fd)  # one that says that nothing is done may be lost
        finally:
            os.close(fd)
        os.rename(fresh, path)


def read_journal(part: str) -> Journal | None:
    """The journal beside `part`; None when there is none that makes sense."""
    try:
        fd = os.open(journal_of(part), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            text = os.read(fd, MAX_JOURNAL)
        finally:
            os.close(fd)
        found = json.loads(text)
        sources = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in found["sources"])
        id = str(UUID(found["id"]))
        return Journal(str(found["format"]), int(found["size"]), id, sources, int(found["done"]), int(found["units"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def journal_of(part: str) -> str:
    """Its name: with the same ending, so that whoever looks for what a killed daemon left finds both."""
    root, ending = os.path.splitext(part)
    return f"{root}.journal{ending}"


def identities(layers: Sequence[Layer]) -> tuple[tuple[int, int, int, int], ...]:
    """What tells that a chain's files are still the same and have not been written to."""
    found = [os.fstat(layer.file.fd) for layer in layers]
    return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)
