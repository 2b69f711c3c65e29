"""The blocking transport: one connection pool to one host, over its unix socket or https."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpcore2
import httpx2

from hostler.client import wire
from hostler.client.calls import Call
from hostler.client.target import Target

STALE = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)
"""What a kept connection that the host closed meanwhile looks like."""
KEEPALIVE = 15.0
"""Seconds between the comments of an event stream (the API's promise)."""


class _Sent:
    """Whether bytes of the request may have left, as told by the HTTP library's own trace."""

    def __init__(self) -> None:
        self.yes = False

    def __call__(self, event: str, _info: dict[str, Any]) -> None:
        if event.endswith(wire.SENDING):
            self.yes = True


class _UnixBackend(httpcore2.SyncBackend):
    """Finds out whether anybody listens before the library tries: httpcore2 2.16 leaves a socket that it could not
    connect open until the garbage collector finds it, and Python warns of that."""

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.NetworkStream:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(timeout)
            try:
                probe.connect(path)
            except TimeoutError as error:
                raise httpcore2.ConnectTimeout(str(error)) from error
            except OSError as error:
                raise httpcore2.ConnectError(str(error)) from error
        return super().connect_unix_socket(path, timeout, socket_options)


def _http_transport(target: Target) -> httpx2.HTTPTransport:
    context = wire.tls_context(target)
    transport = httpx2.HTTPTransport(verify=context, trust_env=False, uds=target.socket)
    if target.socket is not None:
        transport._pool = httpcore2.ConnectionPool(
            ssl_context=context, uds=target.socket, network_backend=_UnixBackend()
        )
    return transport


class Transport:
    """Sends calls to one host. Every call has a deadline; every failure is a HostlerError."""

    def __init__(self, target: Target, deadline: float = wire.DEADLINE) -> None:
        self.target = target
        self.deadline = deadline
        self._http = httpx2.Client(
            base_url=target.url or wire.UNIX_BASE,
            headers=wire.headers(target),
            transport=_http_transport(target),
            trust_env=False,
        )

    def send(self, call: Call[Any], deadline: float | None = None) -> bytes:
        """The raw content of the answer; the host's own error when it refused. `deadline` in seconds."""
        seconds = self.deadline if deadline is None else deadline
        sent = _Sent()
        try:
            try:
                return self._exchange(call, seconds, sent)
            except STALE:
                if not call.repeatable:
                    raise
                return self._exchange(call, seconds, sent)
        except httpx2.HTTPError as error:
            raise wire.explain(error, self.target, sent.yes, seconds + call.wait) from error

    def _exchange(self, call: Call[Any], seconds: float, sent: _Sent) -> bytes:
        end = time.monotonic() + seconds + call.wait
        with self._http.stream(
            call.method,
            call.path,
            params=dict(call.query),
            content=call.content(),
            headers=wire.request_headers(call),
            timeout=wire.timeout(call, seconds),
            extensions={"trace": sent},
        ) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer did not end")
            return wire.check(response.status_code, b"".join(parts), f"{call.method} {call.path}")

    @contextmanager
    def lines(self, path: str, query: dict[str, str]) -> Iterator[Iterator[str]]:
        """The lines of a stream that has no end. PeerUnreachable when it breaks, TimedOut when even the host's
        keepalive comments stay out."""
        sent = _Sent()
        patience = httpx2.Timeout(KEEPALIVE * 3, connect=wire.CONNECT_DEADLINE)
        try:
            with self._http.stream("GET", path, params=query, timeout=patience, extensions={"trace": sent}) as response:
                if response.status_code >= 300:
                    wire.check(response.status_code, response.read(), f"GET {path}")
                yield response.iter_lines()
        except httpx2.HTTPError as error:
            raise wire.explain(error, self.target, sent.yes, KEEPALIVE * 3) from error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
