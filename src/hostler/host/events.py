"""The event stream: every change of a VM, volume, job or host, to whoever listens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

from hostler.model.base import Record
from hostler.model.views import Event

BACKLOG = 10_000
"""Events a listener may be behind; then its stream ends, and it must read the present state and listen again."""


class EventHub:
    """Publishes to any number of listeners without ever waiting for one."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._listeners: set[asyncio.Queue[Event | None]] = set()

    def publish(self, kind: str, key: str, value: Record | None) -> None:
        """Tell everybody that `key` of `kind` is now `value` (None: gone)."""
        if not self._listeners:
            next(self._ids)
            return
        event = Event(id=next(self._ids), kind=kind, key=key, data=None if value is None else value.to_json())
        for queue in list(self._listeners):
            self._offer(queue, event)

    def _offer(self, queue: asyncio.Queue[Event | None], event: Event) -> None:
        if queue.qsize() < BACKLOG:
            queue.put_nowait(event)
        else:
            self._listeners.discard(queue)
            queue.put_nowait(None)

    async def subscribe(self) -> AsyncIterator[Event]:
        """Events from the first `anext` on; ends when the host stops or the listener is too slow."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """End every stream."""
        for queue in self._listeners:
            queue.put_nowait(None)
        self._listeners.clear()
