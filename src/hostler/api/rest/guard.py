"""The one door: every route, of whatever kind, lets a caller in by the authorization table or not at all.

HTTP routes are `GuardedRoute`s, which ask before a byte of the body is read; web sockets depend on `admit`, which asks
before the handshake is accepted. `check_routes` refuses to start with a route that is neither or not in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute

from hostler.api.rest.body import bounded, names_in
from hostler.api.rest.protocol import CALLER, PRINCIPAL
from hostler.api.rest.state import rest_of
from hostler.identity.authorize import TABLE, Access, decide
from hostler.identity.gate import Caller
from hostler.model.errors import InternalError
from hostler.model.problem import Problem

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

FACTS = "hostler.facts"
"""Key in the scope under which the audit trail finds the names a request is about."""


def endpoint_of(connection: HTTPConnection) -> str | None:
    """The endpoint as the table names it ("POST /v1/vms/{vm}/start"); None when no route matched."""
    route = connection.scope.get("route")
    if not isinstance(route, APIRoute | APIWebSocketRoute):
        return None
    method = "WEBSOCKET" if isinstance(route, APIWebSocketRoute) else connection.scope["method"]
    return f"{method} {route.path}"


def caller_in(connection: HTTPConnection) -> Caller:
    """Who is at the other end, as the protocol found it."""
    caller = (connection.scope.get("extensions") or {}).get(CALLER)
    return caller if isinstance(caller, Caller) else Caller()


async def admit(connection: HTTPConnection) -> None:
    """Find out who calls and whether they may; NotAuthenticated or NotPermitted otherwise."""
    endpoint = endpoint_of(connection) or ""
    principal = None
    if TABLE.get(endpoint) is not Access.INVITED:
        identity = rest_of(connection).identity
        principal = await identity.identify(caller_in(connection), connection.headers.get("authorization"))
        connection.scope[PRINCIPAL] = principal
    decide(endpoint, principal)


class GuardedRoute(APIRoute):
    """A route that asks who calls first, and then reads the body within bounds."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler behind the guard."""
        inner = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            await admit(request)
            request, body = await bounded(request)
            request.scope[FACTS] = names_in(body) if request.method != "GET" else {}
            return await inner(request)

        return guarded


def noun_router(noun: str, prefix: str = "/v1") -> APIRouter:
    """A router for the endpoints of one noun."""
    return APIRouter(
        prefix=prefix,
        tags=[noun],
        route_class=GuardedRoute,
        responses={"default": {"model": Problem, "description": "Refused or failed"}},
        generate_unique_id_function=lambda route: route.name,
    )


def endpoints(routes: Iterable[BaseRoute]) -> list[str]:
    """Every endpoint of these routes as the table names it. InternalError for a route that is not guarded."""
    found: list[str] = []
    for route in routes:
        if isinstance(route, GuardedRoute):
            found += [f"{method} {route.path}" for method in sorted(route.methods or ())]
        elif isinstance(route, APIWebSocketRoute) and any(d.dependency is admit for d in route.dependencies):
            found.append(f"WEBSOCKET {route.path}")
        else:
            raise InternalError(f"route {getattr(route, 'path', route)}", "is not guarded", "make it with noun_router")
    return found


def check_routes(routes: Iterable[BaseRoute]) -> None:
    """InternalError when a route is not in the authorization table, or the table has one that does not exist."""
    have = set(endpoints(routes))
    unlisted, gone = sorted(have - set(TABLE)), sorted(set(TABLE) - have)
    if unlisted or gone:
        raise InternalError("authorization table", f"lacks {unlisted} and has too many {gone}", "correct TABLE")


ADMITTED = [Depends(admit)]
"""Dependencies of each web socket route."""
