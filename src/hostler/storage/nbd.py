"""An NBD server for what QEMU writes into backups: over a unix socket, for writing only, from front to back.

The newstyle handshake and simple replies of the NBD project's doc/proto.md; options that are not needed are refused, as
the protocol allows. The client is a QEMU, perhaps one that its guest has taken over: all lengths are bounded, and
nonsense ends the connection.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from hostler.model.errors import HostlerError, NoSpace

WRITE_MAX = 2 * 1024 * 1024
"""Bytes of one write, as the client is told: twice what our copies ask for at once. It is held in memory."""
_OPTION_MAX = 4096
_OPTIONS = 64
_MORE_CLIENTS = 4
"""Connections beside one for each disk: those of an earlier attempt may still be there. A hostile client would hold one
write in memory for each."""

_CLIENT_MAGIC = b"IHAVEOPT"
_OPTION_REPLY = 0x0003_E889_0455_65A9
_REQUEST, _REPLY = 0x2560_9513, 0x6744_6698
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _TELLS, _UNSUPPORTED, _UNKNOWN = 1, 3, (1 << 31) + 1, (1 << 31) + 6
_WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 1, 2, 3, 4, 6
_FLAGS = 1 | 4 | 8 | 32 | 64
"""Has flags, flush, FUA, trim, write zeroes."""


class Sink(Protocol):
    """What takes the content of one disk. Methods raise HostlerError or OSError; after the first the sink is spoilt."""

    @property
    def size(self) -> int: ...
    async def write(self, offset: int, data: bytes) -> None: ...
    async def zero(self, offset: int, length: int) -> None: ...


@asynccontextmanager
async def serving(path: str, sinks: Mapping[str, Sink], uid: int | None = None) -> AsyncIterator[None]:
    """Serve the sinks under their names on the unix socket `path` as long as the block runs. The socket, in a directory
    that may belong to a VM's user, is that user's (`uid`)."""
    clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(clients) >= len(sinks) + _MORE_CLIENTS:
            writer.close()
            return
        clients[task] = writer
        try:
            with suppress(OSError, EOFError, _Nonsense):
                await _Connection(reader, writer, sinks).run()
        finally:
            del clients[task]
            writer.close()

    with suppress(FileNotFoundError):
        os.unlink(path)
    server = await asyncio.start_unix_server(serve, path)
    try:
        if uid is not None:
            os.chown(path, uid, -1, follow_symlinks=False)
        yield
    finally:
        server.close()
        for writer in clients.values():
            writer.transport.abort()
        if clients:
            await asyncio.wait(clients)
        await server.wait_closed()
        with suppress(OSError):
            os.unlink(path)


class _Nonsense(Exception):
    """The client does not keep to the protocol."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sinks: Mapping[str, Sink]) -> None:
        self._reader = reader
        self._writer = writer
        self._sinks = sinks

    async def run(self) -> None:
        """Shake hands, then take what comes until the client ends it."""
        self._writer.write(b"NBDMAGIC" + _CLIENT_MAGIC + struct.pack(">H", 3))
        await self._reader.readexactly(4)
        sink = await self._choose()
        while sink is not None and await self._request(sink):
            await self._writer.drain()

    async def _choose(self) -> Sink | None:
        for _ in range(_OPTIONS):
            magic, option, length = struct.unpack(">8sII", await self._reader.readexactly(16))
            if magic != _CLIENT_MAGIC or length > _OPTION_MAX:
                raise _Nonsense
            data = await self._reader.readexactly(length)
            if option == _ABORT:
                self._answer(option, _ACK)
                return None
            if option not in (_INFO, _GO):
                self._answer(option, _UNSUPPORTED)
                continue
            size = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else 0
            sink = self._sinks.get(data[4 : 4 + size].decode("utf-8", "replace"))
            if sink is None:
                self._answer(option, _UNKNOWN)
                continue
            self._answer(option, _TELLS, struct.pack(">HQH", 0, sink.size, _FLAGS))
            self._answer(option, _TELLS, struct.pack(">HIII", 3, 1, 65536, WRITE_MAX))
            self._answer(option, _ACK)
            if option == _GO:
                return sink
        raise _Nonsense

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._writer.write(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data)

    async def _request(self, sink: Sink) -> bool:
        """One request; False when it was the last."""
        magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", await self._reader.readexactly(28))
        if magic != _REQUEST or (kind == _WRITE and length > WRITE_MAX):
            raise _Nonsense
        if kind == _DISCONNECT:
            return False
        data = await self._reader.readexactly(length) if kind == _WRITE else b""
        code = errno.EINVAL
        if kind in (_FLUSH, _TRIM):
            code = 0
        elif kind in (_WRITE, _ZEROES) and offset + length <= sink.size:
            code = await _store(sink, offset, length, data if kind == _WRITE else None)
        self._writer.write(struct.pack(">IIQ", _REPLY, code, cookie))
        return True


async def _store(sink: Sink, offset: int, length: int, data: bytes | None) -> int:
    """The errno that NBD knows for how it went."""
    try:
        if data is None:
            await sink.zero(offset, length)
        else:
            await sink.write(offset, data)
    except NoSpace:
        return errno.ENOSPC
    except (HostlerError, OSError):
        return errno.EIO
    return 0
