"""The qcow2 files of backups: written from front to back, and read again without trust.

A small subset of qemu's docs/interop/qcow2.txt: version 3, clusters of 64 KiB, refcounts of 16 bits, no backing file,
no snapshots. A cluster is absent, zero, or data (plain or compressed with raw deflate). QEMU and other programs read
such a file; it names no other one, so that an incremental one alone shows its changes over zeroes.

    cluster 0: header | data and L2 tables, as they come | L1 table | refcount blocks | refcount table

The header is written last: a file that was broken off is no qcow2.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from hostler.model.backup import BLOCK
from hostler.model.errors import BadImage

_BITS = 16
_L2 = BLOCK // 8
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""Magic, version, backing offset and size, cluster bits, size, encryption, L1 entries and offset, refcount table offset
and clusters, snapshots and their offset, incompatible, compatible and autoclear features, refcount order, header size.
"""
_MAGIC = b"QFI\xfb"
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_SHIFT = 62 - (_BITS - 8)
"""Where in the descriptor of a compressed cluster its number of sectors begins."""
_WINDOW = -12
"""Raw deflate with a window of 4 KiB, as QEMU's own reader expects."""
MAX_SIZE = 64 * 1024**4
"""Bytes of a disk: with more, the tables of a hostile file would take too much memory."""
ZEROES = bytes(BLOCK)


class Writer:
    """Writes one file. Blocks come in ascending order. Blocking: use it from a thread. OSError as the disk gives it."""

    def __init__(self, fd: int, size: int, compress: bool = False) -> None:
        self._fd = fd
        self._size = size
        self._compress = compress
        self._end = BLOCK
        self._l1 = array("Q", bytes(8 * (-(-size // (BLOCK * _L2)) or 1)))
        self._l2 = array("Q", bytes(BLOCK))
        self._region = -1
        self._last = -1
        self._refs = array("H", [1])

    @property
    def written(self) -> int:
        """Bytes the file has by now."""
        return self._end

    def put(self, index: int, data: bytes) -> None:
        """The content of block `index`; the last one of a disk is filled up with zeroes."""
        if len(data) < BLOCK:
            data = data.ljust(BLOCK, b"\0")
        if self._compress:
            packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW)
            packed = packer.compress(data) + packer.flush()
            if len(packed) < BLOCK - 4096:
                self._set(index, self._append_packed(packed))
                return
        self._set(index, self._append(data) | _COPIED)

    def zero(self, index: int) -> None:
        """Block `index` reads as zeroes, whatever is below it."""
        self._set(index, _ZERO)

    def finish(self) -> None:
        """Write the tables and, last, the header. On disk when it returns."""
        self._flush_region()
        l1 = self._append(_big_endian(self._l1))
        table, clusters = self._write_refcounts()
        os.fsync(self._fd)
        header = _HEADER.pack(
            *(_MAGIC, 3, 0, 0, _BITS, self._size, 0, len(self._l1), l1, table, clusters, 0, 0, 0, 0, 0, 4, 104)
        )
        _pwrite(self._fd, header.ljust(BLOCK, b"\0"), 0)
        os.fsync(self._fd)

    def _set(self, index: int, entry: int) -> None:
        if index <= self._last or index * BLOCK >= self._size:
            raise ValueError(f"block {index} after {self._last}")
        self._last = index
        region, slot = divmod(index, _L2)
        if region != self._region:
            self._flush_region()
            self._region = region
        self._l2[slot] = entry

    def _flush_region(self) -> None:
        if self._region >= 0:
            self._l1[self._region] = self._append(_big_endian(self._l2)) | _COPIED
            self._l2 = array("Q", bytes(BLOCK))
        self._region = -1

    def _append(self, data: bytes) -> int:
        """Whole clusters at the end; their offset."""
        self._end += -self._end % BLOCK
        offset = self._end
        _pwrite(self._fd, data, offset)
        self._end += len(data) + -len(data) % BLOCK
        self._count_up_to(self._end)
        return offset

    def _append_packed(self, packed: bytes) -> int:
        """A compressed cluster right behind the last one; its descriptor."""
        offset = self._end
        _pwrite(self._fd, packed, offset)
        self._end += len(packed)
        first, last = offset // BLOCK, (self._end - 1) // BLOCK
        for cluster in range(first, last + 1):
            if cluster < len(self._refs):
                self._refs[cluster] += 1
            else:
                self._refs.append(1)
        sectors = (self._end - 1) // 512 - offset // 512
        return _COMPRESSED | sectors << _SHIFT | offset

    def _count_up_to(self, end: int) -> None:
        self._refs.extend([1] * (end // BLOCK - len(self._refs)))

    def _write_refcounts(self) -> tuple[int, int]:
        """Refcount blocks and the table of them, which count themselves; offset of the table, and its clusters."""
        self._end += -self._end % BLOCK
        used = self._end // BLOCK
        per_block = BLOCK // 2
        blocks = tables = 0
        while True:
            need = -(-(used + blocks + tables) // per_block)
            need_tables = -(-need * 8 // BLOCK)
            if (need, need_tables) == (blocks, tables):
                break
            blocks, tables = need, need_tables
        refs = self._refs[:]
        refs.extend([1] * (used + blocks + tables - len(refs)))
        refs.extend([0] * (blocks * per_block - len(refs)))
        first = self._append(_big_endian(refs))
        offsets = array("Q", [first + n * BLOCK for n in range(blocks)])
        return self._append(_big_endian(offsets).ljust(tables * BLOCK, b"\0")), tables


@dataclass(frozen=True, slots=True)
class Entry:
    """One block that a file holds. `at`: where its data is (None: it is zero); `length`: bytes there if compressed."""

    index: int
    at: int | None
    length: int | None = None


class Reader:
    """Reads such a file. BadImage for whatever a Writer does not write. Blocking."""

    def __init__(self, fd: int, subject: str) -> None:
        self._fd = fd
        self._subject = subject
        self._file_size = os.fstat(fd).st_size
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or head[:4] != _MAGIC:
            raise self._bad("is no qcow2 file, or was never finished")
        fields = _HEADER.unpack(head)
        (_, version, backing, _, bits, self.size, crypt, entries, l1, _, _, snapshots, _, incompatible, *_) = fields
        if (version, backing, bits, crypt, snapshots, incompatible) != (3, 0, _BITS, 0, 0, 0):
            raise self._bad("is not a qcow2 file as Hostler writes them")
        if self.size > MAX_SIZE or entries != (-(-self.size // (BLOCK * _L2)) or 1):
            raise self._bad("has a size that cannot be")
        self._l1 = self._table(l1, entries)

    def _bad(self, cause: str) -> BadImage:
        return BadImage(self._subject, cause, "the backup is damaged: use another one", damaged=True)

    def _table(self, offset: int, entries: int) -> array[int]:
        if offset % BLOCK or offset + entries * 8 > self._file_size:
            raise self._bad("has a table outside of the file")
        table = array("Q")
        table.frombytes(os.pread(self._fd, entries * 8, offset))
        table.byteswap()
        return table

    @property
    def regions(self) -> int:
        """How many regions of 512 MiB the disk has."""
        return len(self._l1)

    def region(self, number: int) -> Iterator[Entry]:
        """What the file holds of that region, in ascending order."""
        offset = self._l1[number] & _OFFSET if number < len(self._l1) else 0
        if not offset:
            return
        for slot, entry in enumerate(self._table(offset, _L2)):
            if entry:
                yield self._entry(number * _L2 + slot, entry)

    def _entry(self, index: int, entry: int) -> Entry:
        if index * BLOCK >= self.size:
            raise self._bad("has a block behind the end of the disk")
        if entry & _COMPRESSED:
            at = entry & ((1 << _SHIFT) - 1)
            sectors = (entry & (_COMPRESSED - 1)) >> _SHIFT
            return Entry(index, at, (sectors + 1) * 512 - at % 512)
        return Entry(index, None if entry & _ZERO else entry & _OFFSET)

    def read(self, entry: Entry) -> bytes:
        """The content of a block that is not zero, BLOCK bytes."""
        assert entry.at is not None
        data = os.pread(self._fd, BLOCK if entry.length is None else entry.length, entry.at)
        if entry.length is not None:
            try:
                data = zlib.decompressobj(_WINDOW).decompress(data, BLOCK)
            except zlib.error as error:
                raise self._bad(f"has a damaged block ({entry.index})") from error
        if len(data) != BLOCK:
            raise self._bad(f"is cut off at block {entry.index}")
        return data


def _big_endian(values: array[int]) -> bytes:
    swapped = values[:]
    swapped.byteswap()
    return swapped.tobytes()


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
