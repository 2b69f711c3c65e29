"""Copies that share their blocks with the original until one of the two is written (reflink: btrfs, XFS, some shares).

Only for images whose copy is byte for byte what a conversion would make of them: raw ones, and qcow2 without snapshots,
bitmaps or a backing file. VHD and VHDX carry an identity of their own, and get a new one by being converted.
"""

from __future__ import annotations

import fcntl
import os
import struct

from hostler.model.disk import ImageFormat
from hostler.storage.files import open_regular
from hostler.storage.formats import Shape
from hostler.storage.pools import filesystem
from hostler.storage.qemu_img import new_file
from hostler.storage.waiting import in_thread

_WRITERS = (101, 103)
"""Bytes on which QEMU keeps a lock while it may write or resize an image (RAW_LOCK_PERM_BASE 100, plus the numbers of
BLK_PERM_WRITE and BLK_PERM_RESIZE; block/file-posix.c)."""
_F_OFD_GETLK = 36
_FLOCK = "hhqqi4x"


class _NotHere(Exception):
    """The file system cannot, or somebody may write the original."""


async def cloned(source: str, shape: Shape, path: str, format: ImageFormat, size: int) -> bool:
    """Make the new image `path` of `size` bytes share the blocks of `source`; False, with nothing made, where that
    cannot be. Errors as `QemuImg.create`."""
    if format is not shape.format or size != shape.size or format not in (ImageFormat.RAW, ImageFormat.QCOW2):
        return False
    try:
        async with new_file(path) as part:
            await in_thread(f"image {path}", lambda: _clone(source, part, format))
    except _NotHere:
        return False
    return True


def _clone(source: str, part: str, format: ImageFormat) -> None:
    original = open_regular(source)
    try:
        copy = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            plain = format is ImageFormat.RAW or _is_plain(original)
            if not plain or _is_written(original) or not filesystem.clone(original, copy) or _is_written(original):
                raise _NotHere
        finally:
            os.close(copy)
    finally:
        os.close(original)


def _is_written(fd: int) -> bool:
    """Whether a QEMU (or a tool of it) has the file open for writing."""
    for byte in _WRITERS:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        found = struct.unpack(_FLOCK, fcntl.fcntl(fd, _F_OFD_GETLK, asked))
        if found[0] != fcntl.F_UNLCK:
            return True
    return False


def _is_plain(fd: int) -> bool:
    """Of a qcow2: no backing file, no encryption, no snapshots, nothing marked (dirty, corrupt, bitmaps). Offsets of
    qemu's docs/interop/qcow2.txt."""
    head = os.pread(fd, 104, 0)
    if len(head) < 72:
        return False
    version, backing = struct.unpack_from(">IQ", head, 4)
    encryption, snapshots = struct.unpack_from(">I", head, 32)[0], struct.unpack_from(">I", head, 60)[0]
    marks = any(head[72:80]) or any(head[88:96]) if version >= 3 else False
    return not backing and not encryption and not snapshots and not marks
