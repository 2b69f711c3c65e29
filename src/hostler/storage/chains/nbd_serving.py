"""The second half of an NBD server for one read-only export: answering reads from a chain.

Data goes from the image files to the socket inside the kernel (sendfile). A connection has a thread and answers one
request after the other; several connections are served at the same time.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

from hostler.model.errors import HostlerError
from hostler.storage.chains import plan
from hostler.storage.chains.layer import Layer
from hostler.storage.chains.nbd_handshake import CONTEXT_ID, MAX_READ, Nonsense, Session, receive
from hostler.storage.chains.plan import Extent
from hostler.storage.chains.source import LITERAL, ZERO

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _SIMPLE, _CHUNK = 0x2560_9513, 0x6744_6698, 0x668E_33EF
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _CACHE, _ZEROES, _STATUS = range(8)
_ONE = 8
"""Flag of a status request: the first extent only."""
_DONE = 1
_NONE, _DATA, _HOLE, _STATUSES, _ERROR = 0, 1, 2, 5, 0x8001
_EPERM, _EIO, _EINVAL = 1, 5, 22
_MAX_EXTENTS = 512
"""Extents of one status reply; the client asks again for the rest."""
_STATUS_SPAN = 1024**3
"""Bytes that one status request looks at, so that its answer comes soon."""
_ZEROES_BLOCK = bytes(64 * 1024)


class Connection:
    """One client that has shaken hands."""

    def __init__(self, connection: socket.socket, session: Session, layers: Sequence[Layer], size: int) -> None:
        self._socket = connection
        self._session = session
        self._layers = layers
        self._size = size

    def serve(self) -> None:
        """Until the client goes. Nonsense, OSError."""
        while True:
            magic, flags, kind, handle, offset, length = _REQUEST.unpack(receive(self._socket, _REQUEST.size))
            if magic != _REQUEST_MAGIC:
                raise Nonsense
            if kind == _DISCONNECT:
                return
            if kind == _WRITE:
                self._skip(length)
            self._answer(flags, kind, handle, offset, length)

    def _answer(self, flags: int, kind: int, handle: int, offset: int, length: int) -> None:
        outside = length == 0 or offset + length > self._size
        if kind == _READ and not outside and length <= MAX_READ:
            self._read(handle, offset, length)
        elif kind == _STATUS and not outside and self._session.status:
            self._status(handle, offset, length, bool(flags & _ONE))
        elif kind in (_WRITE, _TRIM, _ZEROES):
            self._refuse(handle, _EPERM)
        elif kind == _FLUSH or (kind == _CACHE and not outside):
            self._socket.sendall(struct.pack(">IIQ", _SIMPLE, 0, handle))
        else:
            self._refuse(handle, _EINVAL)

    def _skip(self, length: int) -> None:
        """What a client that does not know better wants to write."""
        if length > MAX_READ:
            raise Nonsense
        while length:
            length -= len(receive(self._socket, min(length, 65_536)))

    def _refuse(self, handle: int, error: int) -> None:
        if self._session.structured:
            body = struct.pack(">IH", error, 0)
            self._socket.sendall(struct.pack(">IHHQI", _CHUNK, _DONE, _ERROR, handle, len(body)) + body)
        else:
            self._socket.sendall(struct.pack(">IIQ", _SIMPLE, error, handle))

    def _read(self, handle: int, offset: int, length: int) -> None:
        try:
            extents = list(plan.extents(self._layers, offset, offset + length))
        except HostlerError:  # the image is damaged there, or its disk fails
            return self._refuse(handle, _EIO)
        if not self._session.structured:
            self._socket.sendall(struct.pack(">IIQ", _SIMPLE, 0, handle), socket.MSG_MORE)
            for extent in extents:
                self._send(extent)
            return None
        for number, extent in enumerate(extents, 1):
            done = _DONE if number == len(extents) else 0
            if extent.at == ZERO:
                body = struct.pack(">QI", extent.offset, extent.length)
                self._socket.sendall(struct.pack(">IHHQI", _CHUNK, done, _HOLE, handle, len(body)) + body)
            else:
                head = struct.pack(">IHHQIQ", _CHUNK, done, _DATA, handle, 8 + extent.length, extent.offset)
                self._socket.sendall(head, socket.MSG_MORE)
                self._send(extent)
        return None

    def _send(self, extent: Extent) -> None:
        """The bytes of one extent. What fails here ends the connection: the reply has begun."""
        if extent.at == LITERAL:
            self._socket.sendall(extent.literal)
        elif extent.at == ZERO:
            for step in range(0, extent.length, len(_ZEROES_BLOCK)):
                self._socket.sendall(_ZEROES_BLOCK[: extent.length - step])
        else:
            file, at, left = self._layers[extent.source].file.fd, extent.at, extent.length
            while left:
                sent = os.sendfile(self._socket.fileno(), file, at, left)
                if not sent:
                    raise Nonsense  # the image became shorter
                at, left = at + sent, left - sent

    def _status(self, handle: int, offset: int, length: int, one: bool) -> None:
        body = struct.pack(">I", CONTEXT_ID)
        try:
            for number, (size, zero) in enumerate(self._allocation(offset, min(length, _STATUS_SPAN))):
                if number == (1 if one else _MAX_EXTENTS):
                    break
                body += struct.pack(">II", size, 3 if zero else 0)
        except HostlerError:
            return self._refuse(handle, _EIO)
        self._socket.sendall(struct.pack(">IHHQI", _CHUNK, _DONE, _STATUSES, handle, len(body)) + body)
        return None

    def _allocation(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Runs of data and of zeroes."""
        run, last = 0, False
        for extent in plan.without_holes(self._layers, plan.extents(self._layers, offset, offset + length)):
            zero = extent.at == ZERO
            if run and zero is not last:
                yield run, last
                run = 0
            run, last = run + extent.length, zero
        yield run, last
