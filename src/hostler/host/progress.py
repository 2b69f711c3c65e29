"""How far a copy is, in words and numbers people can use."""

from __future__ import annotations

import time
from collections.abc import Callable

from hostler.host.steps import JobContext
from hostler.model.blockjob import BlockJob
from hostler.model.job import Progress
from hostler.model.units import format_size

SMOOTHING = 0.3
"""Weight of the newest rate in the average shown."""
SHORTEST = 0.2
"""Seconds between two looks at the rate."""


class CopyProgress:
    """Shows a copy's progress on its job: `detail` has `done`, `total` (bytes), `rate` (bytes/s), `left` (seconds)."""

    def __init__(self, context: JobContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._last: tuple[float, int] | None = None
        self._rate = 0.0

    def block_job(self, job: BlockJob) -> None:
        """The newest state of QEMU's job."""
        self.show(job.done, job.total)

    def show(self, done: int, total: int) -> None:
        """`done` of `total` bytes are copied."""
        self._measure(done)
        left = max(0, total - done)
        seconds = left / self._rate if self._rate else None
        text = f"{format_size(done)} of {format_size(total)}" if total else ""
        if total and self._rate:
            text += f", {format_size(int(self._rate))}/s"
        self._context.progress(
            Progress(
                fraction=min(1.0, done / total) if total else None,
                text=text,
                detail={
                    "done": done,
                    "total": total,
                    "rate": int(self._rate),
                    "left": None if seconds is None else round(seconds, 1),
                },
            )
        )

    def _measure(self, done: int) -> None:
        now = self._clock()
        if self._last is None or done < self._last[1]:
            self._last = (now, done)
            return
        then, before = self._last
        if now - then < SHORTEST:
            return
        rate = (done - before) / (now - then)
        self._rate = rate if not self._rate else self._rate + SMOOTHING * (rate - self._rate)
        self._last = (now, done)
