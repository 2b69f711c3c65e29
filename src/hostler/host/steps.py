"""What a job is made of: named steps with undo, and the context they work in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

from hostler.model.job import Job, Progress


class JobContext(Protocol):
    """What a step may do with its job."""

    @property
    def job(self) -> Job: ...

    async def remember(self, **data: JsonValue) -> None:
        """Record facts that later steps, or the recovery after a crash, need. On disk when it returns."""

    def progress(self, progress: Progress) -> None:
        """Show how far it is; cheap, may be called often."""

    def no_return(self) -> None:
        """From here on the job cannot be cancelled."""

    def result(self, result: dict[str, JsonValue]) -> None:
        """What the job hands to whoever asked for it, stored when it ends."""


Action = Callable[[JobContext], Awaitable[None]]


async def nothing(_context: JobContext) -> None:
    """An undo for steps that change nothing."""


@dataclass(frozen=True, slots=True)
class Step:
    """`do` must succeed when repeated after an interruption; `undo` must be harmless when `do` never ran, ran half, or
    `undo` ran before. `insist`: asked when the step has failed; while it says yes there is no way back, and the step is
    tried again until it succeeds."""

    name: str
    do: Action
    undo: Action = nothing
    insist: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Plan:
    """A job to be run. `finish` runs after the last step or the last undo, whatever happened, with the final job; it
    must not raise."""

    kind: str
    target: str
    target_name: str
    steps: Sequence[Step]
    params: dict[str, JsonValue] = field(default_factory=dict)
    data: dict[str, JsonValue] = field(default_factory=dict)
    cancellable: bool = True
    finish: Callable[[Job], Awaitable[None]] | None = None


StepHook = Callable[[str, str], Awaitable[None]]
"""Called around each step with "KIND/STEP" ("vm.migrate/pre-copy") and "before" or "after"; also by the target of a
move ("incoming/accept"). The testing package injects failures here; in production there is none."""
