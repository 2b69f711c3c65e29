"""The outermost layer around the application: the audit trail, the Date header, and faults of ours."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import structlog
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hostler.api.rest.errors import INTERNAL, PROBLEM, problem_response
from hostler.api.rest.guard import FACTS, caller_in, endpoint_of
from hostler.api.rest.protocol import PRINCIPAL
from hostler.api.rest.state import rest_of
from hostler.identity.audit import AuditEntry
from hostler.model.errors import ErrorCode
from hostler.model.principal import Principal
from hostler.model.problem import Problem

log = structlog.get_logger()

READS = frozenset({"GET", "HEAD", "OPTIONS"})
STRANGERS_PER_MINUTE = 60
"""Refused requests of unknown callers that are written down in a minute; so nobody without a name can push the history
out of the trail. The next line tells how many were left out."""


class Edge:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._minute = 0.0
        self._strangers = 0
        self._left_out = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or web socket."""
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"date", _date())]}
            elif message["type"] == "websocket.accept":
                status = 101
                self._audit(HTTPConnection(scope), status)  # now, and not when the console is closed hours later
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            pass  # while we read its body: there is nobody to answer
        except Exception:  # the top of a request: whatever it is, the caller gets the one error shape
            log.exception("api.fault", endpoint=endpoint_of(HTTPConnection(scope)))
            problem = INTERNAL
            scope[PROBLEM] = problem
            if status == 0:
                await _answer(problem, scope, receive, noting)
        finally:
            if status != 101:
                self._audit(HTTPConnection(scope), status)

    def _audit(self, connection: HTTPConnection, status: int) -> None:
        endpoint = endpoint_of(connection)
        problem = connection.scope.get(PROBLEM)
        code = problem.code if isinstance(problem, Problem) else None
        refused = code in (ErrorCode.NOT_AUTHENTICATED, ErrorCode.NOT_PERMITTED)
        if endpoint is None or (connection.scope.get("method", "WEBSOCKET") in READS and not refused):
            return
        facts = dict(connection.scope.get(FACTS) or {})
        if code is ErrorCode.NOT_AUTHENTICATED and not self._room_for_stranger(facts):
            return
        query = connection.scope["query_string"].decode("latin-1")
        entry = AuditEntry(
            who=_who(connection),
            what=endpoint,
            object=connection.scope["path"] + (f"?{query}" if query else ""),
            outcome=str(code) if code else _outcome(status),
            status=status,
            facts=facts,
        )
        try:
            rest_of(connection).identity.audit.record(entry)
        except OSError as error:  # a full disk must not keep anybody from stopping a VM; the log tells
            log.error("audit.lost", error=str(error), **entry.to_json())

    def _room_for_stranger(self, facts: dict[str, Any]) -> bool:
        now = time.monotonic()
        if now - self._minute >= 60:
            self._minute, self._strangers = now, 0
        self._strangers += 1
        if self._strangers > STRANGERS_PER_MINUTE:
            self._left_out += 1
            return False
        if self._left_out:
            facts["left_out_before"] = str(self._left_out)
            self._left_out = 0
        return True


async def _answer(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """To an HTTP request, or instead of accepting a web socket."""
    await problem_response(problem)(scope, receive, send)


def _who(connection: HTTPConnection) -> str:
    principal = connection.scope.get(PRINCIPAL)
    if isinstance(principal, Principal):
        return principal.name
    return f"unknown ({caller_in(connection).address or 'no address'})"


def _outcome(status: int) -> str:
    """0: the caller was gone before the answer; 202: a job that goes on."""
    return {0: "unanswered", 202: "accepted", 101: "opened"}.get(status, "done" if status < 400 else "refused")


def _date() -> bytes:
    return formatdate(usegmt=True).encode()
