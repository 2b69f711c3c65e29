"""The `wait` parameter of everything that answers with a job."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response

from hostler.api.rest.state import rest_of, while_wanted
from hostler.model.job import Job

LONGEST = 3600

Wait = Annotated[
    float, Query(ge=0, le=LONGEST, description="Answer when the job is over, or after this many seconds at the latest")
]

JOB_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Job, "description": "The job is over (it may have failed: look at state and error)"},
    202: {"model": Job, "description": "The job goes on"},
}
"""For the API description of a route that answers with a job."""


class Waiter:
    """Turns a job that has just begun into the answer that the client asked for."""

    def __init__(self, request: Request, response: Response, wait: float) -> None:
        self._request = request
        self._response = response
        self._wait = wait

    async def answer(self, job: Job) -> Job:
        """The job when it is over or the time is up, with status 200 or 202."""
        if self._wait and not job.is_over:
            jobs = rest_of(self._request).application.jobs
            job = await while_wanted(self._request, jobs.wait(job.id, self._wait)) or job
        self._response.status_code = 200 if job.is_over else 202
        return job


async def _waiter(request: Request, response: Response, wait: Wait = 0) -> Waiter:
    return Waiter(request, response, wait)


Answer = Annotated[Waiter, Depends(_waiter)]
