"""Connecting to a socket in a VM's run directory.

Where the daemon is root, that directory belongs to the user of the VM's QEMU, which may be hostile (a guest that broke
out). A symbolic link in a socket's place would make us speak to another VM's QEMU and take it for this one's; so the
socket is opened as a file first, without following links, and it is that file we connect to.
"""

from __future__ import annotations

import errno
import os
import socket
import stat


def connect_to(path: str) -> socket.socket:
    """A non-blocking socket connected to the unix socket at `path`. OSError as connect(2) gives it; ENOTSOCK when
    something else is there."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(f"/proc/self/fd/{place}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(place)
