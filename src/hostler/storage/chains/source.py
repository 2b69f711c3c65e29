"""An open image file, read in bounded pieces, and where the bytes of a virtual disk lie in one.

Everything here is read from hostile input: a number from an image is used as a place or a length only through
`ImageFile.read`, which refuses what lies outside the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hostler.model.errors import BadImage

MAX_READ = 16 * 1024 * 1024
"""Bytes of the largest single read of tables; nothing in either format is larger and read at once."""

ABSENT = -1
"""A piece that this image says nothing about: the parent has it; without a parent it is zeroes."""
ZERO = -2
"""A piece that reads as zeroes, whatever the parent has."""
LITERAL = -3
"""A piece whose bytes are not in the file yet but in its log; they come with the piece."""


class Piece(NamedTuple):
    """`length` bytes of the virtual disk from `offset`. `at`: offset in the image file, or ABSENT, ZERO, LITERAL."""

    offset: int
    length: int
    at: int
    literal: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A regular file, open for reading. `modified`: seconds since 1970; `size` as it was when opened."""

    fd: int
    path: str
    size: int
    allocated: int
    modified: float

    @staticmethod
    def of(fd: int, path: str) -> ImageFile:
        """The file behind a descriptor, which stays the caller's to close."""
        found = os.fstat(fd)
        return ImageFile(fd, path, found.st_size, found.st_blocks * 512, found.st_mtime)

    def read(self, at: int, length: int) -> bytes:
        """Exactly `length` bytes from `at`. BadImage when the file has not got them."""
        if at < 0 or not 0 <= length <= MAX_READ or at + length > self.size:
            raise damaged(self.path, f"it refers to {length} bytes at {at}, which it has not got")
        parts: list[bytes] = []
        while length:
            try:
                part = os.pread(self.fd, length, at)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not part:
                raise damaged(self.path, "it became shorter while it was read")
            parts.append(part)
            at, length = at + len(part), length - len(part)
        return b"".join(parts)


def damaged(path: str, cause: str) -> BadImage:
    """The image contradicts its format or itself."""
    return BadImage(f"image {path}", f"is damaged: {cause}", "restore it from a backup")


def unreadable(path: str, error: OSError) -> BadImage:
    """The disk under the image does not give its bytes."""
    return BadImage(f"image {path}", f"cannot be read: {error.strerror}", "look at the disk it is on")


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of one kind, or one after the other in the file, as one piece."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and last.end == piece.offset and _continues(last, piece):
            last = Piece(last.offset, last.length + piece.length, last.at)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _continues(last: Piece, piece: Piece) -> bool:
    if last.at < 0:
        return last.at == piece.at != LITERAL
    return piece.at == last.at + last.length


def bit_runs(bits: str, offset: int, unit: int, at: int) -> Iterator[Piece]:
    """Runs of a sector bitmap, one character for each sector in order: "1" is in this file, "0" is the parent's.

    `offset`: of the first sector on the disk; `unit`: bytes of a sector; `at`: of the first sector in the file.
    """
    position, end = 0, len(bits)
    while position < end:
        kind = bits[position]
        stop = bits.find("0" if kind == "1" else "1", position)
        stop = end if stop < 0 else stop
        place = at + position * unit if kind == "1" else ABSENT
        yield Piece(offset + position * unit, (stop - position) * unit, place)
        position = stop
