"""Block jobs of a running VM: followed, ended, forgotten.

    mirror, commit of the top layer:  running --> ready --finish--> concluded --forget--> (none)
    commit below:                     running --> concluded --forget--> (none)
    stream:                           running --> pending --by whoever watches--> (none), remembered here
    any of them --cancel, an error--> as at its end

What QEMU 7.2 does, as measured:
- With `auto-dismiss` off a job stays, with its outcome, until it is forgotten. Until then it also holds its nodes, so
  that another job on the same disk is refused.
- A stream that has ended and is still there leaves a filter without a child in the graph: the next
  query-named-block-nodes kills QEMU. So a stream is dismissed by QEMU in the moment in which it ends, and ends only
  when somebody is there to see it, whom its event tells how.
- `job-cancel` ends a ready mirror or commit without its switch; what was copied so far is left in the target, and what
  a commit wrote into its base is what the layers above say anyway.
- Jobs pause for the moment of a drain (another command on the disk); that is no pause anybody should see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.errors import Cancelled, HostlerError, NotFound, QemuFailed, TimedOut, WrongState
from hostler.model.machine import MachineEvent
from hostler.qemu import commands_block as block
from hostler.qemu.failures import image_error
from hostler.qemu.qmp import EVENTS_LOST, EventStream, QmpSession

OnBlockJob = Callable[[BlockJob], None]

TICK = 0.25
"""Seconds between two readings of a job's counters."""
END_DEADLINE = 60.0
"""Seconds a job may take to end once it was told to: requests under way are awaited."""
EVENT_DEADLINE = 5.0
"""Seconds until the event that tells how a job ended which is no more."""

_STATES: Mapping[str, BlockJobState] = {
    "ready": BlockJobState.READY,
    "standby": BlockJobState.READY,
    "concluded": BlockJobState.DONE,
    "null": BlockJobState.DONE,
}
_OVER = (BlockJobState.DONE, BlockJobState.FAILED)
_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
_CANCELLED = "Operation canceled"
"""The error of a job that was cancelled (strerror of ECANCELED)."""


def block_job(job: block.Job) -> BlockJob:
    """QEMU's words as ours."""
    state = _STATES.get(job.status, BlockJobState.RUNNING)
    if state is BlockJobState.DONE and job.error:
        state = BlockJobState.FAILED
    return BlockJob(
        id=job.id, kind=job.kind, state=state, done=max(0, job.done), total=max(0, job.total), error=job.error
    )


class BlockJobs:
    """The jobs of one QEMU."""

    def __init__(self, qmp: QmpSession) -> None:
        self._qmp = qmp
        self._ended: dict[str, BlockJob] = {}
        """Jobs that are no more in QEMU and not forgotten."""

    async def find(self, job: str) -> BlockJob | None:
        """See `Blocks.job`."""
        found = (await block.query_jobs(self._qmp)).get(job)
        return self._ended.get(job) if found is None else block_job(found)

    async def watch(self, job: str, on_progress: OnBlockJob | None = None, until_ready: bool = False) -> BlockJob:
        """See `Blocks.watch`."""
        return await self._follow(job, self._qmp.events(), None, on_progress, until_ready)

    async def _follow(
        self,
        job: str,
        events: EventStream,
        seen: BlockJob | None,
        on_progress: OnBlockJob | None = None,
        until_ready: bool = False,
    ) -> BlockJob:
        """`seen`: how it was when `events` began."""
        while True:
            found = await self._look(job, seen, events)
            if found is None:
                raise NotFound(self._qmp.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
            seen = found
            if on_progress is not None:
                on_progress(found)
            if found.state in _OVER:
                return self._succeeded(found)
            if until_ready and found.state is BlockJobState.READY:
                return found
            event = await events.wait_for(lambda event: _tells_of(event, job), TICK)
            if event is not None and event.name in _ENDS:
                self._note_end(found, event)

    async def _look(self, job: str, seen: BlockJob | None, events: EventStream) -> BlockJob | None:
        """The job; one that waits for its end is ended, and one that has gone is known by its event."""
        found = (await block.query_jobs(self._qmp)).get(job)
        if found is not None and found.status == "pending":
            with suppress(QemuFailed):  # cancelled meanwhile, or ended by somebody else: its event tells
                await block.job_finalize(self._qmp, job)
            seen, found = block_job(found), (await block.query_jobs(self._qmp)).get(job)
        if found is not None:
            return block_job(found)
        if seen is not None and job not in self._ended:
            event = await events.wait_for(lambda event: _is_end(event, job), EVENT_DEADLINE)
            if event is not None:
                self._note_end(seen, event)
        return self._ended.get(job)

    def _note_end(self, seen: BlockJob, event: MachineEvent) -> None:
        """Remember how a job ended that QEMU does not keep."""
        if seen.kind != "stream":
            return
        error = _CANCELLED if event.name == "BLOCK_JOB_CANCELLED" else str(event.data.get("error", ""))
        state = BlockJobState.FAILED if error else BlockJobState.DONE
        self._ended[seen.id] = seen.model_copy(update={"state": state, "error": error})

    def _succeeded(self, job: BlockJob) -> BlockJob:
        if job.state is not BlockJobState.FAILED:
            return job
        name = self._qmp.name
        if job.error == _CANCELLED:
            raise Cancelled(name, f"the job {job.id} was cancelled")
        raise image_error(name, job.error) or QemuFailed(
            name, f"QEMU's {job.kind} job failed: {job.error}", "look at the storage of the disk", qemu=job.error
        )

    async def finish(self, job: str) -> None:
        """See `Blocks.finish`. TimedOut when it does not end: then the outcome is unknown."""
        events, found = self._qmp.events(), await self.find(job)
        if found is None:
            raise NotFound(self._qmp.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
        if found.state is BlockJobState.RUNNING:
            raise WrongState(self._qmp.name, f"its job {job} is not ready", "wait until it is")
        if found.state is BlockJobState.READY:
            with suppress(QemuFailed):  # it has ended since, or ends: what it says at its end counts
                await block.job_complete(self._qmp, job)
        await self._end_of(found, events)

    async def cancel(self, job: str) -> None:
        """See `Blocks.cancel`."""
        events, found = self._qmp.events(), await self.find(job)
        if found is None or found.state in _OVER:
            return
        with suppress(QemuFailed):
            await block.job_cancel(self._qmp, job)
        try:
            await self._end_of(found, events)
        except TimedOut:
            raise
        except HostlerError as error:  # how it ended does not matter, that it did does
            if error.details.get("gone"):
                raise

    async def _end_of(self, job: BlockJob, events: EventStream) -> None:
        try:
            async with asyncio.timeout(END_DEADLINE):
                await self._follow(job.id, events, job)
        except TimeoutError:
            cause = f"its job {job.id} did not end within {END_DEADLINE:g} s"
            raise TimedOut(self._qmp.name, cause, job=job.id) from None

    async def speed(self, job: str, speed: int) -> None:
        """See `Blocks.speed`. Harmless when it has copied everything."""
        try:
            await block.block_job_set_speed(self._qmp, job, speed)
        except QemuFailed as error:
            if "cannot accept command verb" not in error.cause:
                raise

    async def forget(self, job: str) -> None:
        """Drop an ended one. WrongState while it works."""
        found = (await block.query_jobs(self._qmp)).get(job)
        if found is not None:
            if block_job(found).state not in _OVER:
                raise WrongState(self._qmp.name, f"its job {job} is not over", "finish or cancel it first")
            try:
                await block.job_dismiss(self._qmp, job)
            except QemuFailed as error:
                if "not found" not in error.cause:
                    raise
        self._ended.pop(job, None)


def _tells_of(event: MachineEvent, job: str) -> bool:
    return (
        event.name == EVENTS_LOST
        or _is_end(event, job)
        or (
            event.name == "JOB_STATUS_CHANGE"
            and event.data.get("id") == job
            and event.data.get("status") in ("ready", "pending", "concluded", "null")
        )
    )


def _is_end(event: MachineEvent, job: str) -> bool:
    return event.name in _ENDS and event.data.get("device") == job
