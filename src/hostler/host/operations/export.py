"""Write a VM that is off to a folder or an archive, from which it can be imported here or elsewhere.

    write (under a name that only this job has) --> publish (give it its own name)

The VM is held and its disks are claimed meanwhile, so that nobody changes what is read.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hostler import __version__
from hostler.foreign.ova import Digest, write_archive
from hostler.foreign.ovf_write import OvfDisk, write_mf, write_ovf
from hostler.foreign.own import DESCRIPTION, MANIFEST, STATE_FILES, write_manifest, write_own
from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.steps import JobContext, Step
from hostler.model.base import utc_now
from hostler.model.disk import Disk, ImageFormat, Media, SourceKind
from hostler.model.errors import AlreadyExists, InvalidInput, NoSpace, NotFound, NotPermitted
from hostler.model.job import Job, Progress
from hostler.model.transfer import ExportForm, ExportReport, ExportRequest
from hostler.model.units import format_size
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.removal import remove_tree
from hostler.storage.clone import clone
from hostler.storage.digest import digest_of
from hostler.storage.formats import SUFFIX, require_own_data
from hostler.storage.nodes import read_node
from hostler.storage.qemu_img import PART, OnProgress, explain_os, new_file
from hostler.storage.waiting import interruptible

PASSABLE = 0o711
"""Mode of an exported folder: others neither list it nor read what is in it; a VM's user gets through to its own disk
where that is used in place."""
LARGEST_STATE = 64 * 1024**2
"""Bytes of a UEFI variable store or TPM state that are taken along; real ones have less than 1 MiB."""


def plan_export(record: VmRecord, request: ExportRequest) -> ExportReport:
    """What an export of that VM writes. Pure. InvalidInput for what cannot be asked for."""
    config = record.config
    if request.form is not ExportForm.FOLDER and request.format is not None:
        raise InvalidInput(f"export of vm {config.name}", "an OVF has VMDK disks only", "leave out the format")
    ending = ".ova" if request.form is ExportForm.OVA else ""
    own = request.form is ExportForm.FOLDER
    disks = exported(config)
    files = [file_of(disk, own, request.format) for disk in disks]
    described = [DESCRIPTION, MANIFEST] if own else [f"{_stem(config)}.ovf", f"{_stem(config)}.mf"]
    if len(os.fsencode(config.name + ending)) > 255:
        raise InvalidInput(f"vm {config.name}", "its name is too long for a file", "rename it first")
    return ExportReport(
        vm=config.name,
        form=request.form,
        path=os.path.join(request.directory, config.name + ending),
        files=tuple([*described, *files]),
        size=sum(disk.source.size for disk in disks),
        lost=tuple(_lost(config, own)),
    )


def exported(config: VmConfig) -> list[Disk]:
    """The disks whose content goes along: images, not devices or media."""
    return [d for d in config.disks if d.media is Media.DISK and d.source.kind is SourceKind.VOLUME]


def file_of(disk: Disk, own: bool, wanted: ImageFormat | None) -> str:
    """The name of a disk's file in an export."""
    return disk.id + (SUFFIX[format_of(disk, wanted)] if own else ".vmdk")


def format_of(disk: Disk, wanted: ImageFormat | None) -> ImageFormat:
    """The format of a disk in a folder of our own. Layers become one image, of the top one's format."""
    return wanted or disk.source.format


def _stem(config: VmConfig) -> str:
    return config.name


def _lost(config: VmConfig, own: bool) -> list[str]:
    lost = []
    for disk in config.disks:
        if disk.media is not Media.DISK:
            lost.append(f"the medium in drive {disk.id}")
        elif disk.source.kind is not SourceKind.VOLUME:
            lost.append(f"disk {disk.id}: what it is on ({disk.source.path}) stays here")
        elif disk.source.backing is not None:
            lost.append(f"disk {disk.id}: its checkpoints; the present state is exported")
    if config.kernel is not None:
        lost.append("the kernel that it boots from")
    if not own:
        lost += ["UEFI variables"] if config.firmware.value == "uefi" else []
        lost += ["TPM"] if config.tpm else []
        lost.append("settings of this program: autostart, shutdown, serial numbers and names of disks, processor model")
    return lost


async def check_export(host: Host, record: VmRecord, request: ExportRequest) -> ExportReport:
    """The plan, if this host can carry it out: the directory is there, the name is free, there is room. NotFound,
    AlreadyExists, NoSpace, InvalidInput."""
    report = plan_export(record, request)
    await host.volumes.check_disks(record.config.disks)
    for disk in exported(record.config):
        for layer in disk.source.layers():
            read_node(layer)
    await asyncio.to_thread(_check_place, report, record.config)
    return report


def _check_place(report: ExportReport, config: VmConfig) -> None:
    directory = os.path.dirname(report.path)
    if not os.path.isdir(directory):
        raise NotFound(f"directory {directory}", "does not exist", "create it first, or choose another one")
    if os.path.lexists(report.path):
        raise AlreadyExists(f"path {report.path}", "exists already", "move it away, or choose another directory")
    found = os.statvfs(directory)
    free, least = found.f_bavail * found.f_frsize, 0
    if report.form is ExportForm.FOLDER:
        layers = [layer for disk in exported(config) for layer in disk.source.layers()]
        least = max((os.stat(layer.path).st_blocks * 512 for layer in layers), default=0)
    if least > free:
        raise NoSpace(
            f"directory {directory}",
            f"has {format_size(free)} free, and at least {format_size(least)} are needed",
            "free some space, or choose another directory",
        )


class _Export:
    """The work of one export."""

    def __init__(self, host: Host, actor: VmActor, params: Params) -> None:
        self._host, self._actor = host, actor
        self._form = ExportForm(str(params["form"]))
        self._wanted = ImageFormat(str(params["format"])) if params["format"] is not None else None
        self._path = str(params["path"])

    def _part(self, context: JobContext) -> str:
        return _part_of(self._path, context.job.id)

    @property
    def _config(self) -> VmConfig:
        return self._actor.record.config

    async def write(self, context: JobContext) -> None:
        """Everything, below a name that only this job has."""
        part = self._part(context)
        await asyncio.to_thread(remove_tree, part)
        await self._host.claims.claim(self._actor.record.id, self._config.disks, self._actor.record.generation)
        for disk in exported(self._config):
            await asyncio.to_thread(require_own_data, disk.source)  # the VM may have run since the export was asked for
        try:
            os.mkdir(part, PASSABLE)
            os.chmod(part, PASSABLE)  # whatever the umask
            if self._form is ExportForm.FOLDER:
                await self._write_own(part, context)
            else:
                await self._write_ovf(part, context)
        except OSError as error:
            raise explain_os(f"export {self._path}", error, Path(self._path).parent) from error

    async def _write_own(self, part: str, context: JobContext) -> None:
        files = {}
        for disk, show in self._shown(context):
            files[disk.id] = file_of(disk, True, self._wanted)
            await self._copy(disk, os.path.join(part, files[disk.id]), show)
        others = await asyncio.to_thread(self._copy_state, part)
        config = self._config
        kept = tuple(_described(d, self._wanted) for d in config.disks if d.id in files or d.media is not Media.DISK)
        described = write_own(config.but(disks=kept), files, __version__, utc_now().isoformat())
        await asyncio.to_thread(_write, os.path.join(part, DESCRIPTION), described)
        names = [DESCRIPTION, *others, *files.values()]
        digests = [await _digest(part, name) for name in names]
        await asyncio.to_thread(_write, os.path.join(part, MANIFEST), write_manifest(digests))

    async def _copy(self, disk: Disk, path: str, show: OnProgress) -> None:
        """As it is where that costs nothing, else converted; several layers become one image."""
        source, format = disk.source, format_of(disk, self._wanted)
        if source.backing is None and source.format is format and await _cloned(source.path, path):
            return
        images = self._host.volumes.service.images
        await images.convert_node(read_node(source), path, format, source.size, show)

    def _copy_state(self, part: str) -> list[str]:
        """UEFI variables and TPM state. They lie in a directory of the VM's user, who may be hostile."""
        state = self._host.paths.vm_state(self._config.id)
        copied = []
        for name, place in STATE_FILES.items():
            content = _read_private(os.path.join(state, place))
            if content is not None:
                _write(os.path.join(part, name), content)
                copied.append(name)
        return copied

    async def _write_ovf(self, part: str, context: JobContext) -> None:
        images = self._host.volumes.service.images
        made = []
        for disk, show in self._shown(context):
            name = file_of(disk, False, None)
            path = os.path.join(part, name)
            await images.pack_vmdk(read_node(disk.source), path, show)
            made.append(OvfDisk(disk, name, os.stat(path).st_size))
        stem = _stem(self._config)
        await asyncio.to_thread(_write, os.path.join(part, f"{stem}.ovf"), write_ovf(self._config, made))
        digests = [await _digest(part, name) for name in (f"{stem}.ovf", *(m.file for m in made))]
        await asyncio.to_thread(_write, os.path.join(part, f"{stem}.mf"), write_mf(digests))
        if self._form is ExportForm.OVA:
            context.progress(Progress(text="packing"))
            names = (f"{stem}.ovf", f"{stem}.mf", *(m.file for m in made))
            files = [(name, os.path.join(part, name)) for name in names]
            await interruptible(partial(write_archive, os.path.join(part, "archive"), files))

    def _shown(self, context: JobContext) -> Sequence[tuple[Disk, OnProgress]]:
        """Each disk with what shows its part of the whole."""
        disks = exported(self._config)
        whole = sum(max(1, d.source.size) for d in disks)
        found, done = [], 0
        for disk in disks:
            share = max(1, disk.source.size)
            found.append((disk, partial(_show, context, f"disk {disk.id}", done / whole, share / whole)))
            done += share
        return found

    async def remove(self, context: JobContext) -> None:
        """What was written goes; the disks are free again."""
        await asyncio.to_thread(remove_tree, self._part(context))
        await self._host.claims.release(self._actor.record.id)

    async def publish(self, context: JobContext) -> None:
        """Its own name. AlreadyExists when somebody else took it meanwhile."""
        part = self._part(context)
        if not self.is_published(context):
            await asyncio.to_thread(_publish, part, self._path, self._form)
        context.no_return()
        await self._host.claims.release(self._actor.record.id)
        await asyncio.to_thread(remove_tree, part)
        form = self._form
        request = ExportRequest(directory=os.path.dirname(self._path), form=form, format=self._wanted)
        context.result(plan_export(self._actor.record, request).but(path=self._path).to_json())

    def is_published(self, context: JobContext) -> bool:
        """Whether it has its name: then what it was made from is no more."""
        part = self._part(context)
        made = os.path.join(part, "archive") if self._form is ExportForm.OVA else part
        return not os.path.lexists(made) and os.path.lexists(self._path)


def _part_of(path: str, job_id: str) -> str:
    """The name that only this job has, beside the one it will get."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:40]}.{job_id}{PART}")


def _show(context: JobContext, text: str, done: float, share: float, fraction: float) -> None:
    context.progress(Progress(fraction=min(1.0, done + share * fraction), text=text))


def _described(disk: Disk, wanted: ImageFormat | None) -> Disk:
    """A disk as the folder has it: one layer, in the folder's format; a drive without its medium."""
    if disk.media is not Media.DISK:
        return disk
    source = disk.source.but(format=format_of(disk, wanted), backing=None, node="", pool="")
    return disk.but(source=source)


async def _digest(part: str, name: str) -> Digest:
    return Digest(name, "sha256", await interruptible(partial(digest_of, os.path.join(part, name), "sha256")))


class _NotCloned(Exception):
    """The file system does not share blocks."""


async def _cloned(source: str, path: str) -> bool:
    try:
        async with new_file(path) as part:
            if not await asyncio.to_thread(clone, source, part):
                raise _NotCloned
    except _NotCloned:
        return False
    return True


def _write(path: str, content: bytes) -> None:
    with open(path, "xb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _read_private(path: str) -> bytes | None:
    """A regular file of bounded size, not through a link; None where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_STATE:
            return None
        return file.read(LARGEST_STATE)


def _publish(part: str, path: str, form: ExportForm) -> None:
    try:
        if form is ExportForm.OVA:
            os.link(os.path.join(part, "archive"), path)
            os.unlink(os.path.join(part, "archive"))
        else:
            if os.path.lexists(path):
                raise FileExistsError
            os.rename(part, path)
        fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileExistsError as error:
        raise AlreadyExists(f"path {path}", "exists already", "choose another directory") from error
    except OSError as error:
        raise NotPermitted(f"path {path}", f"cannot be made: {error.strerror}", "choose another directory") from error


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    work = _Export(host, actor, params)
    published: list[Callable[[], bool]] = []

    async def publish(context: JobContext) -> None:
        published.append(lambda: work.is_published(context))
        await work.publish(context)

    return (
        Step("write", work.write, work.remove),
        Step("publish", publish, insist=lambda: bool(published) and published[-1]()),
    )


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """One that has its name already has only to say so."""
    path = str(job.params["path"])
    part = _part_of(path, job.id)
    made = os.path.join(part, "archive") if job.params["form"] == ExportForm.OVA else part
    begun = any(s.name == "publish" and s.state.value != "pending" for s in job.steps)
    return "publish" if begun and os.path.lexists(path) and not os.path.lexists(made) else None


def params_of(report: ExportReport, request: ExportRequest) -> Params:
    """What the job is asked to do."""
    return {
        "form": request.form.value,
        "format": request.format.value if request.format else None,
        "path": report.path,
    }


OPERATION = Operation("vm.export", "export it", frozenset({VmState.OFF}), steps, resume_at)
