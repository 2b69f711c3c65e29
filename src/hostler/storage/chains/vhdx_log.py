"""The log of a VHDX ([MS-VHDX] 2.3), replayed in memory: what its last writer had promised but not put in place.

Opening such an image for writing replays the log into the file. Here nothing is ever written: `Replayed` is the file as
it would be afterwards. Bounded: the log by MAX_LOG, and the checksums of hostile entries by a budget.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from hostler.storage.chains.source import LITERAL, ZERO, ImageFile, Piece, damaged
from hostler.storage.crc32c import crc32c

MAX_LOG = 16 * 1024 * 1024
"""Bytes of the largest log that is replayed. Hyper-V and QEMU make logs of 1 MiB."""
_SUM_BUDGET = 2
"""How many times the log's length is summed at most: entries of a sound log do not overlap."""

SECTOR = 4096
_ENTRY = struct.Struct("<4sIIIQI4x16sQQ")
"""Signature, checksum, length, tail, sequence number, descriptors, log's id, flushed and last file offset."""
_DESCRIPTOR = struct.Struct("<4s4sQQQ")
"""Signature, trailing bytes, leading bytes or length of zeroes, file offset, sequence number."""
_DESCRIPTORS_AT = 64


@dataclass(frozen=True, slots=True)
class _Entry:
    """`at`, `length`, `tail`: bytes, in the log; `body`: the whole entry."""

    at: int
    length: int
    tail: int
    sequence: int
    flushed: int
    body: bytes
    descriptors: int


@dataclass(slots=True)
class Patches:
    """Ranges of the file that the log replaces: disjoint, ordered; None stands for zeroes."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    contents: list[bytes | None] = field(default_factory=list)

    def put(self, start: int, length: int, content: bytes | None) -> None:
        """Replace a range, over whatever was put there before."""
        end = start + length
        first, last = bisect_right(self.ends, start), bisect_left(self.starts, end)
        kept: list[tuple[int, int, bytes | None]] = []
        for index in range(first, last):
            low, high, old = self.starts[index], self.ends[index], self.contents[index]
            if low < start:
                kept.append((low, start, old and old[: start - low]))
            if high > end:
                kept.append((end, high, old and old[end - low :]))
        kept.append((start, end, content))
        kept.sort(key=lambda one: one[0])
        self.starts[first:last] = [one[0] for one in kept]
        self.ends[first:last] = [one[1] for one in kept]
        self.contents[first:last] = [one[2] for one in kept]

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, bytes | None]]:
        """The replaced parts of a range: start, end, bytes."""
        for index in range(bisect_right(self.ends, start), bisect_left(self.starts, end)):
            low, high, content = self.starts[index], self.ends[index], self.contents[index]
            cut_low, cut_high = max(low, start), min(high, end)
            yield cut_low, cut_high, content and content[cut_low - low : cut_high - low]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A file with the patches of its log over it."""

    file: ImageFile
    patches: Patches | None = None

    def read(self, at: int, length: int) -> bytes:
        """As `ImageFile.read`; what the log has is there even beyond the file's end."""
        if self.patches is None or not any(True for _ in self.patches.within(at, at + length)):
            return self.file.read(at, length)
        there = max(0, min(length, self.file.size - at))
        result = bytearray(self.file.read(at, there))
        covered = at + there
        for low, high, content in self.patches.within(at, at + length):
            if low > covered:
                break
            result[low - at : high - at] = content or bytes(high - low)
            covered = max(covered, high)
        if len(result) < length:
            raise damaged(self.file.path, f"it refers to {length} bytes at {at}, which it has not got")
        return bytes(result)

    def split(self, piece: Piece) -> Iterator[Piece]:
        """A piece of data, with what the log replaces of it."""
        if self.patches is None:
            yield piece
            return
        position, shift = piece.at, piece.offset - piece.at
        for low, high, content in self.patches.within(piece.at, piece.at + piece.length):
            if low > position:
                yield Piece(position + shift, low - position, position)
            yield Piece(low + shift, high - low, ZERO if content is None else LITERAL, content or b"")
            position = high
        if position < piece.at + piece.length:
            yield Piece(position + shift, piece.at + piece.length - position, position)


class Log:
    """The log at `at`, of `length` bytes, whose entries carry `id`."""

    def __init__(self, file: ImageFile, at: int, length: int, id: bytes) -> None:
        if length > MAX_LOG:
            raise damaged(file.path, f"its log of {length} bytes is longer than any known program makes")
        self._file = file
        self._id = id
        self._bytes = file.read(at, length)
        self._known: dict[int, _Entry | None] = {}
        self._budget = _SUM_BUDGET * length

    def replay(self) -> Patches | None:
        """The patches of the active sequence; None when nothing is to be replayed. BadImage when the image lost bytes
        that the log takes to be there."""
        entries = self._active()
        if not entries:
            return None
        if max(entry.flushed for entry in entries) > self._file.size:
            raise damaged(self._file.path, "it is shorter than its log says, so data is lost")
        patches = Patches()
        for entry in entries:
            self._apply(entry, patches)
        return patches

    def _active(self) -> list[_Entry]:
        """[MS-VHDX] 2.3.4: the sequence with the highest number, from its tail to its head."""
        best: list[_Entry] = []
        at, length = 0, len(self._bytes)
        while at < length:
            sequence = self._sequence(at)
            tails = [index for index, entry in enumerate(sequence) if entry.at == sequence[-1].tail]
            if tails and (not best or sequence[-1].sequence > best[-1].sequence):
                best = sequence[tails[0] :]
            # What begins later in a sequence ends like it: it is no better.
            at += sum(entry.length for entry in sequence) or SECTOR
        return best

    def _sequence(self, start: int) -> list[_Entry]:
        found: list[_Entry] = []
        at, taken = start, 0
        while taken < len(self._bytes):
            entry = self._entry(at)
            if entry is None or (found and entry.sequence != found[-1].sequence + 1):
                break
            taken += entry.length
            if taken > len(self._bytes):
                break
            found.append(entry)
            at = (at + entry.length) % len(self._bytes)
        return found

    def _entry(self, at: int) -> _Entry | None:
        if at not in self._known:
            self._known[at] = self._parse(at)
        return self._known[at]

    def _parse(self, at: int) -> _Entry | None:
        fields = _ENTRY.unpack_from(self._bytes, at)
        signature, stored, length, tail, sequence, descriptors, id, flushed, _ = fields
        if signature != b"loge" or id != self._id or sequence == 0:
            return None
        if length % SECTOR or not SECTOR <= length <= len(self._bytes) or tail % SECTOR:
            return None
        if _data_at(descriptors) > length:
            return None
        self._budget -= length
        if self._budget < 0:
            raise damaged(self._file.path, "the entries of its log overlap")
        body = self._bytes[at : at + length]
        body += self._bytes[: length - len(body)]
        if crc32c(body[:4] + bytes(4) + body[8:]) != stored:
            return None
        return _Entry(at, length, tail, sequence, flushed, body, descriptors)

    def _apply(self, entry: _Entry, patches: Patches) -> None:
        data = _data_at(entry.descriptors)
        for number in range(entry.descriptors):
            at = _DESCRIPTORS_AT + number * _DESCRIPTOR.size
            signature, trailing, leading, place, sequence = _DESCRIPTOR.unpack_from(entry.body, at)
            if sequence != entry.sequence or place % SECTOR or place >= 2**62:
                raise self._bad(entry)
            if signature == b"zero" and leading % SECTOR == 0 and leading < 2**62:
                patches.put(place, leading, None) if leading else None
            elif signature == b"desc":
                sector = entry.body[data : data + SECTOR]
                if len(sector) < SECTOR or sector[:4] != b"data" or _numbers(sector) != entry.sequence:
                    raise self._bad(entry)
                patches.put(place, SECTOR, struct.pack("<Q", leading) + sector[8:4092] + trailing)
                data += SECTOR
            else:
                raise self._bad(entry)

    def _bad(self, entry: _Entry) -> Exception:
        return damaged(self._file.path, f"entry {entry.sequence} of its log contradicts itself")


def _data_at(descriptors: int) -> int:
    """Where an entry's data sectors begin: after its header and descriptors, in whole sectors."""
    return -(-(_DESCRIPTORS_AT + descriptors * _DESCRIPTOR.size) // SECTOR) * SECTOR


def _numbers(sector: bytes) -> int:
    """The sequence number that a data sector carries in two halves."""
    return int.from_bytes(sector[4:8], "little") << 32 | int.from_bytes(sector[4092:], "little")
