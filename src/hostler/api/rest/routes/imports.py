"""Machines that come from elsewhere."""

from __future__ import annotations

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.foreign import ImportReport
from hostler.model.job import Job
from hostler.model.transfer import ImportRequest

router = noun_router("import")


@router.post("/imports/inspect")
async def inspect_import(request: ImportRequest, app: App) -> ImportReport:
    """Everything an import would do, and what stands in its way. Changes nothing."""
    return await app.imports.inspect(request)


@router.post("/imports", responses=JOB_ANSWERS)
async def run_import(request: ImportRequest, app: App, by: By, answer: Answer) -> Job:
    """Import a machine; the job's result is the VM, which is off."""
    return await answer.answer(await app.imports.run(request, by))
