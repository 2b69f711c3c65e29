"""What Hostler reads of a VHDX itself ([MS-VHDX] version 4): virtual size, and whether it builds on a parent."""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass

from hostler.model.errors import BadImage

SIGNATURE = b"vhdxfile"

_REGIONS_AT = (192 * 1024, 256 * 1024)
"""The region table and its copy."""
_METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
_VIRTUAL_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
_ENTRY = 32
_MAX_ENTRIES = 2047
"""The specification's bound for both tables."""
_HAS_PARENT = 0x2


@dataclass(frozen=True, slots=True)
class Vhdx:
    """`size` in bytes."""

    size: int
    has_parent: bool


def parse(fd: int, path: str) -> Vhdx:
    """Read region and metadata table; BadImage when they are not there."""
    for at in _REGIONS_AT:
        found = _find(_read(fd, at, 64 * 1024), b"regi", 16, _METADATA_REGION, "<QI")
        if found is not None:
            return _metadata(fd, path, found[0])
    raise _damaged(path, "it has no region table that names its metadata")


def _metadata(fd: int, path: str, region: int) -> Vhdx:
    table = _read(fd, region, 64 * 1024)
    parameters = _find(table, b"metadata", 32, _FILE_PARAMETERS, "<II")
    size = _find(table, b"metadata", 32, _VIRTUAL_DISK_SIZE, "<II")
    if parameters is None or size is None:
        raise _damaged(path, "its metadata lacks the disk's parameters or size")
    flags = _read(fd, region + parameters[0], 8)
    number = _read(fd, region + size[0], 8)
    if len(flags) < 8 or len(number) < 8:
        raise _damaged(path, "its metadata is cut off")
    return Vhdx(size=int.from_bytes(number, "little"), has_parent=bool(struct.unpack("<II", flags)[1] & _HAS_PARENT))


def _find(table: bytes, signature: bytes, first: int, wanted: bytes, numbers: str) -> tuple[int, ...] | None:
    """The numbers after the GUID `wanted` in a table of 32-byte entries. The count stands at 8 (regions, 32 bits) or
    10 (metadata, 16 bits)."""
    if not table.startswith(signature) or len(table) < first:
        return None
    counted = struct.unpack_from("<I", table, 8)[0] if first == 16 else struct.unpack_from("<H", table, 10)[0]
    for index in range(min(counted, _MAX_ENTRIES)):
        at = first + index * _ENTRY
        if table[at : at + 16] == wanted and len(table) >= at + _ENTRY:
            return struct.unpack_from(numbers, table, at + 16)
    return None


def _read(fd: int, at: int, length: int) -> bytes:
    return os.pread(fd, length, at) if 0 <= at < 2**62 else b""


def _damaged(path: str, cause: str) -> BadImage:
    return BadImage(f"image {path}", f"the VHDX is damaged: {cause}", "restore it from a backup")
