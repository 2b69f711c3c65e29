"""A small NBD client that writes, as QEMU does into backups: for the simulated hypervisor and tests of the server."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_GO = 7
_WRITE, _DISCONNECT, _FLUSH, _ZEROES = 1, 2, 3, 6


class NbdWriter:
    """An open export. ConnectionError when the server ends it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.size = 0

    async def open(self, export: str) -> None:
        """Shake hands; LookupError when there is no such export."""
        await self.reader.readexactly(18)
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.writer.write(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", _GO, len(data)) + data)
        while True:
            _, _, kind, size = struct.unpack(">QIII", await self.reader.readexactly(20))
            answer = await self.reader.readexactly(size)
            if kind & (1 << 31):
                raise LookupError(export)
            if kind == 1:
                return
            if answer[:2] == b"\0\0":
                self.size = struct.unpack(">Q", answer[2:10])[0]

    async def write(self, offset: int, data: bytes) -> int:
        """Write; the errno of the answer."""
        return await self.ask(_WRITE, offset, len(data), data)

    async def zero(self, offset: int, length: int) -> int:
        """Write zeroes; the errno."""
        return await self.ask(_ZEROES, offset, length)

    async def flush(self) -> int:
        """Flush; the errno."""
        return await self.ask(_FLUSH, 0, 0)

    async def ask(self, kind: int, offset: int, length: int, data: bytes = b"") -> int:
        """Any request; the errno of its answer."""
        self.writer.write(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length) + data)
        await self.writer.drain()
        _, code, _ = struct.unpack(">IIQ", await self.reader.readexactly(16))
        return int(code)


@asynccontextmanager
async def writing(path: str, export: str) -> AsyncIterator[NbdWriter]:
    """Open the export behind the unix socket `path`."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        client = NbdWriter(reader, writer)
        await client.open(export)
        yield client
        writer.write(struct.pack(">IHHQQI", 0x25609513, 0, _DISCONNECT, 0, 0, 0))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
