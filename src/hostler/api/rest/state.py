"""What the routes share, kept in `app.state.rest`, and the dependencies by which they get at it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from hostler.api.rest.protocol import PRINCIPAL
from hostler.api.rest.services import Application
from hostler.identity.gate import Identity
from hostler.model.principal import Principal

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rest:
    """`closing` is set when the daemon stops: whatever waits for something then stops waiting. `consoles` are the
    sockets of guests that a client holds now."""

    application: Application
    identity: Identity
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    consoles: set[str] = field(default_factory=set)


def rest_of(connection: HTTPConnection) -> Rest:
    """The shared state behind a request."""
    return cast(Rest, connection.app.state.rest)


# Dependencies are coroutines since FastAPI runs plain functions in a thread, which costs more than all the rest.


async def _application(connection: HTTPConnection) -> Application:
    return rest_of(connection).application


async def _principal(connection: HTTPConnection) -> Principal:
    return cast(Principal, connection.scope[PRINCIPAL])


async def _by(connection: HTTPConnection) -> str:
    return cast(Principal, connection.scope[PRINCIPAL]).name


async def _peer_id(connection: HTTPConnection) -> str:
    return cast(Principal, connection.scope[PRINCIPAL]).host_id or ""


async def _rest(connection: HTTPConnection) -> Rest:
    return rest_of(connection)


App = Annotated[Application, Depends(_application)]
By = Annotated[str, Depends(_by)]
"""Name of the caller, for jobs and records."""
Caller = Annotated[Principal, Depends(_principal)]
PeerId = Annotated[str, Depends(_peer_id)]
"""Id of the host that calls; only on routes that ask for the permission `peer`."""
Shared = Annotated[Rest, Depends(_rest)]


async def while_wanted(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The outcome of `work`, or None as soon as the client has hung up or the daemon stops."""
    waiting: list[asyncio.Task[Any]] = [
        asyncio.create_task(work),
        asyncio.create_task(_hung_up(request)),
        asyncio.create_task(rest_of(request).closing.wait()),
    ]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return cast(_T, waiting[0].result()) if waiting[0].done() else None
    finally:
        await _end(waiting)


async def _hung_up(request: Request) -> None:
    receive: Awaitable[Any]
    while True:
        receive = request.receive()
        if (await receive)["type"] == "http.disconnect":
            return


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
