"""Looking at a machine from elsewhere: its whole report, before anything is done."""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from hostler.foreign.locate import Found, base_name, find, locate_image
from hostler.foreign.mapping import Place, boot_rank, network_of, places, remarks, request_of
from hostler.foreign.own import STATE_FILES
from hostler.host.configure import check_config, new_config
from hostler.host.context import Host
from hostler.host.exchange.import_state import state_files
from hostler.model.chain import ChainRequest
from hostler.model.disk import Bus, ImageFormat, Media
from hostler.model.errors import AlreadyExists, BadImage, HostlerError, InvalidInput, NotFound
from hostler.model.foreign import (
    DiskFate,
    ForeignDisk,
    ForeignKind,
    ForeignMachine,
    ForeignSnapshot,
    ImportDisk,
    ImportReport,
    Remark,
    RemarkKind,
)
from hostler.model.names import MAX_NAME, check_name, nearest
from hostler.model.requests import NicAdd, VmCreate
from hostler.model.transfer import ImportRequest
from hostler.model.units import format_size
from hostler.model.vm import VmConfig
from hostler.network.mac import new_mac
from hostler.qemu import access
from hostler.storage.vmdk import inspect_vmdk, is_vmdk
from hostler.storage.waiting import in_thread

NOBODY = 65_534
"""A user without rights (Debian's "nobody"), in the place of the VM's own, which has none yet."""
_ILLEGAL = re.compile(r"[/\\]")


@dataclass(slots=True)
class Survey:
    """A report in the making, and what the import itself needs beside it. `request`: the VM without its disks;
    `config`: instead, the whole configuration, where the folder is our own."""

    found: Found
    machine: ForeignMachine
    name: str
    disks: list[ImportDisk] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    request: VmCreate | None = None
    config: VmConfig | None = None
    state: dict[str, str] = field(default_factory=dict)
    """UEFI variables and TPM state that go along, by name their path."""
    needed: int = 0
    free: int = 0

    def add(self, kind: RemarkKind, subject: str, text: str, advice: str = "") -> None:
        """One thing more to know."""
        self.remarks.append(Remark(kind=kind, subject=subject, text=text, advice=advice))

    def block(self, error: HostlerError) -> None:
        """Something that stands in the way."""
        self.add(RemarkKind.BLOCKER, error.object, error.cause, error.advice)

    def report(self, path: str) -> ImportReport:
        """What people see of it."""
        order = list(RemarkKind)
        return ImportReport(
            path=path,
            description=self.found.description,
            machine=self.machine,
            name=self.name,
            disks=tuple(self.disks),
            remarks=tuple(sorted(self.remarks, key=lambda r: order.index(r.kind))),
            space_needed=self.needed,
            space_free=self.free,
        )


async def survey(host: Host, request: ImportRequest) -> Survey:
    """Look at everything an import has to do with; nothing is changed. What is wrong with the machine or its disks is
    a remark; InvalidInput, NotFound and NotPermitted are about the path and the request."""
    found = await in_thread(f"import {request.path}", lambda: find(request.path))
    machine = _overridden(_at_checkpoint(found.machine, request.checkpoint), request)
    made = Survey(found, machine, request.name or _name(machine.name))
    placed = places(machine.disks)
    made.remarks += remarks(machine, placed, host.limits)
    names = _volume_names(made.name, [v.name for v in await host.volumes.list()])
    for disk, place in sorted(
        zip(machine.disks, placed, strict=True),
        key=lambda pair: boot_rank(machine, pair[0], machine.disks.index(pair[0])),
    ):
        await _look_at_disk(host, made, disk, place, request, names)
    if found.log_pending:
        made.add(
            RemarkKind.CHANGED,
            f"description {found.description}",
            "was not closed properly: the last changes may not be in it",
            "check the report against Hyper-V's settings",
        )
    _check_digests(made)
    await _check_machine(host, made, request)
    _check_space(host, made, request)
    return made


def _overridden(machine: ForeignMachine, request: ImportRequest) -> ForeignMachine:
    said = {"vcpus": request.vcpus, "memory": request.memory, "firmware": request.firmware}
    return machine.but(**{name: value for name, value in said.items() if value is not None})


def _at_checkpoint(machine: ForeignMachine, wanted: str | None) -> ForeignMachine:
    """The machine with the disks it had at a snapshot."""
    if wanted is None:
        return machine
    matching = [s for s in machine.snapshots if wanted in (s.name, s.id)]
    if len(matching) > 1:
        raise InvalidInput(f"snapshot {wanted!r}", f"is the name of {len(matching)}", f"give an id: {_ids(matching)}")
    if not matching:
        near = nearest(wanted, [s.name for s in machine.snapshots])
        advice = f"did you mean {near!r}?" if near else f"known: {_ids(machine.snapshots) or 'none'}"
        raise NotFound(f"snapshot {wanted!r}", "is not in the description", advice)
    chosen = matching[0]
    return machine.but(disks=chosen.disks, saved_state=chosen.saved_state, notes=chosen.notes or machine.notes)


def _ids(snapshots: Sequence[ForeignSnapshot]) -> str:
    return ", ".join(f"{s.name!r} ({s.id})" for s in snapshots[:20])


def _name(said: str) -> str:
    """The nearest name that is allowed here."""
    plain = "".join(c for c in _ILLEGAL.sub("-", said) if unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029")
    plain = plain.strip().lstrip("-.").strip()[:MAX_NAME].rstrip()
    try:
        return check_name("vm", plain)
    except InvalidInput:
        return "imported"


def _volume_names(stem: str, taken: Sequence[str]) -> list[str]:
    """Enough free names, the first one last: stem, stem-2, stem-3, ..."""
    every = [stem[: MAX_NAME - 5], *(f"{stem[: MAX_NAME - 5]}-{n}" for n in range(2, 1400))]
    return [name for name in every if name not in taken][::-1]


# disks


async def _look_at_disk(
    host: Host, made: Survey, disk: ForeignDisk, place: Place | None, request: ImportRequest, names: list[str]
) -> None:
    shown = ImportDisk(name=disk.name, place=disk.place, media=disk.media)
    if place is not None:
        shown = shown.but(target_bus=place.bus, target_controller=place.controller, target_unit=place.unit)
    reason = _left_out(disk, place)
    if reason is not None:
        made.disks.append(shown.but(problem=reason))
        made.add(RemarkKind.LOST, f"{disk.media} {disk.place}", f"{disk.name}: {reason}".lstrip(": "), _way_out(disk))
        return
    if not disk.name:
        made.disks.append(shown.but(fate=DiskFate.ATTACH))
        return
    try:
        shown = await _find_image(host, made, disk, shown, request)
    except (NotFound, BadImage, InvalidInput, AlreadyExists) as error:
        empty = disk.media is Media.CDROM
        shown = shown.but(problem=f"{error.cause}", fate=DiskFate.ATTACH if empty else DiskFate.LEAVE, path=None)
        _judge_missing(made, disk, error, request)
    else:
        if shown.fate in (DiskFate.COPY, DiskFate.REGISTER, DiskFate.FLATTEN):
            shown = shown.but(volume=names.pop())
    made.disks.append(shown)


def _left_out(disk: ForeignDisk, place: Place | None) -> str | None:
    if disk.bus.value == "floppy":
        return "floppy drives are left out" if disk.name else "an empty floppy drive is left out"
    if disk.physical:
        return "was a disk of that host, passed through"
    return "there is no free place for it" if place is None else None


def _way_out(disk: ForeignDisk) -> str:
    return (
        "attach a device with 'hostler disk add --device'" if disk.physical else "attach it later: 'hostler disk add'"
    )


def _judge_missing(made: Survey, disk: ForeignDisk, error: HostlerError, request: ImportRequest) -> None:
    """A CD that is not there is an empty drive; a disk that is not there, or not whole, stops the import."""
    subject = f"{disk.media} {disk.place}"
    if disk.media is not Media.DISK:
        made.add(RemarkKind.LOST, subject, f"{disk.name}: {error.cause}; the drive is empty", error.advice)
    elif isinstance(error, NotFound) and request.skip_missing:
        made.add(RemarkKind.LOST, subject, f"{disk.name}: {error.cause}; it is left out, as asked")
    else:
        made.add(RemarkKind.BLOCKER, subject, f"{disk.name}: {error.cause}", error.advice)


async def _find_image(
    host: Host, made: Survey, disk: ForeignDisk, shown: ImportDisk, request: ImportRequest
) -> ImportDisk:
    """The drive with what was found of its image. NotFound, BadImage, InvalidInput."""
    found = made.found
    name = base_name(disk.name)
    if name in found.compressed:
        raise BadImage(f"file {name}", "is compressed as a whole", "unpack the package and its files first")
    member = found.members.get(name)
    if member is not None:
        shown = shown.but(path=found.description, offset=member.offset, allocated=member.size)
        return await _in_archive(shown, member.size, request)
    directories = [*found.directories, *request.search]

    def look() -> str | None:
        there = locate_image(disk.name, directories)
        return None if there is None else real_inside(there, found, request)

    path = await in_thread(f"disk {name}", look)
    if path is None:
        where = ", ".join(directories) or "the archive"
        raise NotFound(f"file {name}", f"is not there (looked in {where})", "give its directory with --search")
    shown = shown.but(path=path)
    if disk.media is not Media.DISK:
        size = await in_thread(f"file {path}", lambda: os.stat(path).st_size)
        return shown.but(fate=DiskFate.ATTACH, format=ImageFormat.RAW, size=size, source_format="iso")
    if await in_thread(f"image {path}", lambda: is_vmdk(_head(path))):
        seen = await in_thread(f"image {path}", lambda: inspect_vmdk(path))
        length = await in_thread(f"image {path}", lambda: os.stat(path).st_size)
        return _of_vmdk(shown, seen.size, length, request)
    return await _of_image(host, made, shown, disk, path, request)


def real_inside(path: str, found: Found, request: ImportRequest) -> str:
    """The file without links. InvalidInput for one that is elsewhere than where was to be looked: whoever packed the
    folder could make a disk of any file of this host by a link."""
    real = os.path.realpath(path)
    top = request.path if os.path.isdir(request.path) else os.path.dirname(request.path)
    if os.path.basename(os.path.realpath(top)).lower() == "virtual machines":
        top = os.path.dirname(os.path.realpath(top))
    places = [os.path.realpath(place) for place in (top, *request.search)]
    named = path == request.path and found.machine.kind is ForeignKind.IMAGE
    if not named and not any(os.path.commonpath((place, real)) == place for place in places):
        raise InvalidInput(
            f"file {path}",
            f"leads to {real}, which is outside of what is imported",
            "put the file itself there, or give its directory with --search",
        )
    return real


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


async def _in_archive(shown: ImportDisk, length: int, request: ImportRequest) -> ImportDisk:
    if shown.media is not Media.DISK:
        raise InvalidInput(f"file {shown.name}", "is inside an archive", "unpack the archive to have it")
    path, offset = shown.path or "", shown.offset
    seen = await in_thread(f"image {path}", lambda: inspect_vmdk(path, offset, length))
    return _of_vmdk(shown, seen.size, length, request)


def _of_vmdk(shown: ImportDisk, size: int, length: int, request: ImportRequest) -> ImportDisk:
    target = request.format or ImageFormat.QCOW2
    return shown.but(
        fate=DiskFate.COPY, size=size, allocated=length, length=length, source_format="vmdk", target_format=target
    )


async def _of_image(
    host: Host, made: Survey, shown: ImportDisk, disk: ForeignDisk, path: str, request: ImportRequest
) -> ImportDisk:
    declared = disk.format if disk.format is ImageFormat.RAW else ImageFormat.RAW if request.raw else None
    try:
        seen = await host.volumes.service.look(path, None if declared is ImageFormat.RAW else disk.format)
    except BadImage as error:
        if not error.details.get("differencing"):
            raise
        return await _of_chain(host, made, shown, path, request)
    if seen.format is ImageFormat.RAW and declared is None:
        raise InvalidInput(f"image {path}", "has no header of a known image format", "if it is a raw image, say --raw")
    shown = shown.but(format=seen.format, source_format=str(seen.format), size=seen.size, allocated=seen.allocated)
    if request.in_place:
        await _require_unknown(host, path)
        _note_reach(host, made, shown, path)
        return shown.but(fate=DiskFate.REGISTER, target_format=seen.format)
    if seen.format is ImageFormat.VHDX and await _has_log(host, path):
        made.add(RemarkKind.CHANGED, f"disk {shown.place}", "was not closed properly; its log is replayed for the copy")
        return await _of_chain(host, made, shown, path, request)
    kept = seen.format if made_by_us(disk) else ImageFormat.QCOW2
    return shown.but(fate=DiskFate.COPY, target_format=request.format or kept)


async def _of_chain(host: Host, made: Survey, shown: ImportDisk, path: str, request: ImportRequest) -> ImportDisk:
    """A differencing image (.avhd, .avhdx): with its parents it becomes one new image."""
    search = (*made.found.directories, *request.search)
    chain = await host.volumes.chains.survey(ChainRequest(path=path, search=search))
    bad = next((image for image in chain.images if not image.is_sound), None)
    if bad is not None:
        raise BadImage(f"image {bad.path}", f"{base_name(bad.path)} {bad.problem}", bad.advice)
    for image in chain.images:
        await in_thread(f"image {image.path}", lambda path=image.path: real_inside(path, made.found, request))  # type: ignore[misc]
        for warning in image.warnings:
            made.add(RemarkKind.CHANGED, f"image {base_name(image.path)}", warning)
    if request.in_place:
        made.add(
            RemarkKind.CHANGED,
            f"disk {shown.place}",
            f"is a chain of {len(chain.images)} images, which cannot be written in place; it becomes a new volume",
        )
    top = chain.images[0]
    return shown.but(
        fate=DiskFate.FLATTEN,
        source_format=f"{top.format} chain of {len(chain.images)}" if len(chain.images) > 1 else top.format,
        size=top.size,
        allocated=sum(image.allocated for image in chain.images),
        chain=tuple(image.path for image in chain.images[1:]),
        target_format=request.format or ImageFormat.QCOW2,
    )


async def _has_log(host: Host, path: str) -> bool:
    """Whether a VHDX was not closed by its last user: QEMU does not read it, our own reader does."""
    chain = await host.volumes.chains.survey(ChainRequest(path=path))
    return chain.sound and chain.images[0].log_pending


def _note_reach(host: Host, made: Survey, shown: ImportDisk, path: str) -> None:
    """Whether the user of a VM will get to an image that stays where it is."""
    if not host.facts.privileged:
        return
    try:
        access.check_reachable(path, NOBODY)
    except HostlerError as error:
        made.add(RemarkKind.CHANGED, f"disk {shown.place}", f"cannot be used yet: {error.cause}", error.advice)


async def _require_unknown(host: Host, path: str) -> None:
    with suppress(NotFound):
        known = await host.volumes.get(path)
        raise AlreadyExists(
            f"file {path}", f"is volume {known.name!r} already", f"delete it with --keep-file first: {known.name}"
        )


def made_by_us(disk: ForeignDisk) -> bool:
    """Whether the description says the format, which only our own does: then it is kept."""
    return disk.format is not None


# the machine


def _check_digests(made: Survey) -> None:
    """The files that a manifest names are there; their content is verified when they are copied."""
    if made.found.machine.kind in (ForeignKind.OVA, ForeignKind.OVF) and not made.found.digests:
        made.add(RemarkKind.CHANGED, "manifest", "there is none: whether the files are whole cannot be verified")
    if made.found.members:
        for digest in made.found.digests:
            if digest.name not in made.found.members:
                made.add(RemarkKind.BLOCKER, f"file {digest.name}", "is in the manifest but not in the archive")


async def _check_machine(host: Host, made: Survey, request: ImportRequest) -> None:
    """What this host says to the machine: its name, addresses, networks, limits."""
    try:
        check_name("vm", made.name)
        if any(a.record.name == made.name for a in host.actors.values()):
            raise AlreadyExists(f"vm {made.name}", "a VM of this name exists on this host", "give another: --name")
    except (AlreadyExists, InvalidInput) as error:
        made.block(error)
    nics = _nics(host, made, request)
    controllers = max((d.target_controller + 1 for d in made.disks if d.target_bus is Bus.SCSI), default=0)
    try:
        made.request = request_of(made.machine, made.name, nics, controllers)
        if made.found.config is not None:
            made.config = await _own_config(host, made, made.found.config, nics, request)
            check_config(host, made.config)
        else:
            await new_config(host, made.request)
    except HostlerError as error:
        made.block(error)
    except ValidationError as error:
        made.add(RemarkKind.BLOCKER, f"vm {made.name}", str(error.errors()[0]["msg"]))


def _nics(host: Host, made: Survey, request: ImportRequest) -> tuple[NicAdd, ...]:
    taken = {n.mac for a in host.actors.values() for n in a.record.config.nics}
    own = made.machine.kind is ForeignKind.HOSTLER
    wanted = []
    for number, nic in enumerate(made.machine.nics, 1):
        add = network_of(nic, request.networks, request.network, own)
        subject = f"network adapter {number}"
        if nic.network and nic.network not in request.networks and request.network is None and not own:
            made.add(
                RemarkKind.CHANGED,
                subject,
                f"was connected to {nic.network!r}; here its cable is unplugged",
                f"give --network '{nic.network}=bridge:NAME', or --network user for all",
            )
        if request.new_macs or add.mac is None:
            add = add.model_copy(update={"mac": None})
        elif add.mac in taken:
            made.add(
                RemarkKind.BLOCKER,
                subject,
                f"its MAC address {add.mac} belongs to an adapter of this host already",
                "give --new-macs, or remove the other one",
            )
            add = add.model_copy(update={"mac": None})
        taken |= {add.mac} if add.mac else set()
        wanted.append(add)
    return tuple(wanted)


async def _own_config(
    host: Host, made: Survey, config: VmConfig, nics: Sequence[NicAdd], request: ImportRequest
) -> VmConfig:
    """The configuration of an exported VM as it is here: still with the disks' files, and with its old id."""
    if request.keep_id and config.id in host.actors:
        raise AlreadyExists(f"vm {config.name}", "a VM with its id exists on this host", "leave out --keep-id")
    qemu = host.facts.qemu
    changes: dict[str, object] = {"name": made.name, "vcpus": made.machine.vcpus, "memory": made.machine.memory}
    if config.machine not in qemu.machines:
        changes["machine"] = qemu.machines[0]
        made.add(RemarkKind.CHANGED, "machine type", f"{config.machine} is not known here; it gets {qemu.machines[0]}")
    if config.cpu_model not in qemu.cpu_models:
        changes["cpu_model"] = qemu.default_cpu
        made.add(RemarkKind.CHANGED, "processor", f"{config.cpu_model} cannot be had here; it gets {qemu.default_cpu}")
    kept = [
        nic.but(network=add.network, bridge=add.bridge, mac=add.mac or new_mac(secrets.token_bytes))
        for nic, add in zip(config.nics, nics, strict=True)
    ]
    for nic in kept:
        await host.resources.check_nic(nic)
    config = config.but(**changes, nics=tuple(kept), firmware=made.machine.firmware)
    digests = {d.name: d.value for d in made.found.digests}
    made.state = state_files(config, digests, os.path.dirname(made.found.description), qemu)
    for name in STATE_FILES.keys() & digests.keys() - made.state.keys():
        made.add(RemarkKind.CHANGED, name, "does not fit this host's firmware; the VM gets a new, empty one")
    return config


def _check_space(host: Host, made: Survey, request: ImportRequest) -> None:
    directory = request.directory or str(host.paths.volumes)
    if request.directory is not None and not os.path.isdir(request.directory):
        made.add(RemarkKind.BLOCKER, f"directory {directory}", "does not exist", "create it first, or choose another")
    made.free = _free(directory)
    new = [d for d in made.disks if d.fate in (DiskFate.COPY, DiskFate.FLATTEN)]
    full = ImageFormat.VHD_FIXED
    made.needed = sum(d.size if d.source_format == "vmdk" or d.target_format is full else d.allocated for d in new)
    least = sum(d.allocated for d in new)
    if new and least > made.free:
        made.add(
            RemarkKind.BLOCKER,
            f"directory {directory}",
            f"has {format_size(made.free)} free, and at least {format_size(least)} are needed",
            "free some space, give another --directory, or use --in-place",
        )
    elif new and made.needed > made.free:
        made.add(
            RemarkKind.CHANGED,
            f"directory {directory}",
            f"has {format_size(made.free)} free; copies of the disks may take up to {format_size(made.needed)}",
        )


def _free(directory: str) -> int:
    """Bytes free where a directory is, or will be made."""
    while not os.path.isdir(directory) and directory != "/":
        directory = os.path.dirname(directory)
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
