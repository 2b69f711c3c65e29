"""Jobs: long work under way and what became of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.job import Job, JobState

router = noun_router("job")

JobRef = Annotated[str, Path(max_length=100, description="Id of a job, or its first characters")]


@router.get("/jobs")
async def list_jobs(
    app: App,
    state: Annotated[JobState | None, Query(description="Only jobs in this state")] = None,
    target: Annotated[str | None, Query(max_length=300, description="Only jobs on this object (id or name)")] = None,
) -> list[Job]:
    """All jobs, oldest first."""
    return [
        job for job in app.jobs.list() if state in (None, job.state) and target in (None, job.target, job.target_name)
    ]


@router.get("/jobs/{job}", responses=JOB_ANSWERS)
async def get_job(job: JobRef, app: App, answer: Answer) -> Job:
    """One job, now or when it is over."""
    return await answer.answer(app.jobs.get(job))


@router.post("/jobs/{job}/cancel")
async def cancel_job(job: JobRef, app: App, by: By) -> Job:
    """Ask a job to stop and undo what it did. Answers at once; the job says when it is over."""
    return await app.jobs.cancel(job, by)
