"""Another size for a VHDX, in place ([MS-VHDX] version 4), as far as its block table has room.

The size is one number in the metadata, within one sector: whatever kills the process, it is the old or the new one. The
entries of the table that a larger size brings are emptied before it is written, those behind a smaller one after it;
neither is read with the size the image has then, so that they need no log.
"""

from __future__ import annotations

import os
import struct
import uuid

from hostler.model.errors import BadImage
from hostler.storage import vhdx as marks
from hostler.storage.chains.source import ImageFile
from hostler.storage.chains.vhdx import VhdxLayer, open_vhdx
from hostler.storage.crc32c import crc32c
from hostler.storage.qemu_img import LOG_PENDING, LogPending

_BAT_REGION = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
_PRESENT = 6
_MiB = 1024 * 1024
_FILE_ID, _DATA_ID = slice(16, 32), slice(32, 48)


def has_room(path: str, size: int) -> bool:
    """Whether the block table of this image can describe `size` bytes. Blocking. BadImage, LogPending."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        layer = _open(fd, path)
        return _entries(layer, size) * 8 <= _table_length(fd, path)
    finally:
        os.close(fd)


def resize_vhdx(path: str, new: int) -> None:
    """Make the disk `new` bytes large (whole sectors). What lies behind a smaller size is lost. Repeating it is
    harmless. Blocking; durable when it returns. BadImage (no room: see `has_room`), LogPending; OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        layer = _open(fd, path)
        old, room = layer.size, _table_length(fd, path) // 8
        if new % layer.sector:
            raise BadImage(f"image {path}", f"has sectors of {layer.sector} bytes", "give a size of whole sectors")
        if _entries(layer, new) > room:
            raise BadImage(f"image {path}", "its block table has no room for that size", "convert it")
        _new_writer(fd, path)
        smaller, larger = sorted((_entries(layer, old), _entries(layer, new)))
        if new > old:  # entries behind the old end are nobody's, and may hold anything
            _clear_end_of_block(fd, layer, old)
            _empty(fd, layer, smaller, larger)
        _write(fd, struct.pack("<Q", new), _size_at(fd, path))
        os.fsync(fd)
        if new < old:
            _empty(fd, layer, smaller, larger)
            _clear_end_of_block(fd, layer, new)
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(fd: int, path: str) -> VhdxLayer:
    layer = open_vhdx(ImageFile.of(fd, path))
    if layer.link is not None:
        raise BadImage(f"image {path}", "holds the changes to a parent only", "flatten its chain first")
    if layer.log_pending:
        raise LogPending(f"image {path}", *LOG_PENDING)
    return layer


def _entries(layer: VhdxLayer, size: int) -> int:
    """[MS-VHDX] 2.5: one for each block, and one for a bitmap after each chunk of blocks."""
    blocks = -(-size // layer.block)
    return blocks + (blocks - 1) // layer.chunk


def _region(fd: int, path: str, wanted: bytes) -> tuple[int, int]:
    for at in marks.REGIONS_AT:
        found = marks.find(os.pread(fd, 64 * 1024, at), b"regi", 16, wanted, "<QI")
        if found is not None:
            return found[0], found[1]
    raise marks.damaged(path, "it has no region table that names its parts")


def _table_length(fd: int, path: str) -> int:
    return _region(fd, path, _BAT_REGION)[1]


def _size_at(fd: int, path: str) -> int:
    region, _ = _region(fd, path, marks.METADATA_REGION)
    found = marks.find(os.pread(fd, 64 * 1024, region), b"metadata", 32, marks.VIRTUAL_DISK_SIZE, "<II")
    if found is None:
        raise marks.damaged(path, "its metadata lacks the disk's size")
    return region + found[0]


def _new_writer(fd: int, path: str) -> None:
    """A header that says that file and content change ([MS-VHDX] 2.2.2): in the place of the older of the two, so that
    one is valid at any moment."""
    headers = {at: os.pread(fd, marks.HEADER, at) for at in marks.HEADERS_AT}
    valid = {at: int.from_bytes(h[8:16], "little") for at, h in headers.items() if marks.is_header(h)}
    if not valid:
        raise marks.damaged(path, "neither of its headers is valid")
    newest = max(valid, key=lambda at: valid[at])
    target = next(at for at in marks.HEADERS_AT if at != newest)
    header = bytearray(headers[newest])
    header[8:16] = (valid[newest] + 1).to_bytes(8, "little")
    header[_FILE_ID], header[_DATA_ID] = uuid.uuid4().bytes_le, uuid.uuid4().bytes_le
    header[4:8] = bytes(4)
    header[4:8] = crc32c(bytes(header)).to_bytes(4, "little")
    _write(fd, bytes(header), target)
    os.fsync(fd)


def _empty(fd: int, layer: VhdxLayer, first: int, end: int) -> None:
    if end > first:
        _write(fd, bytes((end - first) * 8), layer.table + first * 8)
        os.fsync(fd)


def _clear_end_of_block(fd: int, layer: VhdxLayer, size: int) -> None:
    """Zeroes behind `size` in its last block: what a later, larger size shows there must be nothing old."""
    within, index = size % layer.block, size // layer.block
    if not within:
        return
    entry = int.from_bytes(os.pread(fd, 8, layer.table + (index + index // layer.chunk) * 8), "little")
    if entry & 7 == _PRESENT:
        _write(fd, bytes(layer.block - within), (entry >> 20) * _MiB + within)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
