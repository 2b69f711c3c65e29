"""One consumer of a store's changes: bounded, so that one that sleeps costs no memory without end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from hostler.store.contract import Change, CheckFailed

LIMIT = 10_000
"""Changes a consumer may fall behind (the contract's number)."""


class Watcher:
    """An async iterator over the changes of keys that start with `prefix`. Belongs to one event loop."""

    def __init__(self, prefix: str, limit: int = LIMIT) -> None:
        self._prefix = prefix
        self._limit = limit
        self._queue: deque[Change] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._overrun = False

    def offer(self, changes: Sequence[Change]) -> None:
        """Take what concerns this consumer; when it is too far behind, drop all and remember that."""
        if self._ended or self._overrun:
            return
        self._queue.extend(change for change in changes if change.key.startswith(self._prefix))
        if len(self._queue) > self._limit:
            self._queue.clear()
            self._overrun = True
        if self._queue or self._overrun:
            self._wake.set()

    def end(self) -> None:
        """Nothing more comes; what is queued is still delivered."""
        self._ended = True
        self._wake.set()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Change:
        while not self._queue:
            if self._overrun:
                self._overrun, self._ended = False, True
                raise CheckFailed(self._prefix)
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()

    async def aclose(self) -> None:
        """Stop watching: what is queued is dropped."""
        self._queue.clear()
        self.end()
