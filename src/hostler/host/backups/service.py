"""Everything people and programs ask about backups: make, list, show, check, remove, bring back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog
from pydantic import JsonValue

from hostler.host.backups import trail as backup_trail
from hostler.host.backups.exports import EXPORT, plan_export
from hostler.host.backups.restore_plans import RESTORE, RESTORE_VOLUME, plan_vm, plan_volume, recover_volume
from hostler.host.backups.restoring import disks_to_restore, format_for, links_of
from hostler.host.context import Host
from hostler.host.operations import restore_backup
from hostler.host.operations.backup import OPERATION
from hostler.host.steps import JobContext, Plan, Step
from hostler.host.vms import VmService
from hostler.model.backup import (
    Backup,
    BackupView,
    Pruned,
    needed_by,
    plan_prune,
    require_unneeded,
    restorable,
)
from hostler.model.backup_requests import BackupChoice, BackupExport, BackupList, BackupPrune, BackupRestore, BackupRun
from hostler.model.base import utc_now
from hostler.model.errors import AlreadyExists, HostlerError, NotFound
from hostler.model.job import Job, Progress
from hostler.model.names import check_name, new_id
from hostler.model.views import Deleted
from hostler.storage.backups.directory import BackupDirectory
from hostler.storage.backups.reading import Link
from hostler.storage.backups.restoring import verify_files
from hostler.storage.waiting import in_thread

log = structlog.get_logger()
T = TypeVar("T")

VERIFY = "backup.verify"


class Backups:
    """The application functions about backups."""

    def __init__(self, host: Host, vms: VmService) -> None:
        self._host = host
        self._vms = vms

    # making

    async def run(self, ref: str, request: BackupRun, by: str) -> Job:
        """Begin to back up a VM; the job's result names the backup."""
        directory = BackupDirectory(request.directory)
        params: dict[str, JsonValue] = {
            **request.model_dump(mode="json"),
            "directory": str(directory.path),
            "backup": _new_id(),
        }
        return await OPERATION.begin(self._host, self._host.actor(ref), by, params)

    # looking

    async def list(self, request: BackupList) -> Sequence[BackupView]:
        """Backups, oldest first, by VM."""
        if request.directory is not None:
            return await self._aside(lambda: self._views(BackupDirectory(request.directory or ""), request.vm))
        found: list[BackupView] = []
        for path in await backup_trail.directories(self._host.store):
            try:
                found += await self._aside(partial(self._views, BackupDirectory(path), request.vm))
            except HostlerError as error:
                log.info("backup.directory-away", directory=path, why=str(error))
        return found

    async def show(self, request: BackupChoice) -> BackupView:
        """One backup, with its disks."""

        def look() -> BackupView:
            directory = BackupDirectory(request.directory)
            backup = directory.find(request.backup)
            return _view(directory, backup, directory.backups(backup.vm)[0])

        return await self._aside(look)

    def _views(self, directory: BackupDirectory, vm: str | None) -> Sequence[BackupView]:
        found: list[BackupView] = []
        for vm_id in directory.vms():
            backups, damaged = directory.backups(vm_id)
            for bad in damaged:
                log.warning("backup.damaged", directory=str(directory.path), vm=vm_id, backup=bad.id, why=bad.cause)
            found += [_view(directory, b, backups) for b in backups if vm in (None, b.vm, b.vm_name)]
        return found

    # checking

    async def verify(self, request: BackupChoice, by: str) -> Job:
        """Begin to read a backup, and everything that it builds on, and check every block."""
        backup = await self._find(request)
        params: dict[str, JsonValue] = {"directory": request.directory, "backup": backup.id}
        return await self._host.jobs.start(self.plan_verify(params), by)

    def plan_verify(self, params: dict[str, JsonValue]) -> Plan:
        """The job that checks a backup."""
        directory, backup_id = BackupDirectory(str(params["directory"])), str(params["backup"])

        async def do(context: JobContext) -> None:
            backup = await self._aside(lambda: directory.find(backup_id))
            with directory.locked(backup.vm, shared=True):
                links = await self._aside(lambda: _all_links(directory, backup))
                blocks = await verify_files(
                    links, lambda f: context.progress(Progress(fraction=f, text="reading and checking"))
                )
            context.result({"backup": backup.id, "blocks": blocks, "files": len(links)})

        return Plan(VERIFY, backup_id, backup_id, (Step("verify", do),), params=params)

    async def export(self, request: BackupExport, by: str) -> Job:
        """Begin to serve a backup over NBD; the job's progress has the addresses, cancelling it ends them."""
        backup = await self._find(request)
        params: dict[str, JsonValue] = {
            "directory": request.directory,
            "backup": backup.id,
            "timeout": request.timeout,
        }
        return await self._host.jobs.start(plan_export(self._host, params), by)

    # removing

    async def delete(self, request: BackupChoice, by: str, dry_run: bool = False) -> Deleted:
        """Remove one backup. InUse when another one builds on it."""

        def work() -> Deleted:
            directory = BackupDirectory(request.directory)
            vm = directory.find(request.backup).vm
            with directory.locked(vm):
                backup = directory.find(request.backup)
                require_unneeded(backup.id, directory.backups(vm)[0])
                if not dry_run:
                    directory.remove(vm, backup.id)
            return Deleted(id=backup.id, removed=(str(directory.path / vm / backup.id),), kept=())

        outcome: Deleted = await self._aside(work)
        if not dry_run:
            log.info("backup.deleted", backup=outcome.id, directory=request.directory, by=by)
        return outcome

    async def prune(self, request: BackupPrune, by: str, dry_run: bool = False) -> Pruned:
        """Remove old backups, never one that a kept one builds on."""

        def work() -> Pruned:
            directory = BackupDirectory(request.directory)
            removed: list[str] = []
            needed: dict[str, str] = {}
            for vm in directory.vms():
                with directory.locked(vm):
                    backups = directory.backups(vm)[0]
                    if not backups or request.vm not in (None, vm, backups[-1].vm_name):
                        continue
                    plan = plan_prune(backups, request.keep)
                    needed |= plan.needed
                    for backup_id in reversed(plan.remove):
                        if not dry_run:
                            directory.remove(vm, backup_id)
                        removed.append(backup_id)
                    if not dry_run:
                        directory.sweep(vm)
            return Pruned(directory=str(directory.path), removed=tuple(removed), needed=needed)

        outcome: Pruned = await self._aside(work)
        log.info("backup.pruned", directory=outcome.directory, removed=outcome.removed, by=by, dry_run=dry_run)
        return outcome

    # bringing back

    async def restore(self, request: BackupRestore, by: str) -> Job:
        """Begin to bring a backup back, as a new VM, as the VM it was, or as one volume."""
        if request.replace:
            backup = await self._find(BackupChoice(directory=request.directory, backup=request.backup))
            actor = self._host.actor(backup.vm)
            params = await self._params(request, backup, actor.record.name)
            return await restore_backup.OPERATION.begin(self._host, actor, by, params)
        return await self._host.jobs.start(await self.plan_restore(request), by)

    async def plan_restore(self, request: BackupRestore) -> Plan:
        """The job that makes a new VM or a volume."""
        backup = await self._find(BackupChoice(directory=request.directory, backup=request.backup))
        if request.disk is not None:
            return plan_volume(self._host, self._volume_params(request, backup))
        name = check_name("vm", request.vm or "")
        if any(a.record.name == name for a in self._host.actors.values()):
            raise AlreadyExists(f"vm {name}", "a VM of this name exists on this host", "choose another name")
        params = await self._params(request, backup, name)
        return plan_vm(self._host, self._vms, new_id(), {**params, "name": name})

    async def _params(self, request: BackupRestore, backup: Backup, stem: str) -> dict[str, JsonValue]:
        directory = BackupDirectory(request.directory)
        await self._aside(lambda: _all_links(directory, backup))  # a chain that is not whole is told at once
        taken = [v.name for v in await self._host.volumes.list()]
        disks = disks_to_restore(backup, stem, taken, request.format, request.volumes)
        return {"directory": str(directory.path), "backup": backup.id, "disks": disks}

    def _volume_params(self, request: BackupRestore, backup: Backup) -> dict[str, JsonValue]:
        disk = backup.disk(request.disk or "")
        if disk is None:
            have = ", ".join(d.id for d in backup.disks)
            raise NotFound(f"disk {request.disk} of backup {backup.id}", f"is not in it; it has: {have}")
        name = check_name("volume", request.volume or "")
        (made,) = disks_to_restore(
            backup.but(disks=(disk,)), name, (), format_for(disk, backup, request.format), request.volumes
        )
        assert isinstance(made, dict)
        path = made["path"]
        if isinstance(path, str):
            path = path.replace(f"/{made['volume']}.", f"/{name}.")
        return {
            "directory": request.directory,
            "backup": backup.id,
            "disks": [{**made, "volume": name, "path": path}],
        }

    # after a crash

    async def recover(self, job: Job) -> None:
        """End an interrupted job of ours that holds no VM: undo it, find that it had happened, or check again."""
        if job.kind == RESTORE_VOLUME:
            await recover_volume(self._host, job)
        elif job.kind == RESTORE:
            self._host.jobs.unwind(plan_vm(self._host, self._vms, job.target, job.params), job)
        elif job.kind == EXPORT:
            self._host.jobs.unwind(plan_export(self._host, job.params), job)
        else:
            self._host.jobs.resume(self.plan_verify(job.params), job, "verify")

    async def _find(self, request: BackupChoice) -> Backup:
        return await self._aside(lambda: BackupDirectory(request.directory).find(request.backup))

    @staticmethod
    async def _aside(work: Callable[[], T]) -> T:
        return await in_thread("backups", work)


def _new_id() -> str:
    """See `BackupId`."""
    now = utc_now()
    return f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond:05x}{secrets.token_hex(2)[:3]}"


KINDS = (RESTORE, RESTORE_VOLUME, VERIFY)
"""Kinds of job that `recover` deals with."""


def _all_links(directory: BackupDirectory, backup: Backup) -> list[Link]:
    """Every file the backup needs, each once."""
    found = {link.path: link for disk in backup.disks for link in links_of(directory, backup, disk.id)}
    return list(found.values())


def _view(directory: BackupDirectory, backup: Backup, others: Sequence[Backup]) -> BackupView:
    return BackupView(
        id=backup.id,
        vm=backup.vm,
        vm_name=backup.vm_name,
        name=backup.name,
        host=backup.host,
        created=backup.created,
        took=backup.took,
        full=backup.full,
        consistency=backup.consistency,
        directory=str(directory.path),
        stored=sum(d.stored for d in backup.disks),
        size=sum(d.size for d in backup.disks),
        needs=tuple(sorted(backup.needs)),
        needed_by=needed_by(backup.id, others),
        restores=restorable(backup, {b.id: b for b in others}),
        disks=backup.disks,
    )
