"""What Hostler reads of a VHDX itself ([MS-VHDX] version 4): virtual size, and whether it builds on a parent."""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass

from hostler.model.errors import BadImage

SIGNATURE = b"vhdxfile"

_HEADERS_AT = (64 * 1024, 128 * 1024)
"""The header and its other: one is written at a time, so that the other holds whenever a writer dies."""
_HEADER = 4096
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
    """Look for a valid header, read region and metadata table; BadImage when they are not there."""
    if not any(_is_header(_read(fd, at, _HEADER)) for at in _HEADERS_AT):
        raise _damaged(path, "neither of its headers is valid")
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


def _is_header(header: bytes) -> bool:
    """[MS-VHDX] 2.2.2: signature, then the CRC-32C of the whole with that field as 0."""
    if len(header) < _HEADER or not header.startswith(b"head"):
        return False
    return _crc32c(header[:4] + bytes(4) + header[8:]) == int.from_bytes(header[4:8], "little")


def _crc32c(data: bytes) -> int:
    """Castagnoli's CRC (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_OF_BYTE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_OF_BYTE = tuple(_crc_of_byte(value) for value in range(256))


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
