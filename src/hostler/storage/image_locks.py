"""QEMU's image locks, taken by a reader of ours: while it reads an image no QEMU may open it for writing, and it does
not begin while one does.

QEMU (block/file-posix.c) locks single bytes of the file with open file description locks: byte 100 + n while it uses
permission n, byte 200 + n while it does not share it. Permissions are numbered as in its block layer: 0 consistent
read, 1 write, 3 resize. A lock goes with the descriptor, also when its process is killed.
"""

from __future__ import annotations

import fcntl
import os
import struct

from hostler.model.errors import InUse

_USED, _UNSHARED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")
"""Type, whence, start, length, pid (struct flock of 64-bit Linux)."""


def lock_for_reading(fd: int, path: str) -> None:
    """Hold the image open for reading only, until the descriptor is closed. InUse when a QEMU writes it. On a file
    system without locks nothing is held, as QEMU does."""
    try:
        for byte in (_USED + _READ, _UNSHARED + _WRITE, _UNSHARED + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for byte in (_UNSHARED + _READ, _USED + _WRITE, _USED + _RESIZE):
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
            if found[0] != fcntl.F_UNLCK:
                raise InUse(f"image {path}", "a running VM or another program writes it", "stop that, or wait for it")
    except OSError:
        return
