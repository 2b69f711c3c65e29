"""When a copy that is kept up to date is near enough to be finished. Pure.

QEMU calls a mirror ready when nothing is left to copy, which a guest that writes all the time may never let happen. Two
things are done about it: a rest that is copied in no time is copied while the guest stands still, and a guest that
writes more than is copied is slowed down.

    copying --ready, or the rest stays small--> SWITCH
       |--the guest writes about as much as is copied--> BRAKE: half of what is copied, then a quarter, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hostler.model.units import MiB

SMALL = 4 * MiB
"""Bytes that any storage copies within the pause of a switch."""
PAUSE = 0.03
"""Seconds of copying that may be left for the pause."""
STAYS = 1.0
"""Seconds the rest must have been small: a copy that becomes ready by itself has a shorter pause."""
WINDOW = 8.0
"""Seconds over which it is judged whether the guest writes too much."""
TOO_MUCH = 0.8
"""Part of what is copied that the guest may write anew."""
LEAST = 64 * 1024
"""Bytes/s a guest may write however long it takes."""


class Verdict(Enum):
    """What to do."""

    GO_ON = "go on"
    SWITCH = "switch"
    BRAKE = "brake"


@dataclass(slots=True)
class Convergence:
    """Looks at one copy's counters. `allowed`: bytes/s the guest may write after the last BRAKE, 0 before."""

    allowed: int = 0
    _small_since: float | None = None
    _mark: tuple[float, int, int] | None = None

    def look(self, now: float, done: int, total: int) -> Verdict:
        """`now` in seconds; `done` and `total` in bytes, `total` grows with what the guest writes."""
        rest = max(0, total - done)
        if self._mark is None:
            self._mark = (now, done, total)
        then, before, had = self._mark
        rate = (done - before) / (now - then) if now > then else 0.0
        if total and done and rest <= max(SMALL, rate * PAUSE):
            self._small_since = now if self._small_since is None else self._small_since
            return Verdict.SWITCH if now - self._small_since >= STAYS else Verdict.GO_ON
        self._small_since = None
        if now - then < WINDOW:
            return Verdict.GO_ON
        self._mark = (now, done, total)
        if not rate or total - had < (done - before) * TOO_MUCH:
            return Verdict.GO_ON
        self.allowed = max(LEAST, int(min(self.allowed or rate, rate) / 2))
        return Verdict.BRAKE
