"""The HTTP/1.1 and web socket protocols of uvicorn, with what Hostler needs beside: who is at the other end of the
connection, and a limit on how long a client may take to say what it wants.

uvicorn gives an application neither the client certificate nor the credentials of a unix socket; both are read once
per connection here and put into scope["extensions"] of each request.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from hostler.identity.gate import Caller
from hostler.identity.local import credentials_of
from hostler.model.errors import ErrorCode
from hostler.model.problem import Problem

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
    from uvicorn.config import Config
    from uvicorn.server import ServerState

CALLER = "hostler.caller"
"""Key of the Caller in scope["extensions"]."""
PRINCIPAL = "hostler.principal"
"""Key in the scope under which the guard leaves who calls."""

HEAD_TIME = 20.0
"""Seconds a client has for the head of a request, from its first byte (or from connecting) on."""
BODY_TIME = 60.0
"""Seconds for the body. The route's own reader is stricter; this one also holds for bodies nobody reads."""


def caller_of(transport: asyncio.BaseTransport) -> Caller:
    """Who is at the other end, as far as the kernel and TLS know."""
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls is not None else None
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        try:
            credentials = credentials_of(connection)
        except OSError:  # gone already: nobody
            return Caller()
        return Caller(credentials=credentials, address=f"pid {credentials.pid}, uid {credentials.uid}")
    name = transport.get_extra_info("peername")
    return Caller(certificate=certificate, address=str(name[0]) if isinstance(name, tuple) else "")


KEEP_ALIVE = 3600
"""Seconds an idle connection of a known caller stays open. Long for the sake of hosts: a handshake in the middle of a
migration's pause would be felt by the guest."""
STRANGER_TIME = 20
"""Seconds for one whose last request was refused since nobody knows it: it must not be able to hold places."""
MAX_CONNECTIONS = 2000
"""On each listener, so that a flood over the network does not lock out the administrator on the machine."""


class _Identified:
    """The application, told who calls."""

    def __init__(self, app: ASGI3Application) -> None:
        self._app = app
        self._scope: dict[str, Any] = {}
        self.caller = Caller()

    @property
    def is_known(self) -> bool:
        """Whether the guard knew who sent the last request."""
        return self._scope.get(PRINCIPAL) is not None

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        extended: dict[str, Any] = dict(scope)
        extended["extensions"] = {**(extended.get("extensions") or {}), CALLER: self.caller}
        self._scope = extended
        await self._app(extended, receive, send)  # type: ignore[arg-type]  # uvicorn types scopes as closed dicts


class HttpProtocol(H11Protocol):
    """One HTTP connection, on either listener."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._identified = _Identified(self.app)
        self.app = self._identified
        self._timer: asyncio.TimerHandle | None = None
        self._timed: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base
        """A client connected; TLS is done."""
        super().connection_made(transport)
        self._identified.caller = caller_of(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "there are too many connections", ErrorCode.BUSY)
        else:
            self._arm(HEAD_TIME, h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; a request that is not complete now must be so in time."""
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            self._disarm()
            return
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._arm(BODY_TIME, state)
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            self._arm(HEAD_TIME, state)
        else:
            self._disarm()

    def on_response_complete(self) -> None:
        """The connection is idle from now on, for as long as its user deserves."""
        self.timeout_keep_alive = KEEP_ALIVE if self._identified.is_known else STRANGER_TIME
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Not HTTP, or too large a head: the one error shape here too."""
        self._refuse(400, f"{msg.rstrip('.').lower()}, or its head is larger than allowed")

    def _arm(self, seconds: float, state: object) -> None:
        if self._timer is not None and self._timed is state:
            return
        self._disarm()
        self._timed = state
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self._refuse(408, "the request did not arrive in time")

    def _refuse(self, status: int, cause: str, code: ErrorCode = ErrorCode.INVALID_INPUT) -> None:
        """Answer when nothing was answered yet, and close."""
        self._disarm()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = Problem(code=code, object="request", cause=cause).model_dump_json().encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One web socket, on either listener."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._identified = _Identified(self.app)
        self.app = self._identified

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The HTTP connection became a web socket."""
        super().connection_made(transport)
        self._identified.caller = caller_of(transport)
