"""Who is on the other end of a unix socket, and whether that user administers this host.

The kernel vouches for it: SO_PEERCRED and SO_PEERGROUPS (unix(7), socket(7)) give what the process was when it
connected; it cannot lie about it, and needs no password.
"""

from __future__ import annotations

import array
import contextlib
import errno
import grp
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from hostler.model.errors import NotPermitted
from hostler.model.principal import Principal, Role

ADMIN_GROUP = "hostler"
SO_PEERGROUPS = 59
"""asm-generic/socket.h, since Linux 4.13; not in Python's socket module."""

_CREDENTIALS = struct.Struct("iII")
_GROUPS_BYTES = 1024
"""Python's getsockopt gives no more: room for 256 groups."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A process as it was when it connected. `groups` are its supplementary groups and its own."""

    pid: int
    uid: int
    groups: frozenset[int]


def credentials_of(connection: socket.socket) -> Credentials:
    """Of the process at the other end of a connected unix socket. OSError when the kernel does not tell."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Credentials(pid, uid, frozenset({gid, *_groups(connection, uid, gid)}))


def local_principal(credentials: Credentials) -> Principal:
    """root, the daemon's own user and members of the group `hostler` administer the host; NotPermitted for others."""
    uid = credentials.uid
    if uid in (0, os.geteuid()) or admin_group() in credentials.groups:
        return Principal(name=f"uid {uid}", role=Role.ADMIN)
    raise NotPermitted(
        f"user {uid}",
        f"is neither root nor in the group '{ADMIN_GROUP}'",
        f"use sudo, let root add you to the group ('adduser NAME {ADMIN_GROUP}', then log in again), or give a token",
    )


def admin_group() -> int | None:
    """Id of the group whose members administer this host, None where there is no such group. Read at each call, so
    that making the group needs no restart."""
    try:
        return grp.getgrnam(ADMIN_GROUP).gr_gid
    except KeyError:
        return None


def _groups(connection: socket.socket, uid: int, gid: int) -> Iterable[int]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        # In more groups than Python can ask for: those the user database has now, instead.
        with contextlib.suppress(KeyError):
            return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        return ()
    groups = array.array("I")
    groups.frombytes(raw)
    return groups
