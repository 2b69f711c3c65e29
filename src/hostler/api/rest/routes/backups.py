"""Backups: of a VM into a directory, and back."""

from __future__ import annotations

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import DryRun, VmRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.backup import BackupView, Pruned
from hostler.model.backup_requests import BackupChoice, BackupExport, BackupList, BackupPrune, BackupRestore, BackupRun
from hostler.model.job import Job
from hostler.model.views import Deleted

router = noun_router("backup")


@router.post("/vms/{vm}/backups", responses=JOB_ANSWERS)
async def run_backup(vm: VmRef, request: BackupRun, app: App, by: By, answer: Answer) -> Job:
    """Back up a VM that runs, is paused, off or saved; the job's result names the backup."""
    return await answer.answer(await app.backups.run(vm, request, by))


@router.post("/backups/list")
async def list_backups(request: BackupList, app: App) -> list[BackupView]:
    """The backups in a directory, oldest first. Changes nothing."""
    return list(await app.backups.list(request))


@router.post("/backups/show")
async def show_backup(request: BackupChoice, app: App) -> BackupView:
    """One backup. Changes nothing."""
    return await app.backups.show(request)


@router.post("/backups/verify", responses=JOB_ANSWERS)
async def verify_backup(request: BackupChoice, app: App, by: By, answer: Answer) -> Job:
    """Read a backup and everything that it builds on, and check every block."""
    return await answer.answer(await app.backups.verify(request, by))


@router.post("/backups/restore", responses=JOB_ANSWERS)
async def restore_backup(request: BackupRestore, app: App, by: By, answer: Answer) -> Job:
    """Bring a backup back: as a new VM, as the VM it was made of, or as one volume."""
    return await answer.answer(await app.backups.restore(request, by))


@router.post("/backups/export", responses=JOB_ANSWERS)
async def export_backup(request: BackupExport, app: App, by: By, answer: Answer) -> Job:
    """Serve a backup over NBD for other programs; the job's progress has the addresses, cancelling it ends them."""
    return await answer.answer(await app.backups.export(request, by))


@router.post("/backups/delete")
async def delete_backup(request: BackupChoice, app: App, by: By, dry_run: DryRun = False) -> Deleted:
    """Delete a backup that no other one builds on."""
    return await app.backups.delete(request, by, dry_run)


@router.post("/backups/prune")
async def prune_backups(request: BackupPrune, app: App, by: By, dry_run: DryRun = False) -> Pruned:
    """Delete old backups, never one that a kept one builds on."""
    return await app.backups.prune(request, by, dry_run)
