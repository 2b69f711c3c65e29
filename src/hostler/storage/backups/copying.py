"""From a QEMU into the files of a backup: blocks and their checksums."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hostler.model.backup import BLOCK
from hostler.model.errors import BadImage, HostlerError, QemuFailed
from hostler.storage.backups.qcow2 import ZEROES, Writer
from hostler.storage.qemu_img import explain_os

OnBytes = Callable[[int], None]
"""Called with the bytes that were dealt with since the last call."""
CHECKSUM = 32
"""Bytes of a checksum: SHA-256."""
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Copied:
    """What a file of a backup holds: see BackedDisk."""

    blocks: int
    stored: int
    sums: str


def checksum(index: int, data: bytes | None) -> bytes:
    """The checksum of a block: of its number and its content (none for one that is zero)."""
    return hashlib.sha256(struct.pack("<Q", index) + (data or b"")).digest()


class DiskFile:
    """One disk's two files in a backup that is being made: content, and checksums in the order of the blocks."""

    def __init__(self, path: Path, size: int, overlay: bool, compress: bool) -> None:
        """New files; a left-over of the same name is replaced. `overlay`: zeroes are written too, since something is
        below them."""
        self._path = path
        self._overlay = overlay
        self._sums_path = path.with_suffix(".sums")
        for file in (path, self._sums_path):
            file.unlink(missing_ok=True)
        self._fd = _new(path)
        self._sums = os.fdopen(_new(self._sums_path), "wb")
        self._writer = Writer(self._fd, size, compress)
        self._hash = hashlib.sha256()
        self._blocks = 0

    def put(self, offset: int, data: bytes | None, length: int) -> None:
        """Some blocks from `offset` on; None: they are zero."""
        for at in range(0, length, BLOCK):
            index = (offset + at) // BLOCK
            block = None if data is None else data[at : at + BLOCK]
            if block is not None and len(block) < BLOCK:
                block = block.ljust(BLOCK, b"\0")
            if block is None or block == ZEROES:
                if not self._overlay:
                    continue
                self._writer.zero(index)
                block = None
            else:
                self._writer.put(index, block)
            value = checksum(index, block)
            self._hash.update(value)
            self._sums.write(value)
            self._blocks += 1

    def finish(self) -> Copied:
        """Complete and on disk."""
        self._writer.finish()
        self._sums.flush()
        os.fsync(self._sums.fileno())
        stored = os.fstat(self._fd).st_size
        self.close()
        return Copied(self._blocks, stored, self._hash.hexdigest())

    def close(self) -> None:
        """Let go of the files. Harmless when done."""
        with suppress(OSError):  # what could not be written is known by then, and the descriptor is closed all the same
            self._sums.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _new(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


class DiskSink:
    """Takes what QEMU copies, from front to back, into the files of a backup. `error` is the first thing that went
    wrong: QEMU only learns that something did."""

    def __init__(self, path: Path, size: int, overlay: bool, compress: bool, on_bytes: OnBytes) -> None:
        self.size = size
        self.error: HostlerError | None = None
        self._path = path
        self._overlay = overlay
        self._on_bytes = on_bytes
        self._lock = asyncio.Lock()
        try:
            self._file = DiskFile(path, size, overlay, compress)
        except OSError as error:
            raise explain_os(f"backup file {path}", error, path.parent) from error

    async def write(self, offset: int, data: bytes) -> None:
        """Content of whole blocks, or up to the end."""
        await self._put(offset, data, len(data))

    async def zero(self, offset: int, length: int) -> None:
        """These bytes are zero."""
        await self._put(offset, None, length)

    async def _put(self, offset: int, data: bytes | None, length: int) -> None:
        end = offset + length
        async with self._lock:
            if self.error is not None:
                raise self.error
            try:
                if offset % BLOCK or (end % BLOCK and end != self.size):
                    raise ValueError("it is no whole block")
                if data is not None or self._overlay:
                    await asyncio.to_thread(self._file.put, offset, data, length)
            except OSError as error:
                self.error = explain_os(f"backup file {self._path}", error, self._path.parent)
                raise self.error from error
            except ValueError as error:
                self.error = QemuFailed(f"backup file {self._path}", f"QEMU copies in a wrong order: {error}")
                raise self.error from error
        self._on_bytes(length)

    async def finish(self) -> Copied:
        """Complete and on disk. NoSpace."""
        try:
            return await asyncio.to_thread(self._file.finish)
        except OSError as error:
            raise explain_os(f"backup file {self._path}", error, self._path.parent) from error

    def close(self) -> None:
        """Let go of the files. Harmless when done."""
        self._file.close()


def open_sums(path: Path, blocks: int, digest: str, subject: str) -> int:
    """The checksums of a file, open, if they are what the manifest says; the caller closes them. BadImage otherwise.
    They are read as they are needed: a sparse file of some GiB takes no room on disk. Blocking."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BadImage(
            subject, f"its checksums cannot be read: {error.strerror}", "use another backup", damaged=True
        ) from error
    try:
        found = os.fstat(fd)
        intact = stat.S_ISREG(found.st_mode) and found.st_size == blocks * CHECKSUM
        if not intact or _sha256(fd, found.st_size) != digest:
            raise BadImage(subject, "its checksums are damaged", "use another backup", damaged=True)
    except OSError as error:
        os.close(fd)
        raise BadImage(
            subject, f"its checksums cannot be read: {error.strerror}", "use another backup", damaged=True
        ) from error
    except BadImage:
        os.close(fd)
        raise
    return fd


def _sha256(fd: int, size: int) -> str:
    found = hashlib.sha256()
    for at in range(0, size, _PIECE):
        found.update(os.pread(fd, min(_PIECE, size - at), at))
    return found.hexdigest()
