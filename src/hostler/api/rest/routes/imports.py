"""Machines that come from elsewhere, and that go out."""

from __future__ import annotations

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import VmRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.foreign import ImportReport
from hostler.model.job import Job
from hostler.model.transfer import ExportReport, ExportRequest, ImportRequest

router = noun_router("import")


@router.post("/imports/inspect")
async def inspect_import(request: ImportRequest, app: App) -> ImportReport:
    """Everything an import would do, and what stands in its way. Changes nothing."""
    return await app.imports.inspect(request)


@router.post("/imports", responses=JOB_ANSWERS)
async def run_import(request: ImportRequest, app: App, by: By, answer: Answer) -> Job:
    """Import a machine; the job's result is the VM, which is off."""
    return await answer.answer(await app.imports.run(request, by))


@router.post("/vms/{vm}/export/check")
async def check_export(vm: VmRef, request: ExportRequest, app: App) -> ExportReport:
    """What an export would write, and what the form has no words for. Changes nothing."""
    return await app.vm_exports.check(vm, request)


@router.post("/vms/{vm}/export", responses=JOB_ANSWERS)
async def run_export(vm: VmRef, request: ExportRequest, app: App, by: By, answer: Answer) -> Job:
    """Write a VM that is off to a directory of the host; the job's result says what was written."""
    return await answer.answer(await app.vm_exports.run(vm, request, by))
