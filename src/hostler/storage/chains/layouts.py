"""Where the bytes of a disk go in a new image: raw, fixed and dynamic VHD, VHDX, qcow2.

A layout is a pure function of which units of the disk have data, asked in rising order: the same disk always gives the
same file, which is what lets an interrupted copy go on. Data is placed one unit after the other, so that long runs of
the disk are long runs of the file. The tables come out as they are complete; what was never written stays a hole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol
from uuid import UUID, uuid4

from hostler.storage.crc32c import crc32c
from hostler.storage.footer import SECTOR, DiskType, make_footer, make_header

KiB, MiB, GiB, TiB = 1024, 1024**2, 1024**3, 1024**4

Write = Callable[[int, bytes], None]
"""Puts bytes at a place of the new file."""


class Layout(Protocol):
    """`unit`: bytes of the disk that are placed together; 0 where the disk lies in the file as it is."""

    unit: int

    def place(self, index: int, write: Write) -> int:
        """The offset in the file of unit `index`, asked once for each unit with data, in rising order."""

    def finish(self, write: Write) -> int:
        """Write what describes the data; the length of the whole file."""


class Raw:
    """The disk itself; a fixed VHD has a footer after it."""

    unit = 0

    def __init__(self, size: int, fixed_vhd: UUID | None = None) -> None:
        self._size = size
        self._id = fixed_vhd

    def place(self, index: int, write: Write) -> int:
        """Never asked: there are no units."""
        raise NotImplementedError

    def finish(self, write: Write) -> int:
        """The footer, where there is one."""
        if self._id is None:
            return self._size
        write(self._size, make_footer(DiskType.FIXED, self._size, self._id))
        return self._size + SECTOR


class Vhd:
    """A dynamic VHD with the usual blocks of 2 MiB. Data begins at multiples of 4 KiB, its block's bitmap before it."""

    unit = 2 * MiB
    _TABLE_AT = 3 * SECTOR

    def __init__(self, size: int, id: UUID) -> None:
        self._size = size
        self._id = id
        self._table = bytearray(b"\xff\xff\xff\xff" * -(-size // self.unit))
        end = self._TABLE_AT + len(self._table)
        self._next = -(-(end + SECTOR) // 4096) * 4096

    def place(self, index: int, write: Write) -> int:
        """As `Layout.place`."""
        at = self._next
        write(at - SECTOR, b"\xff" * SECTOR)
        struct.pack_into(">I", self._table, index * 4, (at - SECTOR) // SECTOR)
        self._next = at + self.unit + 4096
        return at

    def finish(self, write: Write) -> int:
        """Footer, its copy, header, table."""
        end = self._next - 4096
        footer = make_footer(DiskType.DYNAMIC, self._size, self._id)
        room = -(-len(self._table) // SECTOR) * SECTOR
        header = make_header(self._TABLE_AT, len(self._table) // 4, self.unit)
        write(0, footer + header + bytes(self._table).ljust(room, b"\xff"))
        end = max(end, self._TABLE_AT + room)
        write(end, footer)
        return end + SECTOR


class Vhdx:
    """A dynamic VHDX, cleanly closed. Blocks as large as QEMU makes them for that size ([MS-VHDX]: 1 to 256 MiB)."""

    _LOG_AT, _METADATA_AT, _TABLE_AT = MiB, 2 * MiB, 3 * MiB
    _SECTOR = 512

    def __init__(self, size: int, id: UUID) -> None:
        self.unit = (
            64 * MiB if size > 32 * TiB else 32 * MiB if size > 100 * GiB else 16 * MiB if size > GiB else 8 * MiB
        )
        self._size = size
        self._id = id
        self._chunk = (1 << 23) * self._SECTOR // self.unit
        blocks = -(-size // self.unit)
        self._table = bytearray((blocks + (blocks - 1) // self._chunk) * 8)
        self._room = -(-len(self._table) // MiB) * MiB
        self._next = self._TABLE_AT + self._room

    def place(self, index: int, write: Write) -> int:
        """As `Layout.place`."""
        at = self._next
        struct.pack_into("<Q", self._table, (index + index // self._chunk) * 8, at | 6)
        self._next = at + self.unit
        return at

    def finish(self, write: Write) -> int:
        """Headers, region tables, metadata, block table."""
        write(self._TABLE_AT, bytes(self._table))
        write(self._METADATA_AT, self._metadata())
        regions = _region(_guid("2DC27766-F623-4200-9D64-115E9BFD4A08"), self._TABLE_AT, self._room)
        regions += _region(_guid("8B7CA206-4790-4B9A-B8FE-575F050F886E"), self._METADATA_AT, MiB)
        table = _summed((b"regi" + struct.pack("<III", 0, 2, 0) + regions).ljust(64 * KiB, b"\0"))
        headers = [
            _summed(
                (
                    struct.pack("<4sIQ16s16s16s", b"head", 0, number, self._id.bytes_le, self._id.bytes_le, bytes(16))
                    + struct.pack("<HHIQ", 0, 1, MiB, self._LOG_AT)
                ).ljust(4 * KiB, b"\0")
            ).ljust(64 * KiB, b"\0")
            for number in (1, 2)
        ]
        identifier = (b"vhdxfile" + "Hostler".encode("utf-16-le")).ljust(64 * KiB, b"\0")
        write(0, identifier + headers[0] + headers[1] + table + table)
        return self._next

    def _metadata(self) -> bytes:
        """[MS-VHDX] 2.6: block size, disk size, the disk's id, logical and physical sectors."""
        physical = 4096 if self._size % 4096 == 0 else self._SECTOR
        items = (
            ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", struct.pack("<II", self.unit, 0), 4),
            ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", struct.pack("<Q", self._size), 6),
            ("BECA12AB-B2E6-4523-93EF-C309E000C746", self._id.bytes_le, 6),
            ("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", struct.pack("<I", self._SECTOR), 6),
            ("CDA348C7-445D-4471-9CC9-E9885251C556", struct.pack("<I", physical), 6),
        )
        table, content = struct.pack("<8sHH20x", b"metadata", 0, len(items)), b""
        for name, data, flags in items:
            table += struct.pack("<16sIIII", _guid(name), 64 * KiB + len(content), len(data), flags, 0)
            content += data
        return table.ljust(64 * KiB, b"\0") + content


class Qcow2:
    """A qcow2 (version 3, clusters of 64 KiB, 16-bit reference counts; QEMU's docs/interop/qcow2.txt). Each level 2
    table stands after the data that it describes, level 1 and the reference counts stand at the end."""

    unit = 64 * KiB
    _PER_TABLE = 64 * KiB // 8
    _COPIED = 1 << 63
    """Set where a cluster's reference count is exactly one, as all are here."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = self.unit
        self._tables = -(-size // (self.unit * self._PER_TABLE))
        self._level1 = bytearray(self._tables * 8)
        self._current = -1
        self._level2 = bytearray(self.unit)

    def place(self, index: int, write: Write) -> int:
        """As `Layout.place`."""
        table = index // self._PER_TABLE
        if table != self._current:
            self._put_table(write)
            self._current = table
        at = self._next
        struct.pack_into(">Q", self._level2, index % self._PER_TABLE * 8, at | self._COPIED)
        self._next += self.unit
        return at

    def _put_table(self, write: Write) -> None:
        if self._current < 0:
            return
        write(self._next, bytes(self._level2))
        struct.pack_into(">Q", self._level1, self._current * 8, self._next | self._COPIED)
        self._next += self.unit
        self._level2 = bytearray(self.unit)

    def finish(self, write: Write) -> int:
        """The last level 2 table, level 1, reference counts, header."""
        self._put_table(write)
        level1_at = self._next
        write(level1_at, bytes(self._level1))
        self._next += -(-len(self._level1) // self.unit) * self.unit
        blocks, table_clusters = _counts(self._next // self.unit, self.unit)
        table_at = self._next
        blocks_at = table_at + table_clusters * self.unit
        clusters = self._next // self.unit + table_clusters + blocks
        places = [blocks_at + number * self.unit for number in range(blocks)]
        write(table_at, struct.pack(f">{blocks}Q", *places))
        per_block = self.unit // 2
        for number, place in enumerate(places):
            write(place, b"\0\1" * min(per_block, clusters - number * per_block))
        header = struct.pack(
            ">4sIQIIQIIQQIIQ",
            *(b"QFI\xfb", 3, 0, 0, 16, self._size, 0, self._tables),
            *(level1_at, table_at, table_clusters, 0, 0),
        )
        write(0, header + struct.pack(">QQQII", 0, 0, 0, 4, 104) + bytes(8))
        return clusters * self.unit


def _counts(used: int, unit: int) -> tuple[int, int]:
    """How many clusters of reference counts, and of their table, it takes to count all, themselves included."""
    blocks = table = 1
    while True:
        total = used + blocks + table
        more = max(blocks, -(-total // (unit // 2)))
        wide = max(table, -(-more * 8 // unit))
        if (more, wide) == (blocks, table):
            return blocks, table
        blocks, table = more, wide


def layout(format: str, size: int, id: UUID) -> Layout:
    """The layout of a new image of that format (as `ImageFormat` names it)."""
    if format == "raw":
        return Raw(size)
    if format == "vhd-fixed":
        return Raw(size, id)
    if format == "vhd":
        return Vhd(size, id)
    return Vhdx(size, id) if format == "vhdx" else Qcow2(size)


def new_id() -> UUID:
    """Of a new image; written down with an interrupted copy, so that it stays."""
    return uuid4()


def _region(guid: bytes, at: int, length: int) -> bytes:
    return struct.pack("<16sQII", guid, at, length, 1)


def _guid(text: str) -> bytes:
    return UUID(text).bytes_le


def _summed(block: bytes) -> bytes:
    return block[:4] + struct.pack("<I", crc32c(block)) + block[8:]
