"""VHDX of all three kinds ([MS-VHDX] version 4), with its log.

The block table has an entry for each block and, after as many blocks as one bitmap block describes (a chunk), an entry
for that bitmap block. Of a partially present block the bitmap says which sectors are in this file; the others are the
parent's. In a bitmap the lowest bit of a byte is its first sector.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from hostler.storage import vhdx as marks
from hostler.storage.chains.layer import MAX_NAME, MAX_NAMES, ParentLink
from hostler.storage.chains.source import ABSENT, ZERO, ImageFile, Piece, bit_runs, damaged
from hostler.storage.chains.vhdx_log import Log, Replayed
from hostler.storage.crc32c import crc32c

MiB = 1024 * 1024
_BAT_REGION = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
_LOGICAL_SECTOR = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F").bytes_le
_DISK_ID = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746").bytes_le
_PARENT_LOCATOR = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C").bytes_le
_LOCATOR_TYPE = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913").bytes_le
_KNOWN_REGIONS = (_BAT_REGION, marks.METADATA_REGION)

_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
"""Signature, checksum, sequence number, ids of file, data and log, versions of log and format, log length, offset."""
_LOCATOR_ENTRY = struct.Struct("<IIHH")
_PATHS = ("relative_path", "absolute_win32_path", "volume_path")
_LINKAGES = ("parent_linkage", "parent_linkage2")

_STATES_ZERO = (1, 2, 3)
"""Undefined, zero, unmapped: [MS-VHDX] 2.5.1.1 lets a reader return zeroes for each, never the parent's data."""
_ABSENT, _PRESENT, _PARTLY = 0, 6, 7
_MAX_DISK = 64 * 1024 * 1024 * MiB
_BITMAP = MiB
"""Bytes of a bitmap block."""
_PAGE = 512
"""Entries of the table looked at together."""


@dataclass(frozen=True, slots=True)
class _Header:
    """Of the two headers the one that holds."""

    data_id: UUID
    log_id: bytes
    log_at: int
    log_length: int


@dataclass(frozen=True, slots=True)
class VhdxLayer:
    """An open VHDX. `table`: offset of the block table; `block`, `sector`: bytes; `chunk`: blocks that one bitmap block
    describes; `id`: what a differencing image knows it by (it changes with each new writer)."""

    file: ImageFile
    content: Replayed
    size: int
    id: UUID
    link: ParentLink | None
    table: int
    block: int
    sector: int
    keeps_blocks: bool

    @property
    def format(self) -> str:
        return "vhdx"

    @property
    def dynamic(self) -> bool:
        return not self.keeps_blocks

    @property
    def log_pending(self) -> bool:
        return self.content.patches is not None

    @property
    def chunk(self) -> int:
        return _BITMAP * 8 * self.sector // self.block

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """As `Layer.pieces`."""
        index, last = start // self.block, -(-end // self.block)
        while index < last:
            # A page ends where its chunk does, since there the bitmap block's own entry comes between.
            count = min(_PAGE, last - index, self.chunk - index % self.chunk)
            table = self.content.read(self.table + (index + index // self.chunk) * 8, count * 8)
            if not any(table):
                low, high = max(start, index * self.block), min(end, (index + count) * self.block)
                yield Piece(low, high - low, ABSENT)
            else:
                yield from self._page(index, table, start, end)
            index += count

    def _page(self, first: int, table: bytes, start: int, end: int) -> Iterator[Piece]:
        entries = array("Q", table)
        if sys.byteorder == "big":
            entries.byteswap()
        for index, entry in enumerate(entries, first):
            low, high = max(start, index * self.block), min(end, (index + 1) * self.block)
            state, data = entry & 7, (entry >> 20) * MiB + low - index * self.block
            if state == _ABSENT:
                yield Piece(low, high - low, ABSENT)
            elif state in _STATES_ZERO:
                yield Piece(low, high - low, ZERO)
            elif state not in (_PRESENT, _PARTLY):
                raise damaged(self.file.path, f"block {index} has the unknown state {state}")
            elif data + high - low > self.file.size:
                raise damaged(self.file.path, f"block {index} lies beyond its end, so data is lost")
            elif state == _PRESENT:
                yield from self.content.split(Piece(low, high - low, data))
            else:
                yield from self._partly(index, low, high, data)

    def _partly(self, index: int, low: int, high: int, data: int) -> Iterator[Piece]:
        if self.link is None:
            raise damaged(self.file.path, f"block {index} is partly a parent's, but there is no parent")
        chunk = index // self.chunk
        entry = int.from_bytes(self.content.read(self.table + (chunk * (self.chunk + 1) + self.chunk) * 8, 8), "little")
        if entry & 7 != _PRESENT:
            raise damaged(self.file.path, f"the bitmap of block {index} is missing")
        # Whole bytes of the bitmap; a block has at least 256 sectors and begins with a byte.
        first = low // self.sector - chunk * self.chunk * (self.block // self.sector)
        last = first + -(-(high - low) // self.sector)
        bitmap = self.content.read((entry >> 20) * MiB + first // 8, -(-last // 8) - first // 8)
        bits = f"{int.from_bytes(bitmap, 'little'):0{len(bitmap) * 8}b}"[::-1]
        skipped = first % 8
        for piece in bit_runs(bits[skipped : skipped + last - first], low, self.sector, data):
            yield from self.content.split(piece) if piece.at >= 0 else (piece,)


def open_vhdx(file: ImageFile) -> VhdxLayer:
    """Read headers, log, regions, metadata. BadImage."""
    if file.read(0, 8) != marks.SIGNATURE:
        raise damaged(file.path, "it does not begin as a VHDX")
    header = _header(file)
    patches = None
    if any(header.log_id):
        patches = Log(file, header.log_at, header.log_length, header.log_id).replay()
    content = Replayed(file, patches)
    table, length = _region(content, _BAT_REGION)
    region, _ = _region(content, marks.METADATA_REGION)
    metadata = content.read(region, 64 * 1024)
    block, flags = struct.unpack("<II", _item(content, metadata, region, marks.FILE_PARAMETERS, 8))
    (size,) = struct.unpack("<Q", _item(content, metadata, region, marks.VIRTUAL_DISK_SIZE, 8))
    (sector,) = struct.unpack("<I", _item(content, metadata, region, _LOGICAL_SECTOR, 4))
    _check(file, size, block, sector)
    link = _link(content, metadata, region) if flags & marks.HAS_PARENT else None
    layer = VhdxLayer(file, content, size, header.data_id, link, table, block, sector, bool(flags & 1))
    if _entries(layer) * 8 > length:
        raise damaged(file.path, "its block table is shorter than the disk")
    return layer


def _check(file: ImageFile, size: int, block: int, sector: int) -> None:
    """[MS-VHDX] 2.6.2: what the metadata may say."""
    if sector not in (512, 4096) or not MiB <= block <= 256 * MiB or block & (block - 1):
        raise damaged(file.path, f"blocks of {block} and sectors of {sector} bytes are impossible")
    if not 0 < size <= _MAX_DISK or size % sector:
        raise damaged(file.path, f"its size of {size} bytes is impossible")


def _entries(layer: VhdxLayer) -> int:
    """Entries of the block table, those of bitmap blocks included ([MS-VHDX] 2.5)."""
    blocks = -(-layer.size // layer.block)
    if layer.link is not None:
        return -(-blocks // layer.chunk) * (layer.chunk + 1)
    return blocks + (blocks - 1) // layer.chunk


def _header(file: ImageFile) -> _Header:
    found: list[tuple[int, _Header]] = []
    for at in marks.HEADERS_AT:
        if file.size < at + marks.HEADER:
            continue
        block = file.read(at, marks.HEADER)
        if not marks.is_header(block):
            continue
        _, _, sequence, _, data, log, log_version, version, length, log_at = _HEADER.unpack_from(block)
        if version != 1 or log_version != 0:
            raise damaged(file.path, f"its version {version} (log {log_version}) is unknown")
        found.append((sequence, _Header(UUID(bytes_le=data), log, log_at, length)))
    if not found:
        raise damaged(file.path, "neither of its headers is valid")
    return max(found, key=lambda one: one[0])[1]


def _region(content: Replayed, wanted: bytes) -> tuple[int, int]:
    """Offset and length of a region; an unknown region that a reader must know is a refusal."""
    for at in marks.REGIONS_AT:
        table = content.read(at, 64 * 1024)
        if table[:4] != b"regi" or crc32c(table[:4] + bytes(4) + table[8:]) != int.from_bytes(table[4:8], "little"):
            continue
        for entry in marks.entries(table, 16):
            if table[entry + 28] & 1 and table[entry : entry + 16] not in _KNOWN_REGIONS:
                raise damaged(content.file.path, "it has a region of an unknown kind")
        found = marks.find(table, b"regi", 16, wanted, "<QI")
        if found is not None:
            return found[0], found[1]
    raise damaged(content.file.path, "it has no valid region table")


def _item(content: Replayed, metadata: bytes, region: int, wanted: bytes, least: int) -> bytes:
    found = marks.find(metadata, b"metadata", 32, wanted, "<II")
    if found is None or not least <= found[1] <= MiB:
        raise damaged(content.file.path, "its metadata lacks something that it must have")
    return content.read(region + found[0], found[1])[: least if least < 64 else None]


def _link(content: Replayed, metadata: bytes, region: int) -> ParentLink:
    found = marks.find(metadata, b"metadata", 32, _PARENT_LOCATOR, "<II")
    if found is None or not 20 <= found[1] <= MiB:
        raise damaged(content.file.path, "it has a parent but does not say which")
    locator = content.read(region + found[0], found[1])
    if locator[:16] != _LOCATOR_TYPE:
        raise damaged(content.file.path, "its parent is of an unknown kind")
    values = _values(locator)
    ids = [_guid(values[key]) for key in _LINKAGES if key in values]
    names = [values[key] for key in _PATHS if values.get(key)]
    return ParentLink(tuple(id for id in ids if id is not None), tuple(names))


def _values(locator: bytes) -> dict[str, str]:
    (count,) = struct.unpack_from("<H", locator, 18)
    values: dict[str, str] = {}
    for number in range(min(count, MAX_NAMES)):
        at = 20 + number * _LOCATOR_ENTRY.size
        if at + _LOCATOR_ENTRY.size > len(locator):
            break
        key_at, value_at, key_length, value_length = _LOCATOR_ENTRY.unpack_from(locator, at)
        key = locator[key_at : key_at + key_length].decode("utf-16-le", "replace")
        value = locator[value_at : value_at + value_length].decode("utf-16-le", "replace")
        values[key] = value.split("\0")[0][:MAX_NAME]
    return values


def _guid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def is_vhdx(fd: int) -> bool:
    """By its first bytes."""
    return os.pread(fd, 8, 0) == marks.SIGNATURE
