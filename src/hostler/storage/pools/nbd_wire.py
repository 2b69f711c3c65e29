"""A small NBD client: which exports a server has, and how large they are. It never reads or writes a block.

The protocol is that of the NBD project's doc/proto.md ("fixed newstyle" negotiation). What a server sends is hostile
input: every length is bounded; deadlines are the caller's.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from hostler.model.errors import HostLacks, NotFound, NotPermitted
from hostler.model.pool import PoolSecrets
from hostler.storage.pools.dial import connect

_MAGIC, _HAVE_OPT, _REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_ABORT, _LIST, _STARTTLS, _INFO = 2, 3, 5, 6
_ACK, _SERVER, _REP_INFO, _ERROR = 1, 2, 3, 0x8000_0000
_POLICY, _TLS_REQUIRED, _UNKNOWN = _ERROR | 2, _ERROR | 5, _ERROR | 6
_INFO_EXPORT, _READ_ONLY = 0, 2
MAX_REPLY = 64 * 1024
MAX_EXPORTS = 4096


@dataclass(frozen=True, slots=True)
class Export:
    """An export of a server. `size` in bytes."""

    name: str
    size: int
    read_only: bool


class Server:
    """A connection in its negotiation."""

    def __init__(self, subject: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._subject = subject
        self._reader = reader
        self._writer = writer

    async def greet(self) -> None:
        """The first bytes of both sides."""
        head = await self._reader.readexactly(18)
        if head[:8] != _MAGIC or head[8:16] != _HAVE_OPT or not head[17] & _FIXED_NEWSTYLE:
            raise HostLacks(self._subject, "is no NBD server of our time", "check the port")
        self._writer.write(struct.pack(">I", (_FIXED_NEWSTYLE | _NO_ZEROES) & head[17]))
        await self._writer.drain()

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Everything after this is encrypted, and the server is who its certificate says."""
        await self._ask(_STARTTLS)
        kind, _ = await self._answer(_STARTTLS)
        if kind != _ACK:
            raise HostLacks(self._subject, "offers no TLS", "turn it on there, or make the pool with --insecure")
        try:
            await self._writer.start_tls(context, server_hostname=hostname)
        except ssl.SSLCertVerificationError as error:
            raise NotPermitted(
                self._subject,
                f"shows a certificate that is not accepted: {error.verify_message}",
                "check the pool's ca-cert.pem, and --tls-hostname",
            ) from error
        except (ssl.SSLError, ConnectionError) as error:
            raise NotPermitted(
                self._subject, f"does not agree on TLS: {_words(error)}", "check both sides' certificates"
            ) from error

    async def names(self) -> list[str]:
        """Names of its exports. NotPermitted where it does not tell."""
        await self._ask(_LIST)
        found: list[str] = []
        while True:
            kind, data = await self._answer(_LIST)
            if kind == _ACK:
                return found
            if kind != _SERVER or len(data) < 4 or len(found) >= MAX_EXPORTS:
                self._refuse(kind)
                raise NotPermitted(self._subject, "does not list its exports", "name them when the pool is made")
            length = struct.unpack_from(">I", data)[0]
            found.append(data[4 : 4 + length].decode("utf-8", "replace"))

    async def export(self, name: str) -> Export | None:
        """That export, None when the server has none of that name."""
        raw = name.encode()
        await self._ask(_INFO, struct.pack(">I", len(raw)) + raw + struct.pack(">H", 0))
        found = None
        while True:
            kind, data = await self._answer(_INFO)
            if kind == _ACK:
                return found
            if kind == _REP_INFO and len(data) >= 12 and struct.unpack_from(">H", data)[0] == _INFO_EXPORT:
                size, flags = struct.unpack_from(">QH", data, 2)
                found = Export(name, size, bool(flags & _READ_ONLY))
            elif kind == _UNKNOWN:
                return None
            elif kind != _REP_INFO:
                self._refuse(kind)
                raise HostLacks(self._subject, f"does not describe its exports ({kind:#x})", "use another server")

    async def bye(self) -> None:
        """End the negotiation politely."""
        await self._ask(_ABORT)

    def _refuse(self, kind: int) -> None:
        if kind == _TLS_REQUIRED:
            raise NotPermitted(self._subject, "wants TLS", "give the pool certificates (--tls)")
        if kind == _POLICY:
            raise NotPermitted(self._subject, "refuses that by its policy", "look at the server")

    async def _ask(self, option: int, data: bytes = b"") -> None:
        self._writer.write(_HAVE_OPT + struct.pack(">II", option, len(data)) + data)
        await self._writer.drain()

    async def _answer(self, option: int) -> tuple[int, bytes]:
        magic, asked, kind, length = struct.unpack(">QIII", await self._reader.readexactly(20))
        if magic != _REPLY or asked != option or length > MAX_REPLY:
            raise HostLacks(self._subject, "does not speak NBD as we know it", "check the port")
        return kind, await self._reader.readexactly(length)


@asynccontextmanager
async def connected(host: str, port: int, context: ssl.SSLContext | None, hostname: str) -> AsyncIterator[Server]:
    """A server, negotiated with up to the choice of an export. NotFound, NotPermitted, HostLacks."""
    subject = f"NBD server {host}:{port}"
    reader, writer = await connect(subject, host, port)
    try:
        server = Server(subject, reader, writer)
        await server.greet()
        if context is not None:
            await server.start_tls(context, hostname)
        yield server
        with suppress(OSError):
            await server.bye()
    except ssl.SSLError as error:  # TLS 1.3: a server tells that it refuses our certificate only after the handshake
        raise NotPermitted(subject, f"refuses our certificate: {_words(error)}", "check the pool's files") from error
    except (OSError, EOFError) as error:
        raise NotFound(subject, "broke off the connection", "look at the server, and at its certificates") from error
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await writer.wait_closed()


def tls_context(secrets: PoolSecrets) -> ssl.SSLContext:
    """For a client with that certificate. InvalidInput is for the caller to make of ssl.SSLError. The key goes through
    a file in memory that has no name: the ssl module reads only files."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=secrets.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    fd = os.memfd_create("pool", os.MFD_CLOEXEC)
    try:
        os.write(fd, f"{secrets.certificate}\n{secrets.key}\n".encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    finally:
        os.close(fd)
    return context


def _no_password() -> str:
    """OpenSSL would ask at the terminal for the password of an encrypted key."""
    raise ssl.SSLError("the key is encrypted")


def _words(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).replace("_", " ").lower()
