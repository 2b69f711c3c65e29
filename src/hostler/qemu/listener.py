"""Listening sockets that a child inherits: whoever connects need not wait for the child to be ready."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hostler.model.errors import HostLacks, InvalidInput
from hostler.qemu.paths import UNIX_PATH_MAX


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
        with suppress(FileNotFoundError):
            os.unlink(path)
        try:
            listener.bind(path)
        except OSError as error:
            raise HostLacks(f"socket {path}", f"cannot be made: {error.strerror}", "check the directory") from error
        try:
            os.chmod(path, 0o600)
            if uid is not None and uid != os.geteuid():
                os.chown(path, uid, uid)
            listener.listen(16)
            yield listener
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise
