"""Importing a machine: a job that verifies its files, makes its volumes, and defines it at last.

    verify --> volumes --> define

Until the VM is defined everything is undone: volumes that were made are removed, volumes that were only registered are
forgotten. The id of the new VM is settled before the job begins, and each volume bears the id of its job, so that an
undo after a crash finds what is its own, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import JsonValue

from hostler.foreign.ova import Digest
from hostler.host.configure import check_config, new_config
from hostler.host.context import Host
from hostler.host.exchange.import_state import place_state
from hostler.host.exchange.imports import Survey, survey
from hostler.host.steps import JobContext, Plan, Step
from hostler.host.vms import VmService
from hostler.model.disk import Bus, DiskSource, ImageFormat, Media
from hostler.model.errors import BadImage, Blocked, Busy, NotFound
from hostler.model.foreign import DiskFate, ImportDisk, ImportReport, RemarkKind
from hostler.model.job import Job, Progress
from hostler.model.names import new_id
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.transfer import ImportRequest
from hostler.model.vm import VmConfig
from hostler.model.volume import Volume
from hostler.removal import remove_tree
from hostler.storage.chains.whole import flatten_whole
from hostler.storage.digest import digest_of
from hostler.storage.formats import SUFFIX
from hostler.storage.qemu_img import OnProgress, QemuImg
from hostler.storage.volumes import SECTOR
from hostler.storage.waiting import interruptible

KIND = "vm.import"


class Imports:
    """The application functions about machines from elsewhere."""

    def __init__(self, host: Host, vms: VmService) -> None:
        self._host = host
        self._vms = vms
        self._coming: set[str] = set()
        """Ids of the VMs that are being imported now: with `keep_id` two imports may want the same one."""

    async def inspect(self, request: ImportRequest) -> ImportReport:
        """Everything an import would do. Changes nothing."""
        return (await survey(self._host, request)).report(request.path)

    async def run(self, request: ImportRequest, by: str) -> Job:
        """Begin to import; the job's result is the VM. Blocked with every blocker of the report."""
        plan = await self.plan(request)
        if plan.target in self._coming or plan.target in self._host.actors:
            raise Busy(f"vm {plan.target_name}", "is being imported already", "wait for that, or leave out --keep-id")
        self._coming.add(plan.target)
        try:
            return await self._host.jobs.start(plan, by)
        except BaseException:  # also when cancelled; raised again
            self._coming.discard(plan.target)
            raise

    async def plan(self, request: ImportRequest) -> Plan:
        """The job of that import. Blocked when the report has blockers."""
        found = await survey(self._host, request)
        report = found.report(request.path)
        _require_possible(report)
        keep = request.keep_id and found.config is not None
        vm_id = found.config.id if keep and found.config is not None else new_id()
        return self._plan(vm_id, found.name, _params(found, request))

    def _plan(self, vm_id: str, name: str, params: dict[str, JsonValue]) -> Plan:
        work = _Import(self._host, self._vms, vm_id, params)
        steps = (
            Step("verify", work.verify),
            Step("volumes", work.make_volumes, work.remove_volumes),
            Step("define", work.define, insist=work.is_defined),
        )

        async def finish(_job: Job) -> None:
            self._coming.discard(vm_id)

        return Plan(KIND, vm_id, name, steps, params=params, finish=finish)

    async def recover(self, job: Job) -> None:
        """Undo an interrupted import whose VM was not defined yet. (One whose VM is there is over.)"""
        self._coming.add(job.target)
        self._host.jobs.unwind(self._plan(job.target, job.target_name, job.params), job)


def _require_possible(report: ImportReport) -> None:
    blockers = [r for r in report.remarks if r.kind is RemarkKind.BLOCKER]
    if not blockers:
        return
    first, more = blockers[0], len(blockers) - 1
    rest = f" (and {more} more: see 'hostler import inspect')" if more else ""
    raise Blocked(
        f"import of {report.path}",
        f"{first.subject}: {first.text}{rest}",
        first.advice,
        blockers=[blocker.to_json() for blocker in blockers],
    )


def _params(found: Survey, request: ImportRequest) -> dict[str, JsonValue]:
    """What the job must know, also after a crash."""
    assert found.request is not None
    digests = [[d.name, d.algorithm, d.value] for d in found.found.digests]
    members = {m.name: [m.offset, m.size] for m in found.found.members.values()}
    params: dict[str, Any] = {
        "description": found.found.description,
        "digests": digests,
        "members": members,
        "disks": [d.to_json() for d in found.disks],
        "request": found.request.model_dump(mode="json"),
        "config": found.config.to_json() if found.config else None,
        "directory": request.directory,
        "keep_id": request.keep_id,
        "search": [*found.found.directories, *request.search],
        "state": found.state,
    }
    return params


class _Import:
    """The work of one import."""

    def __init__(self, host: Host, vms: VmService, vm_id: str, params: dict[str, JsonValue]) -> None:
        self._host, self._vms, self._vm_id = host, vms, vm_id
        known: dict[str, Any] = dict(params)
        self._params = known
        self._disks = [ImportDisk.model_validate(disk) for disk in self._params["disks"]]

    def is_defined(self) -> bool:
        """Whether the VM is there, so that there is no way back."""
        return self._vm_id in self._host.actors

    async def verify(self, context: JobContext) -> None:
        """Every file that the manifest names is what it was. BadImage, NotFound."""
        digests = [Digest(*line) for line in self._params["digests"]]
        description = str(self._params["description"])
        for number, digest in enumerate(digests):
            context.progress(Progress(fraction=number / len(digests), text=f"verifying {digest.name}"))
            path, at, size = self._place_of(digest.name, description)
            found = await interruptible(partial(digest_of, path, digest.algorithm, at=at, size=size))
            if found != digest.value:
                raise BadImage(
                    f"file {digest.name} of {description}",
                    f"is not what its manifest says ({digest.algorithm} {found[:16]}..., not {digest.value[:16]}...)",
                    "copy it again from where it comes from",
                )

    def _place_of(self, name: str, description: str) -> tuple[str, int, int | None]:
        members: dict[str, Any] = self._params["members"]
        if members:
            at, size = members[name]
            return description, at, size
        return os.path.join(os.path.dirname(description), os.path.basename(name)), 0, None

    async def make_volumes(self, context: JobContext) -> None:
        """Copy, convert or register each image. A volume that this job has made before is taken as it is."""
        todo = [disk for disk in self._disks if disk.volume]
        whole = sum(max(1, disk.size) for disk in todo)
        done = 0
        for disk in todo:

            def show(fraction: float, disk: ImportDisk = disk, done: int = done) -> None:
                part = (done + fraction * max(1, disk.size)) / whole
                context.progress(Progress(fraction=min(1.0, part), text=f"disk {disk.place}: {disk.name}"))

            show(0.0)
            if await self._mine(disk, context) is None:
                await self._make(disk, context.job.id, show)
            done += max(1, disk.size)

    async def _make(self, disk: ImportDisk, job_id: str, show: OnProgress) -> None:
        service = self._host.volumes.service
        assert disk.path is not None
        if await asyncio.to_thread(os.path.realpath, disk.path) != disk.path:
            raise BadImage(f"file {disk.path}", "has become a link since it was looked at", "look at who changes it")
        target = disk.target_format or ImageFormat.QCOW2
        if disk.fate is DiskFate.REGISTER:
            volume = await service.register(disk.volume, disk.path, disk.format, job_id)
        elif disk.fate is DiskFate.FLATTEN:
            volume = await self._flatten(disk, target, job_id, show)
        elif disk.source_format == "vmdk":
            source, at, length = disk.path, disk.offset, disk.length
            size = disk.size

            async def fill(path: str, image: QemuImg) -> None:
                await image.convert_vmdk(source, at, length, path, target, size, show)

            volume = await service.create_filled(
                disk.volume, size, target, fill, self._file(disk, target), made_by=job_id
            )
        else:
            volume = await service.create_from(
                disk.volume, disk.path, target, None, self._file(disk, target), disk.format, show, made_by=job_id
            )
        self._host.events.publish("volume", volume.name, volume)

    async def _flatten(self, disk: ImportDisk, target: ImageFormat, job_id: str, show: OnProgress) -> Volume:
        """Its files are held, so that no VM writes one of them meanwhile."""
        source, search = str(disk.path), [str(place) for place in self._params["search"]]
        size = disk.size + -disk.size % SECTOR

        async def fill(path: str, _images: QemuImg) -> None:
            await flatten_whole(source, path, target, size, search, show)

        await self._host.claims.hold(job_id, dict.fromkeys((source, *disk.chain), False))
        try:
            service = self._host.volumes.service
            return await service.create_filled(
                disk.volume, size, target, fill, self._file(disk, target), made_by=job_id
            )
        finally:
            await self._host.claims.let_go(job_id)

    def _file(self, disk: ImportDisk, format: ImageFormat) -> str | None:
        directory = self._params["directory"]
        return None if directory is None else os.path.join(directory, disk.volume + SUFFIX[format])

    async def _mine(self, disk: ImportDisk, context: JobContext) -> DiskSource | None:
        """What became of a disk's volume, if this job has made it."""
        with suppress(NotFound):
            volume = await self._host.volumes.get(disk.volume)
            if volume.made_by == context.job.id:
                return DiskSource(path=volume.path, format=volume.format, size=volume.size)
        return None

    async def remove_volumes(self, context: JobContext) -> None:
        """Remove the volumes of this job, unless the VM that has them is there."""
        if self.is_defined():
            return
        await self._host.claims.let_go(context.job.id)
        await asyncio.to_thread(remove_tree, self._host.paths.vm_state(self._vm_id))
        for disk in reversed([disk for disk in self._disks if disk.volume]):
            if await self._mine(disk, context) is not None:
                await self._host.volumes.delete(disk.volume, f"job {context.job.id}", disk.fate is DiskFate.REGISTER)

    async def define(self, context: JobContext) -> None:
        """The VM, off. From here on the import has happened."""
        if not self.is_defined():
            config = await self._config(context)
            state = str(self._host.paths.vm_state(self._vm_id))
            await asyncio.to_thread(place_state, self._params["state"], state, config.run_as)
            await self._vms.define(config, context.job.by)
        context.no_return()
        context.result(self._host.actor(self._vm_id).record.to_json())

    async def _config(self, context: JobContext) -> VmConfig:
        if self._params["config"] is not None:
            config = await self._own_config(context)
        else:
            request = VmCreate.model_validate(self._params["request"])
            disks = [await self._request(disk) for disk in self._disks if disk.fate is not DiskFate.LEAVE]
            config = await new_config(self._host, request.model_copy(update={"disks": tuple(disks)}), self._vm_id)
        check_config(self._host, config)
        return config

    async def _request(self, disk: ImportDisk) -> DiskAdd:
        return DiskAdd(
            volume=disk.volume or disk.path,
            format=None if disk.volume or disk.path is None else ImageFormat.RAW,
            bus=disk.target_bus or Bus.SCSI,
            controller=disk.target_controller,
            unit=disk.target_unit,
            media=disk.media,
            read_only=disk.media is Media.CDROM,
        )

    async def _own_config(self, context: JobContext) -> VmConfig:
        """The configuration from the folder: the same devices at the same places, with the volumes of here."""
        config = VmConfig.model_validate(self._params["config"])
        found = {(d.target_bus, d.target_controller, d.target_unit): d for d in self._disks}
        disks = []
        for disk in config.disks:
            fate = found[disk.address]
            source = await self._mine(fate, context) if fate.volume else None
            if source is not None:
                disks.append(disk.but(source=source))
            elif fate.fate is DiskFate.ATTACH:
                medium = disk.source if fate.path is None else DiskSource(path=fate.path, size=fate.size)
                disks.append(disk.but(source=medium))
        every = [a.record.config for a in self._host.actors.values()]
        identity = {} if self._params["keep_id"] else {"generation_id": new_id()}
        run_as = self._host.resources.user_for(self._vm_id, every)
        return config.but(id=self._vm_id, disks=tuple(disks), run_as=run_as, **identity)
