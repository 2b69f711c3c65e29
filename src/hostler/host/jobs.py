r"""Runs jobs: each step recorded before it runs, undone in reverse when one fails, found again after a crash.

queued -> running: step 1, step 2, ... -> done
             \-- a step raises, or the job is cancelled --> unwinding: undo that step and all before it
                                                             -> failed | cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog
from pydantic import JsonValue

from hostler.host.events import EventHub
from hostler.host.steps import Plan, Step, StepHook
from hostler.model.base import utc_now
from hostler.model.errors import Cancelled, HostlerError, InternalError, Interrupted, NotFound, WrongState
from hostler.model.job import Job, JobState, JobStep, Progress, StepState
from hostler.model.names import new_id
from hostler.model.problem import Problem
from hostler.store.contract import Delete, Put, Store, Transaction

log = structlog.get_logger()

KEEP_ENDED = 1000
"""Ended jobs kept for people to look at; the oldest go first."""

PROGRESS_PERIOD = 0.1
"""Seconds between two progress events of one job: quick enough for a bar, cheap with hundreds of jobs."""

INSIST_FIRST, INSIST_MOST = 0.05, 5.0
"""Seconds between attempts of a step that has no way back."""


class Running:
    """One job under way: the context its steps work in."""

    def __init__(self, runner: JobRunner, plan: Plan, job: Job) -> None:
        self._runner = runner
        self.plan = plan
        self._job = job
        self.task: asyncio.Task[None] | None = None
        self.over = asyncio.Event()
        self.begun = False
        """Whether its task has run at all: a task that is cancelled before that never does."""
        self.cancel_asked = False
        self._shown = 0.0

    @property
    def job(self) -> Job:
        """The job as it is now."""
        return self._job

    async def remember(self, **data: JsonValue) -> None:
        """Record facts on disk."""
        await self.save(data={**self._job.data, **data})

    def progress(self, progress: Progress) -> None:
        """Show progress; published at most every PROGRESS_PERIOD, not stored."""
        self._job = self._job.model_copy(update={"progress": progress})
        now = asyncio.get_running_loop().time()
        if now - self._shown >= PROGRESS_PERIOD:
            self._shown = now
            self._runner.show(self._job)

    def no_return(self) -> None:
        """From here on it cannot be cancelled."""
        if self._job.cancellable:
            self._job = self._job.model_copy(update={"cancellable": False})
            self._runner.show(self._job)

    def result(self, result: dict[str, JsonValue]) -> None:
        """What the job hands to whoever asked for it."""
        self._job = self._job.model_copy(update={"result": result})

    async def save(self, **changes: object) -> None:
        """Change the job, on disk and for everybody who watches."""
        self._job = self._job.model_copy(update=changes)
        await self._runner.store_job(self._job)

    def step_states(self, name: str, state: StepState) -> tuple[JobStep, ...]:
        """The steps with one of them in a new state."""
        now = utc_now()
        begun = {"started": now} if state is StepState.RUNNING else {"ended": now}
        return tuple(s.model_copy(update={"state": state, **begun}) if s.name == name else s for s in self._job.steps)


class JobRunner:
    """All jobs of this host."""

    def __init__(self, store: Store, events: EventHub, hook: StepHook | None = None) -> None:
        self._store = store
        self._events = events
        self._hook = hook
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, Running] = {}

    async def load(self) -> Sequence[Job]:
        """Read what the former daemon left; returns the jobs that had not ended. Called once, before anything else."""
        for entry in await self._store.list("job/"):
            job = Job.model_validate(entry.value)
            self._jobs[job.id] = job
        self._jobs = dict(sorted(self._jobs.items(), key=lambda item: item[1].created))
        return [job for job in self._jobs.values() if not job.is_over]

    # looking

    def list(self) -> Sequence[Job]:
        """All known jobs, oldest first."""
        return list(self._jobs.values())

    def get(self, job_id: str) -> Job:
        """One job, by id or an unambiguous beginning of it of at least 4 characters. NotFound otherwise."""
        job = self._jobs.get(job_id)
        if job is None and len(job_id) >= 4:
            found = [j for key, j in self._jobs.items() if key.startswith(job_id)]
            job = found[0] if len(found) == 1 else None
        if job is None:
            raise NotFound(f"job {job_id}", "is not known here", "list the known ones with 'hostler job list'")
        return job

    def is_under_way(self, job_id: str | None) -> bool:
        """Whether there is such a job and it has not ended."""
        job = self._jobs.get(job_id) if job_id is not None else None
        return job is not None and not job.is_over

    async def wait(self, job_id: str, timeout: float) -> Job:
        """The job when it has ended, or as it is after `timeout` seconds."""
        job = self.get(job_id)
        running = self._running.get(job.id)
        if running is not None and timeout > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running.over.wait(), timeout)
        return self.get(job.id)

    # changing

    async def start(self, plan: Plan, by: str, job_id: str | None = None) -> Job:
        """Record the job and begin it; returns at once."""
        job = Job(
            id=job_id or new_id(),
            kind=plan.kind,
            target=plan.target,
            target_name=plan.target_name,
            steps=tuple(JobStep(name=s.name) for s in plan.steps),
            params=plan.params,
            data=plan.data,
            by=by,
            created=utc_now(),
            cancellable=plan.cancellable,
            state=JobState.RUNNING,
        )
        await self.store_job(job)
        return self._begin(plan, job, plan.steps)

    def resume(self, plan: Plan, job: Job, from_step: str) -> Job:
        """After a crash: go on with an interrupted job at the named step."""
        names = [s.name for s in plan.steps]
        job = job.model_copy(update={"state": JobState.RUNNING})
        return self._begin(plan, job, plan.steps[names.index(from_step) :])

    def unwind(self, plan: Plan, job: Job, error: HostlerError | None = None) -> Job:
        """After a crash: undo what an interrupted job may have done; it ends as failed."""
        cause = error or Interrupted(
            f"job {job.kind} of {job.target_name}", "hostlerd stopped in the middle of it", "start it again"
        )

        async def fail(_context: object) -> None:
            raise cause

        touched = {s.name for s in job.steps if s.state in (StepState.RUNNING, StepState.DONE, StepState.FAILED)}
        steps = [s for s in plan.steps if s.name in touched]
        running = self._register(plan, job)
        running.task = asyncio.create_task(self._run(running, [Step("recover", fail)], steps), name=f"job {job.id}")
        return job

    async def cancel(self, job_id: str, by: str) -> Job:
        """Ask a job to stop; returns at once. WrongState when it has passed the point of no return or has ended."""
        job = self.get(job_id)
        running = self._running.get(job.id)
        if running is None or running.task is None:
            raise WrongState(f"job {job.id}", f"has ended already ({job.state})")
        if not running.job.cancellable or running.job.state is not JobState.RUNNING:
            raise WrongState(f"job {job.id}", "cannot be cancelled any more", "wait for its end")
        if not running.cancel_asked:
            log.info("job.cancel", job=job.id, kind=job.kind, by=by)
            running.cancel_asked = True
            if running.begun:
                running.task.cancel()
        return running.job

    async def close(self) -> None:
        """The daemon stops: leave running jobs as they are on disk; the next daemon recovers them."""
        tasks = [r.task for r in self._running.values() if r.task is not None]
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # inside

    def show(self, job: Job) -> None:
        """Publish a job without storing it."""
        self._jobs[job.id] = job
        self._events.publish("job", job.id, job)

    async def store_job(self, job: Job) -> None:
        """Store and publish a job; forget the oldest ended ones."""
        writes: list[Put | Delete] = [Put(f"job/{job.id}", job.to_json())]
        if job.is_over:
            ended = [j.id for j in self._jobs.values() if j.is_over and j.id != job.id]
            for old in ended[: max(0, len(ended) + 1 - KEEP_ENDED)]:
                writes.append(Delete(f"job/{old}"))
                self._jobs.pop(old, None)
        await self._store.commit(Transaction(writes))
        self.show(job)

    def _begin(self, plan: Plan, job: Job, steps: Sequence[Step]) -> Job:
        running = self._register(plan, job)
        done = [s for s in plan.steps if s not in steps]
        running.task = asyncio.create_task(self._run(running, steps, done), name=f"job {job.id}")
        return job

    def _register(self, plan: Plan, job: Job) -> Running:
        running = Running(self, plan, job)
        self._running[job.id] = running
        self._jobs[job.id] = job
        return running

    async def _run(self, running: Running, steps: Sequence[Step], done: Sequence[Step]) -> None:
        running.begun = True
        touched = list(done)
        error: HostlerError | None = None
        try:
            for step in steps:
                if running.cancel_asked and running.job.cancellable:
                    raise asyncio.CancelledError  # asked for before it began, or swallowed by what it waited for
                touched.append(step)
                await self._do_or_insist(running, step)
        except asyncio.CancelledError:
            if running.job.id not in self._running:
                raise  # the daemon stops: nothing is undone, the next one recovers
            if running.task is not None:
                running.task.uncancel()
            error = Cancelled(f"job {running.job.kind} of {running.job.target_name}", "was cancelled")
        except HostlerError as caught:
            error = caught
        except Exception as caught:  # a fault of ours must end the job, not hang its watchers
            log.exception("job.fault", job=running.job.id, kind=running.job.kind)
            error = InternalError(f"job {running.job.kind}", f"internal error: {caught!r}", "see the daemon's log")
        await self._end(running, touched, error)

    async def _do_or_insist(self, running: Running, step: Step) -> None:
        delay = INSIST_FIRST
        while True:
            try:
                return await self._do(running, step)
            except Exception as error:  # also a fault of ours: a job without a way back must not end in the middle
                if not step.insist():
                    raise
                log.warning("job.insist", job=running.job.id, kind=running.job.kind, step=step.name, why=repr(error))
            await asyncio.sleep(delay)
            delay = min(delay * 2, INSIST_MOST)

    async def _do(self, running: Running, step: Step) -> None:
        if any(s.name == step.name for s in running.job.steps):
            await running.save(steps=running.step_states(step.name, StepState.RUNNING))
        if self._hook is not None:
            await self._hook(f"{running.job.kind}/{step.name}", "before")
        await step.do(running)
        if self._hook is not None:
            await self._hook(f"{running.job.kind}/{step.name}", "after")
        running._job = running.job.model_copy(update={"steps": running.step_states(step.name, StepState.DONE)})

    async def _end(self, running: Running, touched: Sequence[Step], error: HostlerError | None) -> None:
        state = JobState.DONE
        running.no_return()
        if error is not None:
            with contextlib.suppress(HostlerError):  # a full disk must not keep it from being undone
                await running.save(state=JobState.UNWINDING)
            await self._undo(running, touched)
            state = JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED
        final = running.job.model_copy(
            update={
                "state": state,
                "error": Problem.of(error) if error else None,
                "ended": utc_now(),
                "cancellable": False,
                "progress": running.job.progress.model_copy(update={} if error else {"fraction": 1.0}),
            }
        )
        await self._conclude(running, final)
        self._running.pop(final.id, None)
        running.over.set()

    async def _conclude(self, running: Running, final: Job) -> None:
        """Give back what the job holds and store its end. Where that fails (a full disk) it is tried until it succeeds,
        while whoever waits already learns how the job ended."""
        delay = INSIST_FIRST
        while True:
            try:
                if running.plan.finish is not None:
                    await running.plan.finish(final)
                return await running.save(**dict(final))
            except HostlerError as error:
                log.warning("job.end-not-stored", job=final.id, kind=final.kind, why=str(error))
            running._job = final
            self.show(final)
            running.over.set()
            await asyncio.sleep(delay)
            delay = min(delay * 2, INSIST_MOST)

    async def _undo(self, running: Running, touched: Sequence[Step]) -> None:
        for step in reversed(touched):
            try:
                await step.undo(running)
            except Exception:  # one failing undo must not keep the others from running; reconciliation does the rest
                log.exception("job.undo-failed", job=running.job.id, kind=running.job.kind, step=step.name)
            running._job = running.job.model_copy(update={"steps": running.step_states(step.name, StepState.UNDONE)})
