"""Failures on request, by the name of the method they shall happen in."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Hang:
    """A call that is held up: `reached` when it has come, goes on when `release` is set."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)


class Faults:
    """What goes wrong in which method. Every method of a simulated thing begins with `enter`."""

    def __init__(self) -> None:
        self._planned: dict[str, deque[BaseException | Hang]] = {}
        self.calls: list[str] = []
        """Names of the methods called so far, in order."""

    def fail(self, method: str, error: BaseException, times: int = 1) -> None:
        """The next `times` calls raise `error` and do nothing."""
        self._planned.setdefault(method, deque()).extend([error] * times)

    def hang(self, method: str) -> Hang:
        """The next call waits until it is released."""
        hang = Hang()
        self._planned.setdefault(method, deque()).append(hang)
        return hang

    def clear(self) -> None:
        """Nothing goes wrong any more; who hangs stays so until released."""
        self._planned.clear()

    async def enter(self, method: str) -> None:
        """Called at the beginning of each method."""
        self.calls.append(method)
        planned = self._planned.get(method)
        if not planned:
            return
        fault = planned.popleft()
        if isinstance(fault, Hang):
            fault.reached.set()
            await fault.release.wait()
        else:
            raise fault
