"""Host-to-host calls over mutual TLS, for live migration.

What a move needs to know about a failed call is not that it failed but whether the other host may have acted on it:

- it answered with a refusal: the error it raised, or PeerRefused when it would not even listen;
- the request certainly never left: PeerUnreachable with details.sent False;
- it may have arrived, and no answer came: TimedOut, or PeerUnreachable, with details.sent True. The caller reads back.

`accept` is called while the guest stands still. So the connection is kept open between calls, and `warm` opens it
(TCP and TLS, several round trips) before the pause begins.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, TypeVar

from hostler.client import calls, wire
from hostler.client.async_client import AsyncTransport
from hostler.client.calls import Call
from hostler.client.target import Target
from hostler.model.errors import ErrorCode, HostlerError, PeerRefused

if TYPE_CHECKING:
    from hostler.model.migration import Blocker, IncomingRequest, IncomingStatus
    from hostler.model.views import HostView, OutgoingStatus, PeerIntroduction

T = TypeVar("T")

DEADLINE = 10.0
"""Seconds for one call between hosts. Preparing a target starts a QEMU, which has its own, longer deadline."""
PREPARE_DEADLINE = 60.0
_REFUSALS = frozenset({ErrorCode.NOT_AUTHENTICATED, ErrorCode.NOT_PERMITTED, ErrorCode.INTERNAL})
"""Codes that say more about the relation between the hosts than about the VM."""


class PeerClient:
    """One other host. Satisfies `hostler.cluster.peers.PeerLink`."""

    def __init__(self, base_url: str, ssl_context: ssl.SSLContext, deadline: float | None = None) -> None:
        """`base_url`: https://host:port; `ssl_context` knows our certificate and the other's; `deadline` in seconds
        (default DEADLINE)."""
        self.deadline = DEADLINE if deadline is None else deadline
        self._url = base_url.rstrip("/")
        self._transport = AsyncTransport(Target(url=self._url), self.deadline, context=ssl_context)

    async def warm(self) -> None:
        """Makes sure a connection is open, so that the next call needs no handshake. Any answer will do."""
        await self._transport.exchange(calls.version(), self.deadline)

    async def facts(self) -> HostView:
        return await self._send(calls.peer_facts())

    async def check(self, request: IncomingRequest) -> list[Blocker]:
        return await self._send(calls.peer_check(request))

    async def prepare(self, request: IncomingRequest) -> IncomingStatus:
        return await self._send(calls.peer_prepare(request), max(self.deadline, PREPARE_DEADLINE))

    async def status(self, move_id: str) -> IncomingStatus:
        return await self._send(calls.peer_status(move_id))

    async def accept(self, move_id: str) -> IncomingStatus:
        return await self._send(calls.peer_accept(move_id))

    async def refuse(self, move_id: str) -> IncomingStatus:
        return await self._send(calls.peer_refuse(move_id))

    async def outgoing(self, move_id: str) -> OutgoingStatus:
        return await self._send(calls.peer_outgoing(move_id))

    async def introduce(self, introduction: PeerIntroduction) -> PeerIntroduction:
        return await self._send(calls.peer_introduce(introduction))

    async def close(self) -> None:
        """Closes its connections."""
        await self._transport.close()

    async def _send(self, call: Call[T], deadline: float | None = None) -> T:
        status, content = await self._transport.exchange(call, self.deadline if deadline is None else deadline)
        return wire.parse(call, self._check(call, status, content))

    def _check(self, call: Call[Any], status: int, content: bytes) -> bytes:
        try:
            return wire.check(status, content, f"{call.method} {call.path}")
        except HostlerError as error:
            if error.code not in _REFUSALS:
                raise
            raise PeerRefused(
                f"host {self._url}", f"{error.object}: {error.cause}", error.advice, code=str(error.code), status=status
            ) from error
