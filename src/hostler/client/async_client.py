"""The asyncio transport, and the client on it for tests, measurements and anything that holds many connections.

async with AsyncClient(target) as client:
    job = await client.send(calls.vm_start("web1", wait=60))
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx2

from hostler.client import answers, calls, wire
from hostler.client.calls import Call
from hostler.client.client import POLL, outcome
from hostler.client.http import KEEPALIVE, STALE
from hostler.client.target import Target, find_target
from hostler.model.errors import TimedOut

if TYPE_CHECKING:
    from hostler.model.job import Job
    from hostler.model.views import Event

T = TypeVar("T")


class _Sent:
    """Whether bytes of the request may have left."""

    def __init__(self) -> None:
        self.yes = False

    async def __call__(self, event: str, _info: dict[str, Any]) -> None:
        if event.endswith(wire.SENDING):
            self.yes = True


class AsyncTransport:
    """Sends calls to one host from an event loop. The deadline covers the whole exchange, connecting included."""

    def __init__(
        self, target: Target, deadline: float = wire.DEADLINE, *, context: ssl.SSLContext | None = None
    ) -> None:
        self.target = target
        self.deadline = deadline
        self._http = httpx2.AsyncClient(
            base_url=target.url or wire.UNIX_BASE,
            headers=wire.headers(target),
            trust_env=False,
            transport=httpx2.AsyncHTTPTransport(
                verify=context or wire.tls_context(target),
                trust_env=False,
                uds=target.socket,
                limits=httpx2.Limits(max_connections=256, max_keepalive_connections=16, keepalive_expiry=None),
            ),
        )

    async def send(self, call: Call[Any], deadline: float | None = None) -> bytes:
        """The raw content of the answer; the host's own error when it refused. `deadline` in seconds."""
        status, content = await self.exchange(call, self.deadline if deadline is None else deadline)
        return wire.check(status, content, f"{call.method} {call.path}")

    async def exchange(self, call: Call[Any], seconds: float) -> tuple[int, bytes]:
        """HTTP status and content, whatever the host answered. Only a GET is repeated when a kept connection turns
        out to have been closed by the other side."""
        sent = _Sent()
        try:
            async with asyncio.timeout(seconds + call.wait):
                try:
                    return await self._request(call, seconds, sent)
                except STALE:
                    if not call.repeatable:
                        raise
                    return await self._request(call, seconds, sent)
        except TimeoutError as error:
            late = httpx2.ReadTimeout("no answer within the deadline")
            raise wire.explain(late, self.target, sent.yes, seconds + call.wait) from error
        except httpx2.HTTPError as error:
            raise wire.explain(error, self.target, sent.yes, seconds + call.wait) from error

    async def _request(self, call: Call[Any], seconds: float, sent: _Sent) -> tuple[int, bytes]:
        response = await self._http.request(
            call.method,
            call.path,
            params=dict(call.query),
            content=call.content(),
            headers=wire.request_headers(call),
            timeout=wire.timeout(call, seconds),
            extensions={"trace": sent},
        )
        return response.status_code, response.content

    async def lines(self, path: str, query: dict[str, str]) -> AsyncIterator[str]:
        """The lines of a stream that has no end."""
        sent = _Sent()
        patience = httpx2.Timeout(KEEPALIVE * 3, connect=wire.CONNECT_DEADLINE)
        try:
            async with self._http.stream(
                "GET", path, params=query, timeout=patience, extensions={"trace": sent}
            ) as response:
                if response.status_code >= 300:
                    wire.check(response.status_code, await response.aread(), f"GET {path}")
                async for line in response.aiter_lines():
                    yield line
        except httpx2.HTTPError as error:
            raise wire.explain(error, self.target, sent.yes, KEEPALIVE * 3) from error

    async def close(self) -> None:
        await self._http.aclose()


class AsyncClient:
    """A connection to one host. The calls are those of `hostler.client.calls`."""

    def __init__(self, host: str | Target | None = None, *, deadline: float = wire.DEADLINE) -> None:
        target = host if isinstance(host, Target) else find_target(host)
        self.transport = AsyncTransport(target, deadline)

    async def send(self, call: Call[T]) -> T:
        """The answer of any call."""
        return wire.parse(call, await self.transport.send(call))

    async def finish(self, job: Job, timeout: float) -> Job:
        """Waits until the job is over and raises what made it fail; TimedOut (after `timeout` s) leaves it running."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not job.is_over:
            left = end - loop.time()
            if left <= 0:
                raise TimedOut(f"job {job.id}", f"is not over after {timeout:g} s", "it runs on", job=job.id)
            job = await self.send(calls.job(job.id, wait=min(left, POLL)))
        return outcome(job)

    async def events(self, kind: str | None = None, key: str | None = None) -> AsyncIterator[Event]:
        """Changes from now on. It ends when the host stops; PeerUnreachable when the connection breaks."""
        async for line in self.transport.lines("/v1/events", calls.events_query(kind, key)):
            if line.startswith("data:"):
                yield answers.EVENT.parse(line.removeprefix("data:").strip().encode())

    async def close(self) -> None:
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
