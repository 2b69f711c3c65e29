"""A first look at a VHDX ([MS-VHDX] version 4): virtual size, and whether it builds on a parent.

The places and marks of the format are here; all of an image, with its log and its blocks, is read by `chains.vhdx`.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from hostler.model.errors import BadImage
from hostler.storage.crc32c import crc32c

SIGNATURE = b"vhdxfile"

HEADERS_AT = (64 * 1024, 128 * 1024)
"""The header and its other: one is written at a time, so that the other holds whenever a writer dies."""
HEADER = 4096
REGIONS_AT = (192 * 1024, 256 * 1024)
"""The region table and its copy."""
METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
VIRTUAL_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
_ENTRY = 32
_MAX_ENTRIES = 2047
"""The specification's bound for both tables."""
HAS_PARENT = 0x2


@dataclass(frozen=True, slots=True)
class Vhdx:
    """`size` in bytes."""

    size: int
    has_parent: bool


def parse(fd: int, path: str) -> Vhdx:
    """Look for a valid header, read region and metadata table; BadImage when they are not there."""
    if not any(is_header(_read(fd, at, HEADER)) for at in HEADERS_AT):
        raise damaged(path, "neither of its headers is valid")
    for at in REGIONS_AT:
        found = find(_read(fd, at, 64 * 1024), b"regi", 16, METADATA_REGION, "<QI")
        if found is not None:
            return _metadata(fd, path, found[0])
    raise damaged(path, "it has no region table that names its metadata")


def _metadata(fd: int, path: str, region: int) -> Vhdx:
    table = _read(fd, region, 64 * 1024)
    parameters = find(table, b"metadata", 32, FILE_PARAMETERS, "<II")
    size = find(table, b"metadata", 32, VIRTUAL_DISK_SIZE, "<II")
    if parameters is None or size is None:
        raise damaged(path, "its metadata lacks the disk's parameters or size")
    flags = _read(fd, region + parameters[0], 8)
    number = _read(fd, region + size[0], 8)
    if len(flags) < 8 or len(number) < 8:
        raise damaged(path, "its metadata is cut off")
    return Vhdx(size=int.from_bytes(number, "little"), has_parent=bool(struct.unpack("<II", flags)[1] & HAS_PARENT))


def is_header(header: bytes) -> bool:
    """[MS-VHDX] 2.2.2: signature, then the CRC-32C of the whole with that field as 0."""
    if len(header) < HEADER or not header.startswith(b"head"):
        return False
    return crc32c(header[:4] + bytes(4) + header[8:]) == int.from_bytes(header[4:8], "little")


def find(table: bytes, signature: bytes, first: int, wanted: bytes, numbers: str) -> tuple[int, ...] | None:
    """The numbers after the GUID `wanted` in a table of 32-byte entries that begins at `first`."""
    if not table.startswith(signature) or len(table) < first:
        return None
    for at in entries(table, first):
        if table[at : at + 16] == wanted:
            return struct.unpack_from(numbers, table, at + 16)
    return None


def entries(table: bytes, first: int) -> Sequence[int]:
    """Where the entries of a table are. The count stands at 8 (regions, 32 bits) or 10 (metadata, 16 bits)."""
    counted = struct.unpack_from("<I", table, 8)[0] if first == 16 else struct.unpack_from("<H", table, 10)[0]
    room = max(0, len(table) - first) // _ENTRY
    return [first + index * _ENTRY for index in range(min(counted, _MAX_ENTRIES, room))]


def _read(fd: int, at: int, length: int) -> bytes:
    return os.pread(fd, length, at) if 0 <= at < 2**62 else b""


def damaged(path: str, cause: str) -> BadImage:
    return BadImage(f"image {path}", f"the VHDX is damaged: {cause}", "restore it from a backup")
