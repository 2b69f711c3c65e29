"""Back up a VM's disks, all as they are at one moment, into a directory, while it runs or is off.

    open      a VM that is off gets a QEMU that never runs its guest: its images are read as they ever are
    snapshot  choose what each disk's copy builds on; begin a new bitmap; the moment
    copy      QEMU writes to us, we into files beside the backup's final place
    commit    the manifest, and the final name: from here on the backup is there
    close     drop the bitmap of the former backup, keep nothing any more, end the QEMU of a VM that is off

The bitmap of the former backup goes on until the new backup is there, and the new one is dropped unless it gets there:
whenever this ends, exactly one of them knows everything that changed since its backup.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import structlog

from hostler.host.actor import VmActor
from hostler.host.backups.state import keep_state
from hostler.host.backups.trail import forget_bitmap, note_backup, note_bitmap, stale_bitmaps
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.launching import claim, end_machine, unclaim
from hostler.host.steps import JobContext, Step
from hostler.model.backup import (
    BackedDisk,
    Backup,
    BackupMode,
    Consistency,
    Tracking,
    bitmap_name,
    chain,
    choose,
    to_back_up,
)
from hostler.model.base import utc_now
from hostler.model.disk import Disk, ImageFormat
from hostler.model.errors import GuestRefused, HostlerError, NoSpace, WrongState
from hostler.model.job import Job, Progress
from hostler.model.machine import RunStatus
from hostler.model.units import MiB, format_size
from hostler.model.vm import Firmware, VmConfig, VmState
from hostler.storage.backups.copying import DiskSink
from hostler.storage.backups.directory import BackupDirectory, disk_file
from hostler.storage.nbd import serving
from hostler.storage.qemu_img import explain_os
from hostler.storage.waiting import in_thread

log = structlog.get_logger()

FREEZE = 10.0
"""Seconds the guest's agent may take to freeze its file systems."""
SOCKET = "backup.sock"
AT_REST = frozenset({VmState.OFF, VmState.SAVED})
SPARE = 16 * MiB
"""Bytes that shall be left in the backup's file system beyond what is expected to be copied."""


class _Work:
    """One backup under way: what its steps share. Everything that must survive is in the job's data."""

    def __init__(self, host: Host, actor: VmActor, params: Params) -> None:
        self.host = host
        self.actor = actor
        self.params = params
        self.id = str(params["backup"])
        self.directory = BackupDirectory(str(params["directory"]))
        self.scratch = host.paths.state_dir / "scratch"

    @property
    def vm(self) -> str:
        return self.actor.record.id

    @property
    def disks(self) -> tuple[Disk, ...]:
        return to_back_up(self.actor.record.config)

    @property
    def at_rest(self) -> VmConfig:
        """The VM as far as its disks go: for a QEMU that never runs a guest."""
        config = self.actor.record.config
        return config.but(
            vcpus=1, memory=64 * MiB, firmware=Firmware.BIOS, secure_boot=False, tpm=False, kernel=None, nics=()
        )

    def scratch_file(self, disk: Disk) -> str:
        """Where what the guest overwrites of that disk is kept meanwhile."""
        return str(self.scratch / f"{self.vm}-{disk.id}.qcow2")

    async def aside(self, work: Any, *arguments: Any) -> Any:
        """Work on files, in a thread."""
        return await in_thread(f"backup {self.id}", lambda: work(*arguments))

    def is_there(self) -> bool:
        """Whether the backup is complete."""
        return self.directory.exists(self.vm, self.id)

    def locked(self) -> Any:
        """Keep others from this VM's backups in that directory."""
        return self.directory.locked(self.vm)


# open


def open_(work: _Work) -> Step:
    host, actor = work.host, work.actor

    async def do(context: JobContext) -> None:
        if not work.disks:
            raise WrongState(actor.subject, "has no disk that could be backed up")
        await work.aside(work.directory.prepare)
        if actor.machine is None and actor.record.state in AT_REST:
            await context.remember(opened=True)
            await host.volumes.check_disks(work.disks)
            await claim(host, actor, actor.record.config.disks)
            await host.resources.prepare(work.at_rest)
            actor.attach(await host.hypervisor.launch(host.resources.spec(work.at_rest)))
            await actor.set(process=actor.present().process)
        actor.present()

    async def undo(context: JobContext) -> None:
        await _end_at_rest(work, context)

    return Step("open", do, undo)


async def _end_at_rest(work: _Work, context: JobContext) -> None:
    """End the QEMU of a VM that is off. Harmless when there is none, or when the VM runs."""
    host, actor = work.host, work.actor
    if not context.job.data.get("opened") or actor.record.state not in AT_REST:
        return
    await end_machine(host, actor)
    await host.resources.release(work.at_rest)
    if actor.record.state is VmState.OFF:
        await unclaim(host, actor)


# snapshot


def snapshot(work: _Work) -> Step:
    actor = work.actor

    async def do(context: JobContext) -> None:
        if "created" in context.job.data:
            return
        await _choose(work, context)
        await _prepare_scratch(work)
        machine = actor.present()
        await note_bitmap(work.host.store, work.vm, bitmap_name(work.id))
        await machine.blocks.add_bitmaps(work.disks, bitmap_name(work.id))
        running = await machine.status() is RunStatus.RUNNING
        await context.remember(running=running)
        frozen = running and await _freeze(work, context)
        try:
            scratch = {disk.id: work.scratch_file(disk) for disk in work.disks}
            await machine.blocks.moments.begin(work.disks, scratch)
        finally:
            if frozen and actor.machine is not None:
                await _thaw(actor)
        consistency = Consistency.APPLICATION if frozen or not running else Consistency.CRASH
        await context.remember(created=utc_now().isoformat(), consistency=str(consistency))

    async def undo(context: JobContext) -> None:
        there = work.is_there()
        if actor.machine is not None:
            try:
                await _keep_nothing(work, context)
            finally:
                if context.job.data.get("freezing") and actor.machine is not None:
                    await _thaw(actor)
        if actor.machine is not None and not there:
            await actor.machine.blocks.drop_bitmaps(work.disks, bitmap_name(work.id))
            await forget_bitmap(work.host.store, work.vm, bitmap_name(work.id))
        _remove_scratch(work)

    return Step("snapshot", do, undo)


async def _keep_nothing(work: _Work, context: JobContext) -> None:
    """End the moment, and let a guest go on that a daemon left standing while it put filters in or out."""
    machine = work.actor.present()
    await machine.blocks.moments.end(work.disks)
    if context.job.data.get("running") and await machine.status() is RunStatus.PAUSED:
        await machine.run()


async def _choose(work: _Work, context: JobContext) -> None:
    """What each disk's copy builds on. Refused early where there is certainly no room."""

    def look() -> list[Backup]:
        with work.locked():
            return work.directory.backups(work.vm)[0]

    backups: list[Backup] = await work.aside(look)
    blocks = work.actor.present().blocks
    since: dict[str, str] = {}
    why: dict[str, str] = {}
    expected = 0
    for disk in work.disks:
        bitmaps = await blocks.bitmaps(disk)
        below, reason = choose(disk, BackupMode(str(work.params["mode"])), bitmaps, backups)
        if below is None:
            why[disk.id] = reason
            expected += await work.aside(_allocated, disk)
        else:
            since[disk.id] = below
            expected += bitmaps[bitmap_name(below)]
    free: int = await work.aside(work.directory.free)
    if expected + SPARE > free and not work.params.get("compress"):
        raise NoSpace(
            f"directory {work.directory.path}",
            f"has {format_size(free)} free, and up to {format_size(expected)} are to be copied",
            "free some space there, prune old backups, or compress",
            needed=expected,
            free=free,
        )
    await context.remember(since={**since}, why={**why}, expected=expected)


def _allocated(disk: Disk) -> int:
    """Bytes its images take, at most what the guest sees."""
    total = 0
    for layer in disk.source.layers():
        if not layer.local:
            return disk.source.size
        with suppress(OSError):
            found = os.stat(layer.path)
            total += found.st_blocks * 512 or disk.source.size
    return min(total, disk.source.size) if disk.source.size else total


async def _prepare_scratch(work: _Work) -> None:
    """Empty images in a directory of ours that VMs' users cannot change, each readable for this VM's user alone."""
    await work.aside(_make_scratch_directory, work.scratch)
    _remove_scratch(work)
    uid = work.actor.record.config.run_as
    for disk in work.disks:
        path = work.scratch_file(disk)
        await work.host.volumes.service.image.create(path, ImageFormat.QCOW2, disk.source.size)
        if uid is not None:
            os.chown(path, uid, -1, follow_symlinks=False)


def _make_scratch_directory(path: Path) -> None:
    path.mkdir(mode=0o711, exist_ok=True)


def _remove_scratch(work: _Work) -> None:
    for disk in work.disks:
        with suppress(FileNotFoundError):
            os.unlink(work.scratch_file(disk))


async def _freeze(work: _Work, context: JobContext) -> bool:
    """Whether the guest's file systems are frozen now."""
    wanted = str(work.params["consistency"])
    if wanted == "crash":
        return False
    await context.remember(freezing=True)
    try:
        await work.actor.present().blocks.freeze(FREEZE)
    except GuestRefused as error:
        if wanted == "application":
            raise
        log.info("backup.not-frozen", vm=work.vm, why=str(error))
        await context.remember(freezing=False, not_frozen=error.cause)
        return False
    return True


async def _thaw(actor: VmActor) -> None:
    try:
        await actor.present().blocks.thaw()
    except HostlerError as error:
        log.warning("backup.thaw-failed", vm=actor.record.id, why=str(error))


# copy


def copy(work: _Work) -> Step:
    async def do(context: JobContext) -> None:
        if "copied" not in context.job.data:
            await _copy(work, context)

    async def undo(_context: JobContext) -> None:
        await work.aside(work.directory.abandon, work.vm, work.id)

    return Step("copy", do, undo)


async def _copy(work: _Work, context: JobContext) -> None:
    """Take what QEMU writes. What our files could not take is told rather than what QEMU makes of it."""
    since = cast(dict[str, str], context.job.data["since"])
    expected = max(1, int(str(context.job.data["expected"])))
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        context.progress(
            Progress(fraction=min(1.0, done / max(expected, done)), text="copying", detail={"bytes": done})
        )

    with ExitStack() as stack:
        await work.aside(stack.enter_context, work.locked())
        place = await work.aside(work.directory.begin, work.vm, work.id)
        sinks: dict[str, DiskSink] = {}
        for disk in work.disks:
            overlay, compress = disk.id in since, bool(work.params.get("compress"))
            path = disk_file(place, disk.id)
            sink = await work.aside(DiskSink, path, disk.source.size, overlay, compress, on_bytes)
            stack.callback(sink.close)
            sinks[disk.id] = sink
        socket = str(work.host.paths.vm_run(work.vm) / SOCKET)
        bitmaps = {disk_id: bitmap_name(below) for disk_id, below in since.items()}
        speed = int(str(work.params.get("rate", 0))) // len(sinks)
        try:
            async with serving(socket, sinks, work.actor.record.config.run_as):
                await work.actor.present().blocks.moments.copy(work.disks, bitmaps, socket, speed)
        except HostlerError as error:
            raise next((s.error for s in sinks.values() if s.error is not None), error) from error
        copied = {disk_id: await sink.finish() for disk_id, sink in sinks.items()}
        uefi_vars = await work.aside(_keep_state, work, place)
    await context.remember(
        uefi_vars=uefi_vars,
        copied={i: {"blocks": c.blocks, "stored": c.stored, "sums": c.sums} for i, c in copied.items()},
    )


def _keep_state(work: _Work, place: Path) -> str:
    try:
        return keep_state(work.host.paths.vm_state(work.vm), place)
    except OSError as error:
        raise explain_os(f"backup {work.id}", error, place) from error


# commit


def commit(work: _Work) -> Step:
    async def do(context: JobContext) -> None:
        context.no_return()
        backup = _manifest(work, context.job)

        def write() -> None:
            with work.locked():
                others = {b.id: b for b in work.directory.backups(work.vm)[0]}
                for disk in backup.disks:
                    chain(backup, disk.id, others)  # somebody may have removed what it builds on
                work.directory.commit(backup)

        if not work.is_there():
            await work.aside(write)
        context.result({"backup": backup.id, "directory": str(work.directory.path), "full": backup.full})

    return Step("commit", do, insist=work.is_there)


def _manifest(work: _Work, job: Job) -> Backup:
    data = cast(dict[str, Any], job.data)
    created = datetime.fromisoformat(data["created"])
    record = work.actor.record
    disks = []
    for disk in work.disks:
        copied = data["copied"][disk.id]
        disks.append(
            BackedDisk(
                id=disk.id,
                size=disk.source.size,
                format=disk.source.format,
                since=data["since"].get(disk.id),
                why=data["why"].get(disk.id, ""),
                tracking=_tracking(disk, record.state),
                **copied,
            )
        )
    return Backup(
        id=work.id,
        vm=record.id,
        vm_name=record.name,
        host=work.host.facts.name,
        name=str(work.params.get("name", "")),
        created=created,
        took=max(0.0, (utc_now() - created).total_seconds()),
        consistency=Consistency(data["consistency"]),
        config=record.config,
        disks=tuple(disks),
        uefi_vars=str(data.get("uefi_vars", "")),
        left_out=tuple(d.id for d in record.config.disks if d not in work.disks),
    )


def _tracking(disk: Disk, state: VmState) -> Tracking:
    if disk.source.format is ImageFormat.QCOW2:
        return Tracking.PERSISTENT
    return Tracking.NONE if state in AT_REST else Tracking.WHILE_RUNNING


# close


def close(work: _Work) -> Step:
    async def do(context: JobContext) -> None:
        context.no_return()
        await note_backup(work.host.store, work.vm, str(work.directory.path), work.id)
        machine = work.actor.machine
        if machine is not None:
            await _keep_nothing(work, context)
            for name in await stale_bitmaps(work.host.store, work.vm):
                await machine.blocks.drop_bitmaps(work.disks, name)
                await forget_bitmap(work.host.store, work.vm, name)
        _remove_scratch(work)
        await _end_at_rest(work, context)

    return Step("close", do, insist=work.is_there)


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    work = _Work(host, actor, params)
    return (open_(work), snapshot(work), copy(work), commit(work), close(work))


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """A backup that is there is finished; one whose moment is still kept is copied anew; else it is undone."""
    if _Work(host, actor, job.params).is_there():
        return "close"
    if actor.machine is None or "created" not in job.data:
        return None
    return "commit" if "copied" in job.data else "copy"


OPERATION = Operation(
    "vm.backup",
    "back it up",
    frozenset({VmState.RUNNING, VmState.PAUSED, VmState.OFF, VmState.SAVED}),
    steps,
    resume_at,
)
