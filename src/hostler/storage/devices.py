"""Whole block devices of the host, for pass-through."""

from __future__ import annotations

import errno
import os
import stat

from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import HostlerError, InUse, InvalidInput, NotFound, NotPermitted
from hostler.storage.waiting import in_thread


async def inspect_device(path: str) -> DiskSource:
    """The block device at `path` as a source of a disk, with its size. InUse when the host itself uses it (mounted,
    part of a RAID or LVM), InvalidInput when it is no block device, NotFound, NotPermitted."""
    return await in_thread(f"device {path}", lambda: _inspect(path))


def _inspect(path: str) -> DiskSource:
    subject = f"device {path}"
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise InvalidInput(subject, "is not a block device", "name a device such as /dev/sdb, or a volume")
        # O_EXCL on a block device without O_CREAT: EBUSY while the kernel itself has claimed it (open(2)).
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _cannot_open(subject, error) from error
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size == 0:
        raise InvalidInput(subject, "has no medium, its size is 0", "choose another device")
    return DiskSource(kind=SourceKind.DEVICE, path=path, format=ImageFormat.RAW, size=size)


def _cannot_open(subject: str, error: OSError | ValueError) -> HostlerError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(subject, "does not exist", "check the path")
    if isinstance(error, PermissionError):
        return NotPermitted(subject, "may not be opened by this daemon", "check its owner and mode")
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return InUse(subject, "is used by the host itself (mounted, or part of a RAID or LVM)", "unmount it first")
    return InvalidInput(subject, f"cannot be opened: {error}", "choose another device")
