"""Serves the API on a unix socket and over HTTPS, with uvicorn's protocols on our own loop.

Not uvicorn's own `Server`: that wakes up ten times a second to see whether it shall stop, takes over the process's
signals, and gives TLS handshakes a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from uvicorn.config import Config
from uvicorn.server import ServerState

from hostler.api.rest.listeners import address_of, tcp_listener, unix_listener
from hostler.api.rest.protocol import HttpProtocol, WebSocketProtocol
from hostler.api.rest.state import Rest
from hostler.model.errors import HostlerError

KEEP_ALIVE = 3600
"""Seconds an idle connection stays open. Long for the sake of hosts: a handshake in the middle of a migration's pause
would be felt by the guest."""
HANDSHAKE_TIME = 10.0
"""Seconds for TLS."""
MAX_HEAD = 32 * 1024
"""Bytes of a request's head."""
MAX_FRAME = 1024**2
"""Bytes of a web socket message."""
MAX_CONNECTIONS = 2000
"""More are answered with 503. Ordinary open-file limits allow some more."""
GRACE = 3.0
"""Seconds that requests under way get to end when the daemon stops."""


class RestServer:
    """The API of one daemon, on both listeners."""

    def __init__(self, app: FastAPI, unix_path: Path, listen: str | None = None, tls: ssl.SSLContext | None = None):
        """`listen`: host:port for HTTPS with `tls`; None for the unix socket alone."""
        self._rest = cast(Rest, app.state.rest)
        self._unix_path = unix_path
        self._listen = listen
        self._tls = tls
        self._config = Config(
            app,
            http=HttpProtocol,
            ws=WebSocketProtocol,
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,  # RFB is compressed already, a serial line is small
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=MAX_HEAD,
        )
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        self._unix: tuple[int, int] | None = None
        self.https_address: str | None = None
        """host:port where HTTPS is served, with the real port when 0 was asked for."""

    async def start(self) -> None:
        """Listen on both. InUse, InvalidInput, NotPermitted... when one cannot be had; nothing stays open then."""
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._config.load()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.stop)
            await self._serve(unix_listener(self._unix_path), None)
            found = self._unix_path.stat()
            self._unix = (found.st_dev, found.st_ino)
            if self._listen is not None and self._tls is not None:
                listener = tcp_listener(self._listen)
                self.https_address = address_of(listener)
                await self._serve(listener, self._tls)
            undo.pop_all()

    async def stop(self) -> None:
        """Take no new connections, let what is under way end within GRACE seconds, close the rest. Streams and
        consoles end at once. Harmless when stopped."""
        self._rest.closing.set()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._remove_socket()
        for connection in list(self._state.connections):
            with contextlib.suppress(HostlerError, RuntimeError):
                connection.shutdown()
        if self._state.tasks:
            _, late = await asyncio.wait(set(self._state.tasks), timeout=GRACE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=GRACE)
        for connection in list(self._state.connections):
            connection.transport.abort()

    async def _serve(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: HttpProtocol(self._config, self._state, {}),
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_TIME if tls else None,
            ssl_shutdown_timeout=GRACE if tls else None,
        )
        self._servers.append(server)

    def _remove_socket(self) -> None:
        """Only if it is still ours: a next daemon may have made its own there."""
        if self._unix is None:
            return
        with contextlib.suppress(FileNotFoundError):
            found = self._unix_path.stat()
            if (found.st_dev, found.st_ino) == self._unix:
                self._unix_path.unlink()
        self._unix = None
