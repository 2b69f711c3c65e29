"""Everything people and programs ask of a disk that a VM has: move it, grow it, limit it, change its medium or how it
is attached. (Attaching and detaching are in `vms`.)"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path

import structlog
from pydantic import ValidationError

from hostler.host.context import Host
from hostler.host.operation import Params
from hostler.host.operations import disk_flatten, disk_media, disk_move, disk_tune
from hostler.host.operations.disk_edit import edit_disk, require_same, source_of
from hostler.host.operations.disks import require_disk
from hostler.model.disk import BUS_NAMES, Bus, Disk, DiskSource, ImageFormat, IoLimits, Media, SourceKind
from hostler.model.disk_requests import DiskChange, DiskFlatten, DiskGrow, DiskLimits, DiskMedium, DiskMove
from hostler.model.errors import AlreadyExists, InvalidInput, NoSpace, NotFound, WrongState
from hostler.model.job import Job
from hostler.model.limits import Limits
from hostler.model.names import MAX_NAME
from hostler.model.units import format_size
from hostler.model.vm import VmRecord, VmState
from hostler.model.volume import Volume
from hostler.storage.formats import SUFFIX

log = structlog.get_logger()

SECTOR = 512
SPARSE = frozenset({ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHD, ImageFormat.VHDX})
"""Formats of which only what is written takes space. A fixed VHD is one piece."""

GROWS_LIVE = frozenset({ImageFormat.RAW, ImageFormat.QCOW2})


class DiskService:
    """The application functions about the disks of VMs."""

    def __init__(self, host: Host) -> None:
        self._host = host

    # move

    async def move(self, ref: str, disk_id: str, request: DiskMove, by: str, dry_run: bool = False) -> Job | VmRecord:
        """Begin to move a disk; with `dry_run` the VM as it would be."""
        actor = self._host.actor(ref)
        disk_move.OPERATION.allow(actor.record)
        disk = require_disk(actor.record, disk_id)
        params = await self.plan_move(actor.record, disk, request)
        if dry_run:
            return edit_disk(actor.record, disk_id, lambda d: d.but(source=source_of(params["target"])))
        return await disk_move.OPERATION.begin(
            self._host, actor, by, params, require=lambda now: require_same(now, disk)
        )

    async def plan_move(self, record: VmRecord, disk: Disk, request: DiskMove) -> Params:
        """The parameters of the job; what is refused before it begins."""
        _require_movable(record, disk)
        volume = await self._volume_of(disk)
        name = await self._name_after(record, disk, volume, request)
        target = await self._target(record, disk, volume, name, request)
        return {
            "disk_id": disk.id,
            "source": disk.source.to_json(),
            "target": target.to_json(),
            "volume": _made_as(name, target.node),
            "name": name,
            "pool": await self._host.volumes.pool_at(target.path),
            "keep_source": request.keep_source,
            "limit": request.limit,
        }

    async def _volume_of(self, disk: Disk) -> Volume | None:
        try:
            return await self._host.volumes.get(disk.source.path) if disk.source.local else None
        except NotFound:
            return None

    async def _name_after(self, record: VmRecord, disk: Disk, volume: Volume | None, request: DiskMove) -> str:
        """The volume's name after the move: the wished one, which must be free; else its own, which goes along with it;
        else the first free one made from the VM's."""
        taken = {v.name for v in await self._host.volumes.list()}
        if request.name is not None:
            if request.name in taken and (request.keep_source or volume is None or volume.name != request.name):
                raise AlreadyExists(f"volume {request.name}", "there is a volume with that name", "choose another name")
            return request.name
        if volume is not None and not request.keep_source:
            return volume.name
        stem = (volume.name if volume is not None else f"{record.name}-{disk.id}")[: MAX_NAME - 4]
        number, name = 2, stem
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        return name

    async def _target(
        self, record: VmRecord, disk: Disk, volume: Volume | None, name: str, request: DiskMove
    ) -> DiskSource:
        """The new image. Refused here is what `create` would refuse later, and too little space."""
        old = disk.source
        format = request.format or (old.format if old.kind is SourceKind.VOLUME else ImageFormat.QCOW2)
        size = old.size + -old.size % SECTOR
        token = secrets.token_hex(4)
        if request.pool is not None:
            path = await self._host.volumes.place_in(request.pool, name, size, format)
        else:
            path = await asyncio.to_thread(_path_for, request, old, format, name)
        target = self._host.volumes.service.check_new(_made_as(name, token), size, format, path)
        await asyncio.to_thread(_require_free, target)
        needed = _space_for(record, disk, format, volume.allocated if volume is not None else 0)
        await asyncio.to_thread(_require_space, f"disk {disk.id} of vm {record.name}", target, needed)
        return DiskSource(path=target, format=format, size=size, node=token)

    # flatten

    async def flatten(self, ref: str, disk_id: str, request: DiskFlatten, by: str) -> Job:
        """Begin to copy what a disk's lower layers hold into its top one."""
        actor = self._host.actor(ref)
        disk_flatten.OPERATION.allow(actor.record)
        disk = require_disk(actor.record, disk_id)
        params = await self.plan_flatten(actor.record, disk, request)
        return await disk_flatten.OPERATION.begin(
            self._host, actor, by, params, require=lambda now: require_same(now, disk)
        )

    async def plan_flatten(self, record: VmRecord, disk: Disk, request: DiskFlatten) -> Params:
        """The parameters of the job; what is refused before it begins."""
        subject = f"disk {disk.id} of vm {record.name}"
        if disk.source.backing is None:
            raise WrongState(subject, "is one image already", "there is nothing to flatten")
        if not disk.writes:
            raise WrongState(subject, "is read-only", "flatten its image instead: 'hostler volume flatten'")
        points = await self._host.checkpoints.of(record.id)
        mine = {layer.path for layer in disk.source.layers()}
        held = [p.name for p in points if any(s.path in mine for top in p.frozen().values() for s in top.layers())]
        if held:
            raise WrongState(
                subject,
                f"has layers that checkpoints need: {', '.join(held[:5])}",
                "delete those first with 'hostler checkpoint delete'",
                checkpoints=[*held],
            )
        return {"disk_id": disk.id, "source": disk.source.to_json(), "limit": request.limit}

    # grow and limit

    async def grow(self, ref: str, disk_id: str, request: DiskGrow, by: str) -> Job:
        """Begin to make a disk larger."""
        actor = self._host.actor(ref)
        disk = require_disk(actor.record, disk_id)
        disk_tune.GROW.allow(actor.record)
        _require_growable(self._host.limits, actor.record, disk, request.size)
        return await disk_tune.GROW.begin(
            self._host,
            actor,
            by,
            {"disk_id": disk_id, "size": request.size},
            require=lambda now: require_same(now, disk),
        )

    async def limit(self, ref: str, disk_id: str, request: DiskLimits, by: str) -> Job:
        """Begin to limit what a disk may do."""
        actor = self._host.actor(ref)
        disk = require_disk(actor.record, disk_id)
        try:
            limits: IoLimits = request.over(disk.limits)
        except ValidationError as error:
            cause = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidInput(f"limits of disk {disk_id}", cause, "0 takes a limit away") from error
        return await disk_tune.LIMIT.begin(
            self._host,
            actor,
            by,
            {"disk_id": disk_id, "limits": limits.to_json()},
            require=lambda now: require_same(now, disk),
        )

    # media

    async def change_medium(self, ref: str, disk_id: str, request: DiskMedium, by: str) -> Job:
        """Begin to change the medium of a drive, or to take it out."""
        actor = self._host.actor(ref)
        drive = require_disk(actor.record, disk_id)
        if not drive.removable:
            raise InvalidInput(
                f"disk {disk_id} of {actor.subject}",
                "is a disk, and no drive for removable media",
                "attach and detach disks with 'hostler disk add' and 'hostler disk remove'",
            )
        params = await self.plan_medium(drive, request)
        return await disk_media.OPERATION.begin(
            self._host, actor, by, params, require=lambda now: require_same(now, drive)
        )

    async def plan_medium(self, drive: Disk, request: DiskMedium) -> Params:
        """The parameters of the job."""
        medium = await self._medium(request)
        if medium.path == drive.source.path and medium.kind is drive.source.kind:
            medium = drive.source  # it is in already: nothing will happen
        return {
            "disk_id": drive.id,
            "source": drive.source.to_json(),
            "medium": medium.to_json(),
            "force": request.force,
        }

    async def _medium(self, request: DiskMedium) -> DiskSource:
        if request.volume is None:
            return DiskSource(kind=SourceKind.EMPTY, path="")
        found = await self._host.volumes.resolve_image(request.volume, request.format)
        return found.model_copy(update={"node": secrets.token_hex(4)})

    # how it is attached

    async def change(self, ref: str, disk_id: str, request: DiskChange, by: str, when_off: bool = False) -> VmRecord:
        """Change how a disk is attached. Refused while the VM runs, or kept for its next start with `when_off`."""
        actor = self._host.actor(ref)
        require_disk(actor.record, disk_id)
        changes = {name: value for name in request.model_fields_set if (value := getattr(request, name)) is not None}

        def edit(record: VmRecord) -> VmRecord:
            now = require_disk(record, disk_id)
            if record.state is VmState.OFF and record.job is None:
                return edit_disk(record, disk_id, lambda disk: _changed(disk, changes))
            if not when_off:
                raise WrongState(
                    f"disk {disk_id} of {actor.subject}",
                    f"the VM is {record.state}; to change {', '.join(sorted(changes))} it must be off",
                    "shut it down first, or keep the change for its next start with '--when-off'",
                    fields=[*sorted(changes)],
                )
            _changed(now, changes)
            waiting = record.next_config or record.config
            later = tuple(_changed(d, changes) if d.id == disk_id else d for d in waiting.disks)
            return record.but(next_config=waiting.but(disks=later))

        record = await actor.change(edit)
        log.info("disk.changed", vm=record.id, disk=disk_id, by=by, fields=sorted(changes))
        return record


def _path_for(request: DiskMove, old: DiskSource, format: ImageFormat, name: str) -> str:
    """The path of the new image; in a directory it is called like the old one, where that has a name."""
    to = request.to or ""
    path = to.rstrip("/") or "/"
    if not os.path.isdir(path):
        if to.endswith("/"):
            raise NotFound(f"directory {path}", "does not exist", "create it first, or choose another path")
        return path
    own = Path(old.path) if old.kind is SourceKind.VOLUME and not request.name else Path(name + SUFFIX[format])
    return os.path.join(path, own.name if format is old.format else own.stem + SUFFIX[format])


def _made_as(name: str, token: str) -> str:
    """The name of a volume while it is made: its own one may still be that of the image it replaces."""
    return f"{name[: MAX_NAME - len(token) - 1]}~{token}"


def _require_movable(record: VmRecord, disk: Disk) -> None:
    subject = f"disk {disk.id} of vm {record.name}"
    cause = advice = ""
    if disk.removable:
        cause, advice = "is a drive for removable media", "change its medium with 'hostler disk media'"
    elif disk.source.backing is not None:
        cause = f"is a chain of {len(list(disk.source.layers()))} images"
        advice = "delete the VM's checkpoints first, which merges them"
    elif disk.reservations:
        cause, advice = "is a device that the guest reserves for itself", "detach it instead"
    elif record.state is VmState.OFF and disk.source.kind is not SourceKind.VOLUME:
        cause, advice = f"is a {disk.source.kind}, and the VM is off", "start the VM first"
    elif record.state is not VmState.OFF and disk.read_only:
        cause, advice = "is read-only, and QEMU would have to write to the copy", "shut the VM down first"
    if cause:
        raise WrongState(subject, cause, advice)


def _space_for(record: VmRecord, disk: Disk, format: ImageFormat, allocated: int) -> int:
    """Bytes the new image takes at most, as far as one can tell. QEMU 7.2 writes the holes of a raw source into dynamic
    VHD and VHDX as zeroes, since their drivers know no others; qemu-img leaves them out."""
    flat = disk.source.format in (ImageFormat.RAW, ImageFormat.VHD_FIXED)
    served = format in (ImageFormat.VHD, ImageFormat.VHDX)
    whole = format not in SPARSE or (record.state is not VmState.OFF and flat and served)
    return disk.source.size if whole else allocated


def _require_free(path: str) -> None:
    directory = os.path.dirname(path)
    if os.path.lexists(path):
        raise AlreadyExists(f"file {path}", "exists already; files are never overwritten", "choose another path")
    if not os.path.isdir(directory):
        raise NotFound(f"directory {directory}", "does not exist", "create it first, or choose another path")


def _require_space(subject: str, path: str, needed: int) -> None:
    directory = os.path.dirname(path)
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if needed > free:
        raise NoSpace(
            subject,
            f"needs {format_size(needed)} in {directory}, where {format_size(free)} are free",
            "free some space there, or choose another place",
            needed=needed,
            free=free,
        )


def _require_growable(limits: Limits, record: VmRecord, disk: Disk, size: int) -> None:
    subject = f"disk {disk.id} of vm {record.name}"
    live = record.state is not VmState.OFF
    source = disk.source
    if disk.removable or disk.read_only:
        raise WrongState(subject, "cannot be written to, so it cannot grow", "grow its image where it is written")
    if size <= source.size:
        raise InvalidInput(
            subject,
            f"has {format_size(source.size)} already; {format_size(size)} is not more",
            "disks grow only: what a smaller one would lose, nobody could tell",
        )
    limit = "vhd_size" if source.format in (ImageFormat.VHD, ImageFormat.VHD_FIXED) else "volume_size"
    limits.refuse_above(subject, limit, size, "the size")
    if live and source.kind is SourceKind.VOLUME and source.format not in GROWS_LIVE:
        raise WrongState(
            subject,
            f"is a {source.format}, which cannot grow while the VM runs",
            "shut the VM down first, or move the disk to qcow2: 'hostler disk move ... --format qcow2'",
        )
    if not live and (source.kind is not SourceKind.VOLUME or source.backing is not None):
        raise WrongState(subject, "can only grow while the VM runs", "start it first")


def _changed(disk: Disk, changes: dict[str, object]) -> Disk:
    """InvalidInput for what cannot be."""
    subject = f"disk {disk.id}"
    if "read_only" in changes and disk.media is Media.CDROM:
        raise InvalidInput(subject, "is a CD drive, which never writes", "leave it as it is")
    if changes.get("read_only") and disk.bus is Bus.IDE:
        raise InvalidInput(
            subject, f"is on the {BUS_NAMES[disk.bus]}, where a hard disk cannot be read-only", "put it on SCSI"
        )
    return disk.but(**changes)
