"""Another size for a VHD, in place (Microsoft's "Virtual Hard Disk Image Format Specification", October 2006).

Whatever kills the process, the image is the old or the new one: each step leaves a valid image, and the last but one is
a single sector. `old` is the size before the first attempt, so that an interrupted change is finished by repeating it.

    fixed, larger:    footer at the new end | zeroes over the old one
    fixed, smaller:   footer at the new end | the file is cut behind it
    dynamic, larger:  longer block table behind the file, old footer behind that | header points at it | both footers
    dynamic, smaller: both footers | blocks behind the end are taken out of the table
"""

from __future__ import annotations

import os
import struct

from hostler.model.errors import BadImage
from hostler.storage.chains.source import ImageFile
from hostler.storage.chains.vhd import VhdLayer, bitmap_size, open_vhd
from hostler.storage.footer import SECTOR, DiskType, Footer, checksum, parse_footer

_CHECKSUM_AT, _HEADER_CHECKSUM_AT = 64, 36
_UNUSED = 0xFFFFFFFF
_EXACT = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")
"""Creators whose VHDs QEMU's vpc driver (block/vpc.c) gives the size of the footer; of others it takes cylinders x
heads x sectors, which cannot say every size."""


def resize_vhd(path: str, old: int, new: int) -> None:
    """Make a VHD that had `old` bytes one of `new` (whole sectors). What lies behind a smaller size is lost. Blocking;
    durable when it returns. BadImage; OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        layer = open_vhd(ImageFile.of(fd, path))
        if layer.kind is DiskType.FIXED:
            _resize_fixed(fd, path, old, new)
        elif layer.kind is DiskType.DYNAMIC:
            _resize_dynamic(fd, layer, old, new)
        else:
            raise BadImage(f"image {path}", "holds the changes to a parent only", "flatten its chain first")
    finally:
        os.close(fd)


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors per track for a size in bytes (the specification's appendix "CHS Calculation")."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    sectors = 17
    heads = max(4, -(-(total // sectors) // 1024))
    if total // sectors >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
    if total // sectors >= heads * 1024:
        sectors, heads = 63, 16
    return total // sectors // heads, heads, sectors


def resized(footer: bytes, size: int) -> bytes:
    """A footer that says another size, also in "Original Size": the specification has it for information only, but
    there are readers that take it for the size (libvhdi)."""
    changed = bytearray(footer)
    if changed[28:32] not in _EXACT:
        changed[28:32] = b"qem2"
    struct.pack_into(">QQ", changed, 40, size, size)
    struct.pack_into(">HBB", changed, 56, *geometry(size))
    return summed(changed, _CHECKSUM_AT)


def summed(block: bytes | bytearray, at: int) -> bytes:
    """The block with its checksum put right."""
    changed = bytearray(block)
    struct.pack_into(">I", changed, at, checksum(bytes(changed), at))
    return bytes(changed)


def _resize_fixed(fd: int, path: str, old: int, new: int) -> None:
    footer = os.pread(fd, SECTOR, os.fstat(fd).st_size - SECTOR)
    if parse_footer(footer) is None:
        raise BadImage(f"image {path}", "has lost its footer", "restore it from a backup")
    _write(fd, resized(footer, new), new)
    os.fsync(fd)
    if new < old:
        os.ftruncate(fd, new + SECTOR)
    elif _is_old_footer(parse_footer(os.pread(fd, SECTOR, old)), old):
        _write(fd, bytes(SECTOR), old)
    os.fsync(fd)


def _is_old_footer(found: Footer | None, size: int) -> bool:
    return found is not None and found.kind == DiskType.FIXED and found.size == size


def _resize_dynamic(fd: int, layer: VhdLayer, old: int, new: int) -> None:
    head = os.pread(fd, SECTOR, 0)
    footer = parse_footer(head)
    if footer is None:
        raise BadImage(f"image {layer.file.path}", "its header's copy of the footer is damaged", "repair it first")
    header = os.pread(fd, 1024, footer.table)
    (entries,) = struct.unpack_from(">I", header, 28)
    needed = -(-new // layer.block)
    if new > old:
        _clear_end_of_block(fd, layer, old)
        _drop_blocks(fd, layer, -(-old // layer.block), min(needed, entries))
        if needed > entries:
            _longer_table(fd, layer, footer, header, entries, needed)
    _write_footers(fd, resized(head, new))
    if new < old:
        _drop_blocks(fd, layer, needed, entries)
        _clear_end_of_block(fd, layer, new)
        os.fsync(fd)


def _longer_table(fd: int, layer: VhdLayer, footer: Footer, header: bytes, entries: int, needed: int) -> None:
    """The table goes behind the file, where it fits; the header then points at it."""
    end = os.fstat(fd).st_size
    at = end + -end % SECTOR
    length = needed * 4 + -(needed * 4) % SECTOR
    table = os.pread(fd, entries * 4, layer.table)
    if len(table) < entries * 4:
        raise BadImage(f"image {layer.file.path}", "its block table is cut off", "restore it from a backup")
    _write(fd, os.pread(fd, SECTOR, 0), at + length)
    _write(fd, table + b"\xff" * (length - len(table)), at)
    os.fsync(fd)
    changed = bytearray(header)
    struct.pack_into(">Q", changed, 16, at)
    struct.pack_into(">I", changed, 28, needed)
    # Everything that changes is in the header's first sector, which a disk writes whole or not at all.
    _write(fd, summed(changed, _HEADER_CHECKSUM_AT)[:SECTOR], footer.table)
    os.fsync(fd)


def _write_footers(fd: int, footer: bytes) -> None:
    """First the one at the end, which Hyper-V and our reader believe, then its copy, which QEMU does."""
    end = os.fstat(fd).st_size
    at = end - SECTOR if parse_footer(os.pread(fd, SECTOR, end - SECTOR)) is not None else end + -end % SECTOR
    _write(fd, footer, at)
    os.fsync(fd)
    _write(fd, footer, 0)
    os.fsync(fd)


def _drop_blocks(fd: int, layer: VhdLayer, first: int, end: int) -> None:
    if end > first:
        _write(fd, b"\xff" * ((end - first) * 4), layer.table + first * 4)
        os.fsync(fd)


def _clear_end_of_block(fd: int, layer: VhdLayer, size: int) -> None:
    """Zeroes behind `size` in its last block: what a later, larger size shows there must be nothing old."""
    within = size % layer.block
    if not within:
        return
    entry = os.pread(fd, 4, layer.table + size // layer.block * 4)
    sector = struct.unpack(">I", entry)[0] if len(entry) == 4 else _UNUSED
    if sector != _UNUSED:
        at = sector * SECTOR + bitmap_size(layer.block)
        _write(fd, bytes(layer.block - within), at + within)


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
