"""VHD of all three kinds (Microsoft's "Virtual Hard Disk Image Format Specification" version 1.0, October 2006).

A dynamic one is a table of blocks, each a bitmap of its sectors and their data. In a differencing one (.avhd) the
bitmap says which sectors are in this file; the others, and blocks that are not there, are the parent's. In a dynamic
one without a parent the bitmap is not used: what was never written is zeroes in the file too, and QEMU sets all bits.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from hostler.storage.chains.layer import MAX_NAME, ParentLink
from hostler.storage.chains.source import ABSENT, ImageFile, Piece, bit_runs, damaged
from hostler.storage.footer import SECTOR, DiskType, Footer, checksum, parse_footer

EPOCH = 946_684_800
"""Seconds from 1970 to 2000-01-01 00:00 UTC, from where a VHD counts."""

_HEADER = struct.Struct(">8sQQIIII16sII512s")
"""Cookie, data offset, table offset, version, entries, block size, checksum, parent's id, parent's time stamp,
reserved, parent's name."""
_LOCATOR = struct.Struct(">4sIIIQ")
"""Code, data space, data length, reserved, data offset; eight of them from offset 576."""
_LOCATORS_AT, _LOCATORS = 576, 8
_CODES = (b"W2ru", b"W2ku", b"Wi2r", b"Wi2k", b"MacX")
"""In the order of preference: relative and absolute Windows path in UTF-16, both in an old code page, a file URL."""
_UNUSED = b"\xff\xff\xff\xff"
_MAX_BLOCKS = 4 * 1024 * 1024
_MAX_BLOCK = 256 * 1024 * 1024
"""Bytes of the largest block; the usual one has 2 MiB, and no program is known to make more than 256 MiB."""
_MAX_DYNAMIC = 2 * 1024**4
"""Bytes: what 32-bit sector numbers reach. Hyper-V stops at 2040 GiB."""
_MAX_FIXED = 64 * 1024**4
_PAGE = 1024
"""Entries of the table looked at together."""


@dataclass(frozen=True, slots=True)
class VhdLayer:
    """An open VHD. `table`: offset of its block table; `block`: bytes of a block, 0 for a fixed one."""

    file: ImageFile
    kind: DiskType
    size: int
    id: UUID
    link: ParentLink | None = None
    table: int = 0
    block: int = 0

    @property
    def format(self) -> str:
        return "vhd-fixed" if self.kind is DiskType.FIXED else "vhd"

    @property
    def dynamic(self) -> bool:
        return self.kind is not DiskType.FIXED

    @property
    def log_pending(self) -> bool:
        return False

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """As `Layer.pieces`."""
        if self.kind is DiskType.FIXED:
            yield Piece(start, end - start, start)
            return
        first, last = start // self.block, -(-end // self.block)
        for page in range(first, last, _PAGE):
            count = min(_PAGE, last - page)
            table = self.file.read(self.table + page * 4, count * 4)
            if table == _UNUSED * count:
                low, high = max(start, page * self.block), min(end, (page + count) * self.block)
                yield Piece(low, high - low, ABSENT)
                continue
            entries = array("I", table)
            if sys.byteorder == "little":
                entries.byteswap()
            for index, sector in enumerate(entries, page):
                low, high = max(start, index * self.block), min(end, (index + 1) * self.block)
                yield from self._block(index, sector, low, high)

    def _block(self, index: int, sector: int, low: int, high: int) -> Iterator[Piece]:
        if sector == 0xFFFFFFFF:
            yield Piece(low, high - low, ABSENT)
            return
        bitmap = bitmap_size(self.block)
        data = sector * SECTOR + bitmap
        first, last = (low - index * self.block) // SECTOR, -(-(high - index * self.block) // SECTOR)
        if data + last * SECTOR > self.file.size:
            raise damaged(self.file.path, f"block {index} lies beyond its end, so data is lost")
        if self.kind is DiskType.DYNAMIC:
            yield Piece(low, high - low, data + low - index * self.block)
            return
        bits = _bits(self.file.read(sector * SECTOR, bitmap))[first:last]
        yield from bit_runs(bits, index * self.block + first * SECTOR, SECTOR, data + first * SECTOR)


def bitmap_size(block: int) -> int:
    """Bytes of the bitmap before a block: a bit for each sector, in whole sectors."""
    return -(-(block // SECTOR // 8) // SECTOR) * SECTOR


def _bits(bitmap: bytes) -> str:
    """One character for each sector; the highest bit of a byte is its first sector."""
    return f"{int.from_bytes(bitmap, 'big'):0{len(bitmap) * 8}b}"


def open_vhd(file: ImageFile) -> VhdLayer:
    """Read footer and header. BadImage."""
    footer = _footer(file)
    most = _MAX_FIXED if footer.kind == DiskType.FIXED else _MAX_DYNAMIC
    if not 0 < footer.size <= most or footer.size % SECTOR:
        raise damaged(file.path, f"its size of {footer.size} bytes is impossible")
    if footer.kind == DiskType.FIXED:
        if footer.size > file.size - SECTOR:
            raise damaged(file.path, f"its footer says {footer.size} bytes, before it are {file.size - SECTOR}")
        return VhdLayer(file, DiskType.FIXED, footer.size, footer.id)
    if footer.kind not in (DiskType.DYNAMIC, DiskType.DIFFERENCING):
        raise damaged(file.path, f"its disk type {footer.kind} is none")
    return _with_header(file, footer)


def _footer(file: ImageFile) -> Footer:
    """The one at the end holds: what is at the start of a fixed VHD, a guest has written. The copy at the start is for
    an image whose last block was being added when its writer died."""
    if file.size >= SECTOR:
        found = parse_footer(file.read(file.size - SECTOR, SECTOR))
        if found is not None:
            return found
        found = parse_footer(file.read(0, SECTOR))
        if found is not None and found.kind != DiskType.FIXED:
            return found
    raise damaged(file.path, "it has no footer with a right checksum")


def _with_header(file: ImageFile, footer: Footer) -> VhdLayer:
    header = file.read(footer.table, 1024)
    cookie, _, table, _, entries, block, stored, parent, stamp, _, name = _HEADER.unpack_from(header)
    if cookie != b"cxsparse" or stored != checksum(header, 36):
        raise damaged(file.path, "its dynamic disk header is missing, or has a wrong checksum")
    if not SECTOR <= block <= _MAX_BLOCK or block % SECTOR or not 0 < entries <= _MAX_BLOCKS:
        raise damaged(file.path, "its dynamic disk header has impossible numbers")
    if entries * block < footer.size:
        raise damaged(file.path, "its block table is shorter than the disk")
    if table + entries * 4 > file.size:
        raise damaged(file.path, "its block table is cut off")
    link = None
    if footer.kind == DiskType.DIFFERENCING:
        link = ParentLink((UUID(bytes=parent),), _names(file, header, name), stamp + EPOCH if stamp else None)
    return VhdLayer(file, DiskType(footer.kind), footer.size, footer.id, link, table, block)


def _names(file: ImageFile, header: bytes, name: bytes) -> tuple[str, ...]:
    """The parent's paths, by locator and last by the header's own field (a name only, in big-endian UTF-16)."""
    found: list[tuple[int, str]] = []
    for number in range(_LOCATORS):
        code, _, length, _, at = _LOCATOR.unpack_from(header, _LOCATORS_AT + number * _LOCATOR.size)
        if code in _CODES and 0 < length <= MAX_NAME * 2 and at + length <= file.size:
            text = _decoded(code, file.read(at, length))
            if text:
                found.append((_CODES.index(code), text))
    names = [text for _, text in sorted(found)]
    own = name.decode("utf-16-be", "replace").split("\0")[0]
    return tuple(dict.fromkeys([*names, own] if own else names))


def _decoded(code: bytes, data: bytes) -> str:
    encoding = {b"W2": "utf-16-le", b"Wi": "cp1252"}.get(code[:2], "utf-8")
    return data.decode(encoding, "replace").split("\0")[0].removeprefix("file://localhost").removeprefix("file://")
