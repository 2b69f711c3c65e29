"""Copies of whole files, and a new file in the place of an old one.

A copy shares its blocks with the original where the file system can (XFS, Btrfs); elsewhere only data is copied, and
holes stay holes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress

from hostler.storage.qemu_img import OnProgress

_FICLONE = 0x40049409
"""ioctl of linux/fs.h: make the file share all blocks of another."""
_PIECE = 64 * 1024 * 1024
_BUFFER = 4 * 1024 * 1024
_ATTRIBUTES = ("system.posix_acl_access", "security.selinux", "user.")


class Stopped(Exception):
    """The copy was given up because its asker went away."""


def copy_file(source: int, target: int, on_progress: OnProgress, stop: threading.Event) -> bool:
    """The content of one open file into another, empty one. True when blocks are shared. Blocking; OSError, Stopped."""
    size = os.fstat(source).st_size
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM):
            raise
    os.ftruncate(target, size)
    position = 0
    copy = _CopyRange(source, target)
    while position < size:
        start = _seek(source, position, os.SEEK_DATA, size)
        end = _seek(source, start, os.SEEK_HOLE, size) if start < size else size
        position = start
        while position < end:
            if stop.is_set():
                raise Stopped
            position += copy(position, min(_PIECE, end - position))
            on_progress(position / size)
        position = max(position, end)
    return False


class _CopyRange:
    """copy_file_range(2) where both files allow it, reading and writing elsewhere."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._quick = True

    def __call__(self, at: int, length: int) -> int:
        if self._quick:
            try:
                done = os.copy_file_range(self._source, self._target, length, at, at)
                if done:
                    return done
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                    raise
            self._quick = False
        data = os.pread(self._source, min(length, _BUFFER), at)
        if not data:
            raise OSError(errno.EIO, "the file became shorter")
        return os.pwrite(self._target, data, at)


def take_over(old: str, new: str) -> None:
    """Give `new` the owner, mode and access control list of `old`, as far as this user may."""
    found = os.stat(old)
    with suppress(PermissionError):
        os.chown(new, found.st_uid, found.st_gid)
    os.chmod(new, found.st_mode & 0o7777)
    for name in os.listxattr(old):
        if name.startswith(_ATTRIBUTES):
            with suppress(OSError):  # a file system without them, or a label that only others may give
                os.setxattr(new, name, os.getxattr(old, name))


def sync(path: str) -> None:
    """The file and its name onto the disk. Blocking; OSError."""
    for each in (path, os.path.dirname(path)):
        fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _seek(fd: int, position: int, whence: int, end: int) -> int:
    try:
        return min(end, os.lseek(fd, position, whence))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        if error.errno == errno.EINVAL:
            return position if whence == os.SEEK_DATA else end
        raise
