"""The VHD footer and dynamic header (Microsoft's "Virtual Hard Disk Image Format Specification", October 2006).

Own and small, because QEMU's `vpc` driver recognises a VHD by its first sector only: it takes a fixed VHD, whose one
mark is its last sector, for raw, and tells a differencing one from a dynamic one by failing.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from hostler.model.errors import BadImage

SECTOR = 512
COOKIE = b"conectix"

_FOOTER = struct.Struct(">8sIIQI4sI4sQQIII16sB")
_HEADER = struct.Struct(">8sQQIIII")
_MAX_BAT = 4 * 1024 * 1024
"""Entries of the largest allocation table we read: 2 TiB in 512 KiB blocks. The usual block is 2 MiB."""


class DiskType(IntEnum):
    """The footer's "Disk Type" field."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Footer:
    """What a footer with a right checksum says. `size` in bytes; `table` is the offset of the dynamic header; `id` is
    what a differencing VHD knows its parent by."""

    kind: int
    size: int
    table: int
    id: uuid.UUID


def checksum(block: bytes, at: int) -> int:
    """The format's checksum: one's complement of the sum of all bytes, the field itself (4 bytes at `at`) left out."""
    return ~(sum(block) - sum(block[at : at + 4])) & 0xFFFFFFFF


def parse_footer(block: bytes) -> Footer | None:
    """The footer in a 512-byte block; None when it is none or its checksum is wrong."""
    if len(block) < SECTOR or not block.startswith(COOKIE):
        return None
    fields = _FOOTER.unpack_from(block)
    if fields[12] != checksum(block[:SECTOR], 64):
        return None
    return Footer(kind=fields[11], size=fields[9], table=fields[3], id=uuid.UUID(bytes=fields[13]))


def make_footer(kind: DiskType, size: int, id: uuid.UUID) -> bytes:
    """A footer. Its creator is given as Hyper-V's: for creators that it does not know, QEMU takes the size of the disk
    from cylinders, heads and sectors, which cannot say every size."""
    geometry = _geometry(size // SECTOR)
    table = 2**64 - 1 if kind is DiskType.FIXED else SECTOR
    fields = (COOKIE, 2, 0x10000, table, 0, b"win ", 0x60001, b"Wi2k", size, size)
    block = bytearray(struct.pack(">8sIIQI4sI4sQQ", *fields) + geometry + struct.pack(">II16s", kind, 0, id.bytes))
    block += bytes(SECTOR - len(block))
    struct.pack_into(">I", block, 64, checksum(bytes(block), 64))
    return bytes(block)


def make_header(table: int, entries: int, block_size: int) -> bytes:
    """The header of a dynamic VHD without a parent, whose block table is at `table`."""
    header = bytearray(1024)
    struct.pack_into(">8sQQIII", header, 0, b"cxsparse", 2**64 - 1, table, 0x10000, entries, block_size)
    struct.pack_into(">I", header, 36, checksum(bytes(header), 36))
    return bytes(header)


def _geometry(sectors: int) -> bytes:
    """Cylinders, heads and sectors by the algorithm of the specification's appendix."""
    total = min(sectors, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return struct.pack(">HBB", total // 255 // 16, 16, 255)
    per_track, heads = 17, max(4, -(-(total // 17) // 1024))
    if total // 17 >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
    if total // per_track >= heads * 1024:
        per_track, heads = 63, 16
    return struct.pack(">HBB", total // per_track // heads, heads, per_track)


def check_blocks(fd: int, path: str, footer: Footer) -> None:
    """For a dynamic VHD: its header is sound and every block lies inside the file; BadImage otherwise.

    This is what finds a truncated copy: QEMU opens one without a word and fails when the guest reads the lost part.
    """
    header = os.pread(fd, 1024, footer.table)
    if len(header) < 1024 or not header.startswith(b"cxsparse"):
        raise _damaged(path, "its dynamic disk header is missing")
    _, _, bat, _, entries, block_size, stored = _HEADER.unpack_from(header)
    if stored != checksum(header, 36):
        raise _damaged(path, "the checksum of its dynamic disk header is wrong")
    if block_size < SECTOR or block_size % SECTOR or not 0 < entries <= _MAX_BAT:
        raise _damaged(path, "its dynamic disk header has impossible numbers")
    if entries * block_size < footer.size:
        raise _damaged(path, "its allocation table is shorter than the disk")
    end = os.fstat(fd).st_size
    bitmap = -(-(block_size // SECTOR // 8) // SECTOR) * SECTOR
    last = max((sector for sector in _allocated(fd, path, bat, entries)), default=0)
    if last and last * SECTOR + bitmap + block_size > end:
        raise _damaged(path, "it is shorter than its allocation table says, so data at its end is lost")


def _allocated(fd: int, path: str, offset: int, entries: int) -> Iterator[int]:
    """Sector numbers of the blocks that are there, read in pieces of 64 KiB entries."""
    step = 65_536
    for start in range(0, entries, step):
        count = min(step, entries - start)
        if offset + (start + count) * 4 >= 2**63:
            raise _damaged(path, "its allocation table is at an impossible place")
        piece = os.pread(fd, count * 4, offset + start * 4)
        if len(piece) < count * 4:
            raise _damaged(path, "its allocation table is cut off")
        yield from (sector for sector in struct.unpack(f">{count}I", piece) if sector != 0xFFFFFFFF)


def _damaged(path: str, cause: str) -> BadImage:
    return BadImage(f"image {path}", f"the VHD is damaged: {cause}", "restore it from a backup")
