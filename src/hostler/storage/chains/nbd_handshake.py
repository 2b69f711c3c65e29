"""The first half of an NBD server for one read-only export: the newstyle negotiation (the NBD project's doc/proto.md).

The client is the QEMU of a VM, perhaps taken over by its guest: every length is bounded, and nonsense ends the
connection.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

MAX_READ = 32 * 1024 * 1024
"""Bytes of one read: what every client keeps to."""
_MAX_OPTION = 16 * 1024
_MAX_OPTIONS = 64

_CLIENT_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x0003_E889_0455_65A9
_NAME, _ABORT, _LIST, _INFO, _GO, _STRUCTURED, _LIST_CONTEXTS, _SET_CONTEXT = 1, 2, 3, 6, 7, 8, 9, 10
_ACK, _SERVER, _TELLS, _CONTEXT = 1, 2, 3, 4
_UNSUPPORTED, _INVALID, _UNKNOWN = (1 << 31) + 1, (1 << 31) + 3, (1 << 31) + 6
_FLAGS = 1 | 2 | 4 | 128 | 256
"""Has flags, read-only, flush (there is nothing to flush), do not fragment, several connections see the same."""
ALLOCATION = "base:allocation"
CONTEXT_ID = 1


class Nonsense(Exception):
    """The client does not keep to the protocol, or has gone."""


@dataclass(slots=True)
class Session:
    """What a client has asked for. `structured`: replies in chunks; `status`: it may ask what is allocated."""

    structured: bool = False
    status: bool = False


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly so many bytes. Nonsense when the client goes before that."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise Nonsense
        view = view[got:]
    return bytes(data)


def shake_hands(connection: socket.socket, name: str, size: int) -> Session | None:
    """Negotiate until the client wants to read; None when it only wanted to look. Nonsense, OSError."""
    connection.sendall(b"NBDMAGIC" + _CLIENT_MAGIC + struct.pack(">H", 3))
    (client_flags,) = struct.unpack(">I", receive(connection, 4))
    session = Session()
    for _ in range(_MAX_OPTIONS):
        magic, option, length = struct.unpack(">8sII", receive(connection, 16))
        if magic != _CLIENT_MAGIC or length > _MAX_OPTION:
            raise Nonsense
        data = receive(connection, length)
        if option == _NAME:
            if data.decode("utf-8", "replace") not in (name, ""):
                raise Nonsense  # this old option has no way to refuse
            tail = b"" if client_flags & 2 else bytes(124)
            connection.sendall(struct.pack(">QH", size, _FLAGS) + tail)
            return session
        if option == _ABORT:
            _reply(connection, option, _ACK)
            return None
        if _answer(connection, session, option, data, name, size):
            return session
    raise Nonsense


def _answer(connection: socket.socket, session: Session, option: int, data: bytes, name: str, size: int) -> bool:
    """Answer one option; whether the negotiation is over with it."""
    if option in (_INFO, _GO):
        return _info(connection, option, data, name, size) and option == _GO
    if option == _LIST:
        encoded = name.encode()
        _reply(connection, option, _SERVER, struct.pack(">I", len(encoded)) + encoded)
        _reply(connection, option, _ACK)
    elif option == _STRUCTURED:
        session.structured = True
        _reply(connection, option, _ACK)
    elif option in (_LIST_CONTEXTS, _SET_CONTEXT):
        wanted = _contexts(data)
        if option == _SET_CONTEXT:
            session.status = session.structured and ALLOCATION in wanted
        if ALLOCATION in wanted or (option == _LIST_CONTEXTS and (not wanted or "base:" in wanted)):
            _reply(connection, option, _CONTEXT, struct.pack(">I", CONTEXT_ID) + ALLOCATION.encode())
        _reply(connection, option, _ACK)
    else:
        _reply(connection, option, _UNSUPPORTED)
    return False


def _info(connection: socket.socket, option: int, data: bytes, name: str, size: int) -> bool:
    if len(data) < 6:
        _reply(connection, option, _INVALID)
        return False
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 6:
        _reply(connection, option, _INVALID)
        return False
    if data[4 : 4 + length].decode("utf-8", "replace") not in (name, ""):
        _reply(connection, option, _UNKNOWN)
        return False
    _reply(connection, option, _TELLS, struct.pack(">HQH", 0, size, _FLAGS))
    _reply(connection, option, _TELLS, struct.pack(">HIII", 3, 1, 4096, MAX_READ))
    _reply(connection, option, _ACK)
    return True


def _contexts(data: bytes) -> list[str]:
    """The names of contexts that a client asks for. Nonsense."""
    try:
        (at,) = struct.unpack_from(">I", data)
        (count,) = struct.unpack_from(">I", data, 4 + at)
        position, found = 8 + at, []
        for _ in range(min(count, _MAX_OPTIONS)):
            (length,) = struct.unpack_from(">I", data, position)
            found.append(data[position + 4 : position + 4 + length].decode("utf-8", "replace"))
            position += 4 + length
    except struct.error as error:
        raise Nonsense from error
    return found


def _reply(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)
