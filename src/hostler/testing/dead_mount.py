"""A mounted file system whose server does not answer: every call into it hangs until it is unmounted, as on a network
share whose server is gone. (FUSE, with nobody who reads the requests. Needs root.)"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FUSE = "/dev/fuse"
MNT_FORCE, MNT_DETACH = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def available() -> bool:
    """Whether this machine can have one."""
    return os.geteuid() == 0 and os.access(FUSE, os.R_OK | os.W_OK)


@contextmanager
def dead_mount(path: Path) -> Iterator[None]:
    """`path` hangs inside the block; whoever hangs gets an error at its end."""
    fd = os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        if _libc.mount(b"dead", os.fsencode(path), b"fuse.dead", 0, options) != 0:
            raise OSError(ctypes.get_errno(), f"cannot mount on {path}")
        try:
            yield
        finally:
            _libc.umount2(os.fsencode(path), MNT_FORCE | MNT_DETACH)
    finally:
        os.close(fd)  # ends the connection: whatever waits in it fails now
