"""Blocking file work from the event loop, with a deadline: a file may be on a network share whose server is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from hostler.model.errors import TimedOut

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds for looking at files. The thread stays behind when it is over: nothing ends a system call on a dead share."""


async def in_thread(subject: str, work: Callable[[], T]) -> T:
    """What `work` returns, computed in a thread. TimedOut about `subject` after DEADLINE."""
    try:
        async with asyncio.timeout(DEADLINE):
            return await asyncio.to_thread(work)
    except TimeoutError as error:
        raise TimedOut(
            subject, f"the file system did not answer within {DEADLINE:.0f} s", "look at the disk or share it is on"
        ) from error


@asynccontextmanager
async def within(subject: str, deadline: float) -> AsyncIterator[None]:
    """TimedOut about `subject` when the block, which talks to a storage system, takes longer than `deadline` s."""
    try:
        async with asyncio.timeout(deadline):
            yield
    except TimeoutError as error:
        raise TimedOut(
            subject, f"did not answer within {deadline:.0f} s", "look at the network and the storage system"
        ) from error


async def whole(work: Coroutine[Any, Any, T], undo: Callable[[T], Awaitable[None]]) -> T:
    """Await `work` to its end even when cancelled meanwhile (a thread or a commit cannot be stopped half-way); in that
    case its result is undone before the cancellation goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await undo(task.result())
        raise


async def interruptible(work: Callable[[Callable[[], bool]], T]) -> T:
    """What `work` returns, computed in a thread that may take long. It is handed a question, "stop?", which it asks now
    and then; the answer is yes once whoever awaits this was cancelled, and the thread has ended when this has."""
    stopped = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stopped.is_set))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait({task})
        raise
