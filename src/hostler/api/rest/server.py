"""Serves the API on a unix socket and over HTTPS, with uvicorn's protocols on our own loop.

Not uvicorn's own `Server`: that wakes up ten times a second to see whether it shall stop, takes over the process's
signals, and gives TLS handshakes a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import cast

from fastapi import FastAPI
from uvicorn.config import Config
from uvicorn.server import ServerState

from hostler.api.rest.listeners import Listeners
from hostler.api.rest.protocol import HttpProtocol, WebSocketProtocol
from hostler.api.rest.state import Rest

HANDSHAKE_TIME = 10.0
"""Seconds for TLS."""
MAX_HEAD = 32 * 1024
"""Bytes of a request's head."""
MAX_FRAME = 1024**2
"""Bytes of a web socket message."""
GRACE = 3.0
"""Seconds that requests under way get to end when the daemon stops."""


class RestServer:
    """The API of one daemon, on sockets that are open already."""

    def __init__(self, app: FastAPI, listeners: Listeners, tls: ssl.SSLContext) -> None:
        """`tls`: for the TCP listener, where there is one."""
        self._rest = cast(Rest, app.state.rest)
        self._listeners = listeners
        self._tls = tls
        self._config = _config(app)
        self._served: list[tuple[asyncio.Server, ServerState]] = []

    async def start(self) -> None:
        """Begin to answer."""
        self._config.load()
        await self._serve(self._listeners.unix, None)
        if self._listeners.tcp is not None:
            await self._serve(self._listeners.tcp, self._tls)

    async def stop(self) -> None:
        """Take no new connections, let what is under way end within GRACE seconds, close the rest. Streams, waits and
        consoles end at once. Harmless when stopped."""
        self._rest.closing.set()
        for server, _ in self._served:
            server.close()
        self._listeners.close()
        for _, state in self._served:
            for connection in list(state.connections):
                connection.shutdown()
        await self._end_requests()
        for _, state in self._served:
            for connection in list(state.connections):
                # A TLS transport that was closed twice has let go of its protocol (asyncio of 3.11).
                with contextlib.suppress(AttributeError):
                    connection.transport.abort()
        self._served.clear()

    async def _end_requests(self) -> None:
        tasks = {task for _, state in self._served for task in state.tasks}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=GRACE)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=GRACE)

    async def _serve(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: HttpProtocol(self._config, state, {}),
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_TIME if tls else None,
            ssl_shutdown_timeout=GRACE if tls else None,
        )
        self._served.append((server, state))


def _config(app: FastAPI) -> Config:
    return Config(
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
        h11_max_incomplete_event_size=MAX_HEAD,
    )
