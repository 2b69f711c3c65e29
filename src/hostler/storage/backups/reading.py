"""What a disk of a backup contains: its own blocks over those of what it builds on, each checked as it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hostler.model.backup import BackedDisk
from hostler.model.errors import BadImage, HostlerError, NotFound
from hostler.storage.backups.copying import CHECKSUM, checksum, open_sums
from hostler.storage.backups.qcow2 import Entry, Reader
from hostler.storage.files import open_regular


@dataclass(frozen=True, slots=True)
class Link:
    """One file of a chain: the backup's id, the disk by its manifest, and where the file is."""

    backup: str
    disk: BackedDisk
    path: Path

    @property
    def subject(self) -> str:
        """How errors name it."""
        return f"disk {self.disk.id} of backup {self.backup}"


class _File:
    """One open file, read in step with its checksums: both are in the order of the blocks."""

    def __init__(self, link: Link, stack: ExitStack) -> None:
        self.link = link
        try:
            fd = open_regular(str(link.path))
        except HostlerError as error:
            raise NotFound(link.subject, f"its file {link.path} {error.cause}", "use another backup") from error
        stack.callback(os.close, fd)
        self.reader = Reader(fd, link.subject)
        if self.reader.size != link.disk.size:
            raise self.damaged("has another size than its manifest says")
        self._sums = open_sums(link.path.with_suffix(".sums"), link.disk.blocks, link.disk.sums, link.subject)
        stack.callback(os.close, self._sums)
        self._next = 0

    def damaged(self, cause: str) -> BadImage:
        return BadImage(self.link.subject, cause, "use another backup", damaged=True)

    def region(self, number: int) -> dict[int, tuple[Entry, bytes]]:
        """Its blocks of that region, with their checksums. Regions are asked for in order."""
        found: dict[int, tuple[Entry, bytes]] = {}
        for entry in self.reader.region(number):
            if self._next >= self.link.disk.blocks:
                raise self.damaged("holds more blocks than its manifest says")
            value = os.pread(self._sums, CHECKSUM, self._next * CHECKSUM)
            found[entry.index] = (entry, value)
            self._next += 1
        return found

    def read(self, entry: Entry, value: bytes) -> bytes | None:
        """The block's content, checked; None when it is zero."""
        data = None if entry.at is None else self.reader.read(entry)
        if checksum(entry.index, data) != value:
            raise self.damaged(f"block {entry.index} is not what was written")
        return data

    def require_all(self) -> None:
        """Whether every block that the manifest counts was there."""
        if self._next != self.link.disk.blocks:
            raise self.damaged("holds fewer blocks than its manifest says")


class Chain:
    """A disk as a chain of files, newest first. Blocking: use it from a thread."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links
        self._stack = ExitStack()
        self._files: list[_File] = []

    def __enter__(self) -> Self:
        try:
            for link in self._links:
                self._files.append(_File(link, self._stack))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._links[0].disk.size

    @property
    def blocks(self) -> int:
        """How many blocks `content` gives at most."""
        return sum(link.disk.blocks for link in self._links)

    def content(self) -> Iterator[tuple[int, bytes | None]]:
        """Every block that any file holds: its number, and its content (None: zero), in order. BadImage for damage."""
        for number in range(self._files[0].reader.regions):
            merged: dict[int, tuple[_File, Entry, bytes]] = {}
            for file in reversed(self._files):
                for index, (entry, value) in file.region(number).items():
                    merged[index] = (file, entry, value)
            for index in sorted(merged):
                file, entry, value = merged[index]
                yield index, file.read(entry, value)
        for file in self._files:
            file.require_all()


def verify(link: Link) -> Iterator[int]:
    """Check one file alone, block by block; gives how many blocks were checked so far. BadImage, NotFound."""
    with ExitStack() as stack:
        file = _File(link, stack)
        checked = 0
        for number in range(file.reader.regions):
            for entry, value in file.region(number).values():
                file.read(entry, value)
                checked += 1
                if checked % 64 == 0:
                    yield checked
        file.require_all()
        yield checked
