"""The read plan of a chain: for each byte of the disk the file and place it is in.

Made as it is read, in little memory: a table page of each image at a time. What a child lacks is asked from its parent,
and so on down to the base, where what is lacking is zeroes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hostler.storage.chains.layer import Layer
from hostler.storage.chains.source import ABSENT, LITERAL, MAX_READ, ZERO, ImageFile, merged, unreadable


class Extent(NamedTuple):
    """`length` bytes of the disk from `offset`: in file number `source` of the chain at `at`, or zeroes (`at` is ZERO),
    or the bytes `literal` (`at` is LITERAL)."""

    offset: int
    length: int
    source: int
    at: int
    literal: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + self.length


def extents(layers: Sequence[Layer], start: int, end: int) -> Iterator[Extent]:
    """The extents of a range of the chain's first disk, ordered, without gaps, neighbours joined. BadImage."""
    last: Extent | None = None
    for extent in _of(layers, 0, start, end):
        if last is not None and _continues(last, extent):
            last = Extent(last.offset, last.length + extent.length, last.source, last.at)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def _continues(last: Extent, extent: Extent) -> bool:
    if last.at == ZERO:
        return extent.at == ZERO
    return last.at >= 0 and extent.source == last.source and extent.at == last.at + last.length


def _of(layers: Sequence[Layer], number: int, start: int, end: int) -> Iterator[Extent]:
    """What image `number` and those below it have of a range. A child may be larger than its parent."""
    if number == len(layers):
        yield Extent(start, end - start, 0, ZERO)
        return
    own = min(end, layers[number].size)
    if start < own:
        for piece in merged(layers[number].pieces(start, own)):
            if piece.at == ABSENT:
                yield from _of(layers, number + 1, piece.offset, piece.end)
            else:
                yield Extent(piece.offset, piece.length, number if piece.at != ZERO else 0, piece.at, piece.literal)
    if end > max(start, own):
        yield Extent(max(start, own), end - max(start, own), 0, ZERO)


def without_holes(layers: Sequence[Layer], plan: Iterator[Extent]) -> Iterator[Extent]:
    """The plan with the holes of the files as zeroes: those of a fixed VHD, say, that was copied with care."""
    for extent in plan:
        if extent.at < 0:
            yield extent
        else:
            yield from _holes(layers[extent.source].file, extent)


def _holes(file: ImageFile, extent: Extent) -> Iterator[Extent]:
    position, end = extent.at, extent.at + extent.length
    shift = extent.offset - extent.at
    try:
        while position < end:
            data = _seek(file.fd, position, end, os.SEEK_DATA)
            if data > position:
                yield Extent(position + shift, data - position, 0, ZERO)
            position = data
            if data < end:
                position = _seek(file.fd, data, end, os.SEEK_HOLE)
                yield Extent(data + shift, position - data, extent.source, data)
    except OSError as error:
        raise unreadable(file.path, error) from error


def _seek(fd: int, position: int, end: int, what: int) -> int:
    try:
        return min(end, os.lseek(fd, position, what))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end  # nothing but a hole up to the end of the file
        raise


def read(layers: Sequence[Layer], start: int, length: int) -> bytes:
    """The bytes of a range, for small ones."""
    parts = [read_extent(layers, extent) for extent in extents(layers, start, start + length)]
    return b"".join(parts)


def read_extent(layers: Sequence[Layer], extent: Extent) -> bytes:
    """The bytes of one extent that fits into memory."""
    if extent.at == ZERO:
        return bytes(extent.length)
    if extent.at == LITERAL:
        return extent.literal
    file = layers[extent.source].file
    steps = range(0, extent.length, MAX_READ)
    return b"".join(file.read(extent.at + step, min(MAX_READ, extent.length - step)) for step in steps)
