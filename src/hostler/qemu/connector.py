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
import struct


def connect_to(path: str, owner: int | None = None) -> socket.socket:
    """A non-blocking socket connected to the unix socket at `path`. OSError as connect(2) gives it; ENOTSOCK when
    something else is there, EACCES when it is not a process of the user `owner` (None: of any) that listens on it."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(f"/proc/self/fd/{place}")
            if owner is not None and _listener_uid(sock) != owner:
                raise OSError(errno.EACCES, "another user listens there", path)
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(place)


def _listener_uid(sock: socket.socket) -> int:
    """The user who called listen(2) at the other end: struct ucred {pid, uid, gid}, unix(7)."""
    size = struct.calcsize("iIi")
    return int(struct.unpack("iIi", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])
