"""VHD images as Hyper-V makes them, written from the specification: no program on Linux makes differencing ones.

Written apart from `hostler.storage`, which reads them, so that one mistake is not made twice. Small images only: a
block is built in memory.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

SECTOR = 512
EPOCH = 946_684_800
"""2000-01-01 in Unix seconds."""


def footer(kind: int, size: int, id: uuid.UUID, header_at: int) -> bytes:
    """512 bytes; `kind` 2 fixed, 3 dynamic, 4 differencing."""
    geometry = struct.pack(">HBB", min(65535, size // SECTOR // 16 // 63), 16, 63)
    head = struct.pack(
        ">8sIIQI4sI4sQQ4sI",
        b"conectix",
        2,
        0x10000,
        header_at,
        0,
        b"win ",
        0x60001,
        b"Wi2k",
        size,
        size,
        geometry,
        kind,
    )
    tail = id.bytes + b"\0"
    block = bytearray((head + b"\0\0\0\0" + tail).ljust(SECTOR, b"\0"))
    block[64:68] = struct.pack(">I", ~sum(block) & 0xFFFFFFFF)
    return bytes(block)


def fixed(path: Path, content: bytes, id: uuid.UUID | None = None) -> uuid.UUID:
    """A fixed VHD; returns its id."""
    id = id or uuid.uuid4()
    path.write_bytes(content + footer(2, len(content), id, 0xFFFFFFFFFFFFFFFF))
    return id


def dynamic(
    path: Path, size: int, sectors: Mapping[int, bytes], block: int = 2 * 1024 * 1024, id: uuid.UUID | None = None
) -> uuid.UUID:
    """A dynamic VHD with these sectors (number to 512 bytes); returns its id."""
    return _write(path, size, sectors, block, id or uuid.uuid4(), None, {})


def differencing(
    path: Path,
    size: int,
    sectors: Mapping[int, bytes],
    parent: tuple[uuid.UUID, Path],
    *,
    names: Mapping[bytes, str] | None = None,
    stamp: int | None = None,
    block: int = 2 * 1024 * 1024,
    id: uuid.UUID | None = None,
) -> uuid.UUID:
    r"""A differencing VHD over `parent` (its id and file); returns its id. `names`: locator code to path; without it
    the relative `.\NAME` and an absolute one on drive C, as Hyper-V writes."""
    file = parent[1]
    given = {b"W2ru": f".\\{file.name}", b"W2ku": f"C:\\VMs\\{file.name}"} if names is None else names
    if stamp is None:
        stamp = int(file.stat().st_mtime) - EPOCH
    return _write(path, size, sectors, block, id or uuid.uuid4(), (parent[0], stamp, file.name), given)


def _write(
    path: Path,
    size: int,
    sectors: Mapping[int, bytes],
    block: int,
    id: uuid.UUID,
    parent: tuple[uuid.UUID, int, str] | None,
    names: Mapping[bytes, str],
) -> uuid.UUID:
    blocks = -(-size // block)
    table_at = 512 + 1024
    table_length = -(-blocks * 4 // SECTOR) * SECTOR
    at = table_at + table_length
    locators, spaces = b"", b""
    for code, name in names.items():
        data = name.encode("utf-16-le")
        room = -(-len(data) // SECTOR) * SECTOR
        locators += struct.pack(">4sIIIQ", code, room, len(data), 0, at + len(spaces))
        spaces += data.ljust(room, b"\0")
    at += len(spaces)
    table = [0xFFFFFFFF] * blocks
    body = bytearray()
    per_block = block // SECTOR
    for number in sorted({sector // per_block for sector in sectors}):
        table[number] = (at + len(body)) // SECTOR
        own = {s - number * per_block: data for s, data in sectors.items() if s // per_block == number}
        body += _block(own, per_block)
    kind = 3 if parent is None else 4
    edge = footer(kind, size, id, 512)
    header = _header(blocks, block, table_at, parent, locators)
    packed = struct.pack(f">{blocks}I", *table).ljust(table_length, b"\xff")
    path.write_bytes(edge + header + packed + spaces + bytes(body) + edge)
    return id


def _block(own: Mapping[int, bytes], per_block: int) -> bytes:
    """Bitmap and data; the highest bit of a byte is its first sector."""
    bitmap = bytearray(-(-(per_block // 8) // SECTOR) * SECTOR)
    data = bytearray(per_block * SECTOR)
    for sector, content in own.items():
        bitmap[sector // 8] |= 0x80 >> sector % 8
        data[sector * SECTOR : (sector + 1) * SECTOR] = content
    return bytes(bitmap + data)


def _header(
    blocks: int, block: int, table_at: int, parent: tuple[uuid.UUID, int, str] | None, locators: bytes
) -> bytes:
    head = bytearray(1024)
    struct.pack_into(">8sQQIII", head, 0, b"cxsparse", 0xFFFFFFFFFFFFFFFF, table_at, 0x10000, blocks, block)
    if parent is not None:
        head[40:56] = parent[0].bytes
        struct.pack_into(">I", head, 56, parent[1] & 0xFFFFFFFF)
        name = parent[2].encode("utf-16-be")
        head[64 : 64 + len(name)] = name
        head[576 : 576 + len(locators)] = locators
    head[36:40] = struct.pack(">I", ~sum(head) & 0xFFFFFFFF)
    return bytes(head)


def id_of(path: Path) -> uuid.UUID:
    """The id in a VHD's footer, also of one that QEMU made."""
    with path.open("rb") as file:
        file.seek(-SECTOR, os.SEEK_END)
        return uuid.UUID(bytes=file.read(SECTOR)[68:84])
