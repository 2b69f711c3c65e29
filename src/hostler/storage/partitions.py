"""Partition tables, as far as the question goes who uses the end of a disk: MBR with its logical partitions, and GPT.

Pure functions on bytes; what they need is read by `read`, which the caller gives. UEFI specification 2.10, chapter 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Read = Callable[[int, int], Awaitable[bytes]]
"""Bytes at an offset; fewer at the end of the disk."""

_ENTRY = struct.Struct("<B3xB3xII")
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_MAX_LOGICAL = 128
_MAX_GPT = 1024
_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")
"""Signature, revision, header size, CRC, reserved, this and the other header's LBA, first and last usable LBA, disk id,
LBA of the entries, their number and size, their CRC."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Bytes from the beginning of the disk."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Table:
    """`kind`: "gpt", "mbr", or "" for none. `sector` in bytes, `header`: the valid GPT header, `backup`: offset of what
    a GPT keeps at the end of the disk."""

    kind: str
    partitions: tuple[Partition, ...] = ()
    sector: int = 512
    header: bytes = b""
    backup: int | None = None

    def beyond(self, size: int) -> tuple[Partition, ...]:
        """The partitions that end behind `size`."""
        return tuple(p for p in self.partitions if p.end > size)


async def read_table(read: Read, size: int) -> Table:
    """The partition table of a disk of `size` bytes."""
    first = await read(0, 512)
    if len(first) < 512 or first[510:512] != b"\x55\xaa":
        return Table("")
    entries = [_ENTRY.unpack_from(first, 446 + 16 * n) for n in range(4)]
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        for sector in (512, 4096):
            found = await _gpt(read, sector, size)
            if found is not None:
                return found
    found_mbr: list[Partition] = []
    for number, (status, kind, start, length) in enumerate(entries, 1):
        if status not in (0, 0x80):
            return Table("")  # a boot sector of something else
        if kind and length:
            found_mbr.append(_partition(f"partition {number}", start, length))
            if kind in _EXTENDED:
                found_mbr += await _logical(read, start)
    return Table("mbr" if found_mbr else "", tuple(found_mbr))


def relocated(table: Table, entries: bytes, size: int) -> tuple[int, bytes, bytes]:
    """For a GPT whose disk gets `size` bytes: offset and content of what belongs at its new end (entries and second
    header), and the first header that knows of it."""
    last = size // table.sector - 1
    entries_at = last - len(entries) // table.sector
    old = _GPT.unpack_from(table.header)
    first = _summed(table, {"other": last, "last": entries_at - 1})
    second = _summed(table, {"mine": last, "other": old[5], "last": entries_at - 1, "entries": entries_at})
    return entries_at * table.sector, entries + second.ljust(table.sector, b"\0"), first


def entries_of(table: Table) -> tuple[int, int]:
    """Offset and length of the entries of a GPT, in whole sectors."""
    fields = _GPT.unpack_from(table.header)
    length = fields[11] * fields[12]
    return fields[10] * table.sector, length + -length % table.sector


def _summed(table: Table, changes: dict[str, int]) -> bytes:
    fields = list(_GPT.unpack_from(table.header))
    for name, value in changes.items():
        fields[{"mine": 5, "other": 6, "last": 8, "entries": 10}[name]] = value
    fields[3] = 0
    header = bytearray(table.header)
    header[: _GPT.size] = _GPT.pack(*fields)
    struct.pack_into("<I", header, 16, zlib.crc32(bytes(header)))
    return bytes(header)


async def _gpt(read: Read, sector: int, size: int) -> Table | None:
    block = await read(sector, sector)
    if len(block) < sector or not block.startswith(b"EFI PART"):
        return None
    fields = _GPT.unpack_from(block)
    header_size, stored, mine, other, at, count, length = (*fields[2:4], *fields[5:7], *fields[10:13])
    if not _GPT.size <= header_size <= sector or mine != 1:
        return None
    header = block[:header_size]
    if zlib.crc32(header[:16] + bytes(4) + header[20:]) != stored:
        return None
    if not 0 < count <= _MAX_GPT or length < 128 or length > 4096 or length % 8 or at > size // sector:
        return None
    entries = await read(at * sector, count * length)
    if len(entries) < count * length or zlib.crc32(entries) != fields[13]:
        return None
    partitions = tuple(
        Partition(_name(entries[n * length :], n + 1), start * sector, (last + 1) * sector)
        for n in range(count)
        for start, last in (struct.unpack_from("<QQ", entries, n * length + 32),)
        if any(entries[n * length : n * length + 16])
    )
    space = -(-count * length // sector) + 1
    backup = (other + 1 - space) * sector if other * sector < size else None
    return Table("gpt", partitions, sector, header, backup)


def _name(entry: bytes, number: int) -> str:
    text = entry[56:128].decode("utf-16-le", "replace").split("\0", 1)[0]
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return f"partition {number} ({shown})" if shown else f"partition {number}"


async def _logical(read: Read, extended: int) -> list[Partition]:
    """The chain of logical partitions inside an extended one."""
    found: list[Partition] = []
    at, seen = extended, set[int]()
    while at not in seen and len(seen) < _MAX_LOGICAL:
        seen.add(at)
        block = await read(at * 512, 512)
        if len(block) < 512 or block[510:512] != b"\x55\xaa":
            break
        _, kind, start, length = _ENTRY.unpack_from(block, 446)
        if kind and length:
            found.append(_partition(f"partition {len(found) + 5}", at + start, length))
        _, kind, start, _ = _ENTRY.unpack_from(block, 462)
        if kind not in _EXTENDED:
            break
        at = extended + start
    return found


def _partition(name: str, start: int, length: int) -> Partition:
    return Partition(name, start * 512, (start + length) * 512)
