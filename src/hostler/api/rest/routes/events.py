"""The event stream (server-sent events, HTML standard 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Query
from fastapi.responses import StreamingResponse

from hostler.api.rest.guard import noun_router
from hostler.api.rest.state import Rest, Shared
from hostler.model.views import Event

router = noun_router("event")

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent: proxies drop connections that are silent for 30 to 60 s."""


class EventStream(StreamingResponse):
    """So that the API description knows the media type."""

    media_type = "text/event-stream"


@router.get(
    "/events", response_class=EventStream, responses={200: {"model": Event, "description": "A stream of these"}}
)
async def stream_events(
    rest: Shared,
    kind: Annotated[str | None, Query(max_length=100, description="Only of this kind: vm, volume, job, host")] = None,
    key: Annotated[str | None, Query(max_length=300, description="Only about the object with this id")] = None,
) -> EventStream:
    """Every change from now on, as it happens. The first line is a comment: what happens after it is not missed. The
    stream ends when the host stops or the client is too slow: then read the present state and listen again."""
    return EventStream(_lines(rest, kind, key), headers={"cache-control": "no-store"})


async def _lines(rest: Rest, kind: str | None, key: str | None) -> AsyncIterator[bytes]:
    events = rest.application.events.subscribe()
    closing = asyncio.ensure_future(rest.closing.wait())
    following = asyncio.ensure_future(_next(events))
    try:
        await asyncio.sleep(0)  # lets the subscription begin before the client is told that it has
        yield b": listening\n\n"
        while True:
            await asyncio.wait({following, closing}, timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                return
            if not following.done():
                yield b": alive\n\n"
                continue
            event = following.result()
            if event is None:
                return
            following = asyncio.ensure_future(_next(events))
            if kind in (None, event.kind) and key in (None, event.key):
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
    finally:
        for task in (following, closing):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)
