"""Listening sockets that a child inherits: whoever connects need not wait for the child to be ready."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from hostler.model.errors import HostLacks, InvalidInput
from hostler.qemu.paths import UNIX_PATH_MAX
from hostler.removal import FEW, remove_tree


def check_socket_path(path: str) -> None:
    """InvalidInput when a unix socket cannot have this path."""
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX:
        raise InvalidInput(
            f"socket {path}",
            f"its path has {length} bytes, the system allows {UNIX_PATH_MAX}",
            "choose a shorter run directory",
        )


@contextmanager
def listening_socket(path: str, uid: int | None) -> Iterator[socket.socket]:
    """A unix socket at `path`, listening, only for `uid` (None: ourselves) and root to connect to.

    Our copy is closed at the end: from then on the child alone decides, and its death is seen by whoever connected.
    On failure nothing is left at `path`; what a killed predecessor left there is replaced.
    """
    check_socket_path(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        remove_tree(path, FEW)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind(2), which makes the file with the socket's own mode
            listener.bind(path)
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        try:
            _give_away(path, uid)
            listener.listen(16)
            yield listener
        except BaseException:
            remove_tree(path, FEW)
            raise


def _give_away(path: str, uid: int | None) -> None:
    """Make the new socket the property of `uid`. Its directory may belong to that user already, and a process of a
    guest that broke out can put a link to any file in the socket's place: it is opened without following links, and
    only a socket that is still ours is given away, through its descriptor."""
    if uid is None or uid == os.geteuid():
        return
    try:
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_be_made(path, error) from error
    try:
        found = os.fstat(place)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise HostLacks(
                f"socket {path}",
                f"was replaced while it was made: a process of user {uid} is at work in its directory",
                f"end the processes of user {uid}; the guest has broken out of its QEMU",
            )
        os.chown(f"/proc/self/fd/{place}", uid, uid)
    except OSError as error:
        raise _cannot_be_made(path, error) from error
    finally:
        os.close(place)


def _cannot_be_made(path: str, error: OSError) -> HostLacks:
    return HostLacks(f"socket {path}", f"cannot be made: {error.strerror}", "check the directory")
