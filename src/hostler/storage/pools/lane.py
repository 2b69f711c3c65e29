"""File calls that may never return (a dead network share), kept apart: one thread for each pool at most.

A call that hangs in the kernel cannot be ended. In the event loop's own pool of threads a few of them would stop every
other file call of the daemon; here a pool that hangs costs one thread, and whoever asks it again meanwhile is told at
once. The threads are daemonic, so that a hanging share does not keep the daemon from ending either.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from hostler.model.errors import HostlerError, InternalError, TimedOut

log = structlog.get_logger()
T = TypeVar("T")


class Lane:
    """Runs the file calls of one pool, one at a time."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._lock = asyncio.Lock()
        self._running: asyncio.Future[None] | None = None
        self._since = 0.0

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        """What `work` returns. TimedOut after `deadline` seconds, and at once while an earlier call still hangs."""
        self._refuse_if_stuck(deadline)
        try:
            async with asyncio.timeout(deadline), self._lock:
                if self._running is not None:  # whoever asked for it has given up; it may still come to an end
                    await asyncio.shield(self._running)
                return await self._call(work)
        except TimeoutError as error:
            raise TimedOut(
                self._subject,
                f"its file system did not answer within {deadline:.0f} s",
                "look at the disk or share it is on",
            ) from error

    def _refuse_if_stuck(self, deadline: float) -> None:
        waited = time.monotonic() - self._since
        if self._running is not None and not self._running.done() and waited > deadline:
            raise TimedOut(
                self._subject,
                f"its file system has not answered for {waited:.0f} s",
                "look at the disk or share it is on",
            )

    async def _call(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        ended: asyncio.Future[None] = loop.create_future()

        def tell(done: Callable[[], None]) -> None:
            def both() -> None:
                if not ended.done():
                    ended.set_result(None)
                if not result.done():
                    done()

            try:
                loop.call_soon_threadsafe(both)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

        def main() -> None:
            try:
                value = work()
            except (HostlerError, OSError) as error:
                failure: Exception = error
                tell(lambda: result.set_exception(failure))
            except Exception:  # the top of a thread: a fault of ours must not leave somebody waiting
                log.exception("pool.file-call-fault", subject=self._subject)
                fault = InternalError(self._subject, "a file call of ours failed", "see the daemon's log")
                tell(lambda: result.set_exception(fault))
            else:
                tell(lambda: result.set_result(value))

        self._running, self._since = ended, time.monotonic()
        threading.Thread(target=main, name=self._subject, daemon=True).start()
        return await result
