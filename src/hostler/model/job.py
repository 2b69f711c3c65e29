"""Jobs: long work as named steps, each with its undo, recorded before it runs.

queued --> running --> done
running --a step fails--> unwinding --> failed
queued|running --cancel--> unwinding --> cancelled
running --daemon dies--> (at the next start) running again, or unwinding --> failed (interrupted)
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field, JsonValue

from hostler.model.base import Record
from hostler.model.problem import Problem


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    UNWINDING = "unwinding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


J = JobState
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    J.QUEUED: frozenset({J.RUNNING, J.CANCELLED, J.UNWINDING, J.FAILED}),
    J.RUNNING: frozenset({J.DONE, J.UNWINDING}),
    J.UNWINDING: frozenset({J.FAILED, J.CANCELLED}),
    J.DONE: frozenset(),
    J.FAILED: frozenset(),
    J.CANCELLED: frozenset(),
}
ENDED = frozenset({J.DONE, J.FAILED, J.CANCELLED})


class StepState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNDONE = "undone"


class JobStep(Record):
    name: str
    state: StepState = StepState.PENDING
    started: datetime | None = None
    ended: datetime | None = None


class Progress(Record):
    """How far a job is. `fraction` 0.0 to 1.0 or None where nobody can know; `detail` depends on the kind of job
    (for `vm.migrate` it is a MigrationProgress)."""

    fraction: float | None = Field(default=None, ge=0, le=1)
    text: str = ""
    detail: dict[str, JsonValue] = {}


class Job(Record):
    """`kind` is "noun.verb" ("vm.start"); `target` the id of the object it changes, `target_name` for people; `data`
    what steps found out and later steps or the recovery after a crash need. `result` is set when done."""

    id: str
    kind: str
    target: str
    target_name: str = ""
    state: JobState = JobState.QUEUED
    steps: tuple[JobStep, ...] = ()
    progress: Progress = Progress()
    params: dict[str, JsonValue] = {}
    data: dict[str, JsonValue] = {}
    result: dict[str, JsonValue] | None = None
    error: Problem | None = None
    by: str = ""
    created: datetime
    ended: datetime | None = None
    cancellable: bool = True

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in ENDED
