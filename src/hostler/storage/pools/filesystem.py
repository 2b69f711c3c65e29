"""What a directory's file system can do, and how it is: found by trying, in files that have no name.

Blocking; call in a Lane. `O_TMPFILE` files vanish by themselves when the daemon is killed; where the file system has
none (NFS, FUSE) a named one is used and removed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress

from hostler.model.pool import Features, Usage

FICLONE = 0x40049409
"""_IOW(0x94, 9, int), linux/fs.h."""
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
"""linux/falloc.h"""
_BLOCK = 4096
_PROBE = ".hostler-probe-"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def usage(directory: str) -> Usage:
    """Size of the file system, and what an ordinary user may still take of it."""
    found = os.statvfs(directory)
    return Usage(capacity=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)


def is_read_only(directory: str) -> bool:
    """Whether it is mounted read-only (also after an error, as ext4 does it)."""
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def mount_point(path: str) -> str:
    """The mount point that `path` is on; "" where it is the root file system's."""
    real = os.path.realpath(path)
    while real != "/" and not os.path.ismount(real):
        real = os.path.dirname(real)
    return "" if real == "/" else real


def write_latency(directory: str) -> float:
    """Seconds until a small write is on the disk. OSError where it cannot be written."""
    with _scratch(directory) as fd:
        begun = time.monotonic()
        os.pwrite(fd, b"\0" * _BLOCK, 0)
        os.fsync(fd)
        return time.monotonic() - begun


def features(directory: str) -> Features:
    """What works there. OSError where nothing can be written."""
    kind = filesystem_type(directory)
    with _scratch(directory) as fd, _scratch(directory) as copy:
        os.pwrite(fd, b"h" * 4 * _BLOCK, 0)
        return Features(
            kind=kind,
            fallocate=fallocate(fd, 4 * _BLOCK, _BLOCK),
            reflink=clone(fd, copy),
            punch_hole=_libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, 0, _BLOCK) == 0,
            direct=_direct(fd),
            acl=_acl(fd),
        )


def fallocate(fd: int, offset: int, length: int) -> bool:
    """Reserve blocks. False where the file system cannot (glibc's posix_fallocate would write zeroes there); NoSpace is
    an OSError."""
    if _libc.fallocate(fd, 0, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        raise OSError(code, os.strerror(code))
    return False


def clone(source: int, target: int) -> bool:
    """Let the file `target` have the blocks of `source`, which both keep until one writes. False where the file system
    cannot, or the two are on different ones."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def filesystem_type(path: str) -> str:
    """The type of the file system at `path`, from /proc/self/mountinfo (proc(5)); "" when it is not found there."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if fields[2] == wanted and "-" in fields:
                return fields[fields.index("-") + 1]
    return ""


def _direct(fd: int) -> bool:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _acl(fd: int) -> bool:
    """Asking for a list that is not there tells: ENODATA where there could be one."""
    try:
        os.getxattr(fd, "system.posix_acl_access")
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


@contextlib.contextmanager
def _scratch(directory: str) -> Iterator[int]:
    name = None
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        name = os.path.join(directory, _PROBE + secrets.token_hex(4))
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
        if name is not None:
            with suppress(OSError):
                os.unlink(name)
