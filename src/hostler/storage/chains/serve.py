"""The process that serves a chain read-only over NBD to a VM: `python -m hostler.storage.chains.serve ...` as
`storage.chain_exports` starts it.

It gets the image files open, becomes the VM's user before it looks at them, opens its two sockets and goes to the
background. On the control socket it only listens: whoever connects learns that it lives, and whose it is.
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import os
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from hostler.model.errors import HostlerError
from hostler.storage.chains.chain import open_layer
from hostler.storage.chains.layer import Layer
from hostler.storage.chains.nbd_handshake import Nonsense, shake_hands
from hostler.storage.chains.nbd_serving import Connection
from hostler.storage.chains.source import ImageFile

CLIENTS = 16
"""Connections at the same time; more wait in the socket's queue."""
HANDSHAKE = 30.0
"""Seconds a client may take to say what it wants."""
_NO_NEW_PRIVILEGES = 38
"""PR_SET_NO_NEW_PRIVS of prctl(2)."""


def main(arguments: Sequence[str]) -> int:
    """The first process ends with 0 when the sockets are there; what is wrong goes to standard error."""
    parser = argparse.ArgumentParser(prog="chain-server")
    parser.add_argument("--daemonize", action="store_true")
    parser.add_argument("--chardev", required=True, help="socket,id=control,path=PATH,server=on,wait=off")
    parser.add_argument("--nbd", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--user", help="UID:GROUP")
    parser.add_argument("--layer", action="append", required=True, help="FD:PATH, the topmost first")
    options = parser.parse_args(arguments)
    try:
        for encoding in ("utf-16-le", "utf-16-be", "cp1252", "utf-8"):
            codecs.lookup(encoding)  # now, since Python's own files may be out of the VM's user's reach
        if options.user:
            _become(*(int(number) for number in options.user.split(":")))
        layers = [_layer(text) for text in options.layer]
        control = options.chardev.split("path=", 1)[1].removesuffix(",server=on,wait=off").replace(",,", ",")
        sockets = [_bound(path) for path in (control, options.nbd)]
    except (HostlerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.daemonize:
        _to_background()
    # Only now: the kernel tells whoever connects which process called this.
    for one in sockets:
        one.listen(CLIENTS)
    _let_go()
    threading.Thread(target=_say_nothing, args=(sockets[0],), daemon=True).start()
    _serve(sockets[1], options.name, layers)
    return 0


def _become(uid: int, group: int) -> None:
    """The VM's user, for good."""
    os.setgroups([group])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None, use_errno=True).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _layer(text: str) -> Layer:
    fd, path = text.split(":", 1)
    return open_layer(ImageFile.of(int(fd), path))


def _bound(path: str) -> socket.socket:
    os.umask(0o077)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(path)
    return made


def _to_background() -> None:
    """The first process waits until the second says that it listens, or has died."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os._exit(0 if os.read(reading, 1) else 1)
    os.close(reading)
    os.dup2(writing, 0)
    os.close(writing)


def _let_go() -> None:
    """Say that it listens, if anybody waits for that; and let go of the pipes of whoever started it."""
    with suppress(OSError):
        os.write(0, b".")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _say_nothing(control: socket.socket) -> None:
    while True:
        with suppress(OSError):
            control.accept()[0].close()


def _serve(listening: socket.socket, name: str, layers: Sequence[Layer]) -> None:
    free = threading.Semaphore(CLIENTS)
    while True:
        free.acquire()
        try:
            connection, _ = listening.accept()
        except OSError:
            free.release()
            continue
        threading.Thread(target=_client, args=(connection, name, layers, free), daemon=True).start()


def _client(connection: socket.socket, name: str, layers: Sequence[Layer], free: threading.Semaphore) -> None:
    try:
        with connection, suppress(Nonsense, OSError):
            size = layers[0].size
            connection.settimeout(HANDSHAKE)
            session = shake_hands(connection, name, size)
            connection.settimeout(None)
            if session is not None:
                Connection(connection, session, layers, size).serve()
    finally:
        free.release()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
