"""Zeroes that take space, given back to the file system: what is read stays the same at every moment."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator

from hostler.model.errors import HostLacks
from hostler.storage.copying import Stopped
from hostler.storage.qemu_img import OnProgress

_KEEP_SIZE, _PUNCH_HOLE = 0x1, 0x2
"""Flags of fallocate(2), linux/falloc.h."""
_UNIT = 64 * 1024
"""Bytes looked at together: smaller holes cost more extents than they give back."""
_READ = 4 * 1024 * 1024
_ZEROES = bytes(_READ)
_libc = ctypes.CDLL(None, use_errno=True)


def punch_zeroes(path: str, end: int, on_progress: OnProgress, stop: threading.Event) -> None:
    """Make holes of all aligned units of zeroes in the first `end` bytes of a file. Blocking. HostLacks where its file
    system makes no holes; OSError, Stopped."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for start, length in _data(fd, end):
            for at in range(start, start + length, _READ):
                if stop.is_set():
                    raise Stopped
                for hole, size in _zero_runs(fd, at, min(_READ, start + length - at)):
                    punch(fd, path, hole, size)
                on_progress(min(1.0, at / end))
        os.fsync(fd)
    finally:
        os.close(fd)


def punch(fd: int, path: str, at: int, length: int) -> None:
    """Make one hole. HostLacks, OSError."""
    offset, count = ctypes.c_int64(at), ctypes.c_int64(length)
    if _libc.fallocate(fd, ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE), offset, count) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise HostLacks(f"file {path}", "is on a file system that makes no holes", "move it to ext4, XFS or Btrfs")
    raise OSError(number, os.strerror(number))


def _data(fd: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of data, widened to whole units."""
    position = 0
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= end:
            return
        start -= start % _UNIT
        stop = min(end, os.lseek(fd, max(start, position), os.SEEK_HOLE))
        stop = min(end, max(stop, start + _UNIT))
        yield start, stop - start
        position = stop


def _zero_runs(fd: int, at: int, length: int) -> Iterator[tuple[int, int]]:
    content = os.pread(fd, length, at)
    if content == _ZEROES[: len(content)]:
        yield at, len(content)
        return
    run = -1
    for unit in range(0, len(content), _UNIT):
        piece = content[unit : unit + _UNIT]
        if piece == _ZEROES[: len(piece)]:
            run = unit if run < 0 else run
        elif run >= 0:
            yield at + run, unit - run
            run = -1
    if run >= 0:
        yield at + run, len(content) - run
