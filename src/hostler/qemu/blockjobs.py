"""Block jobs of a running VM: begun, followed, ended.

    (none) --mirror, commit, stream, backup--> running --> ready (mirror, commit of the top layer) --finish--> concluded
    running | ready --cancel, an error--> concluded;  concluded --forget--> (none)

What QEMU 7.2 does, as measured:
- Every job is made with `auto-dismiss` off: it stays, with its outcome, until it is forgotten. Until then it also holds
  its nodes, so that another job on the same disk is refused.
- `job-cancel` ends a ready mirror or commit without its switch; what was copied so far is left in the target, and what
  a commit wrote into its base is what the layers above say anyway.
- Jobs pause for the moment of a drain (another command on the disk); that is no pause anybody should see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.disk import Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import Cancelled, HostlerError, InvalidInput, NotFound, QemuFailed, TimedOut, WrongState
from hostler.model.machine import MachineEvent
from hostler.qemu import bitmaps, blockdev, layers
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio, Options
from hostler.qemu.failures import image_error
from hostler.qemu.qmp import EVENTS_LOST, QmpSession

OnBlockJob = Callable[[BlockJob], None]

TICK = 0.25
"""Seconds between two readings of a job's counters."""
END_DEADLINE = 60.0
"""Seconds a job may take to end once it was told to: requests under way are awaited."""

_STATES: Mapping[str, BlockJobState] = {
    "ready": BlockJobState.READY,
    "standby": BlockJobState.READY,
    "concluded": BlockJobState.DONE,
    "null": BlockJobState.DONE,
}
_OVER = (BlockJobState.DONE, BlockJobState.FAILED)
_CANCELLED = "Operation canceled"
"""The error of a job that was cancelled (strerror of ECANCELED)."""


def block_job(job: block.Job) -> BlockJob:
    """QEMU's words as ours."""
    state = _STATES.get(job.status, BlockJobState.RUNNING)
    if state is BlockJobState.DONE and job.error:
        state = BlockJobState.FAILED
    return BlockJob(
        id=job.id, kind=job.kind, state=state, done=max(0, job.done), total=max(0, job.total), error=job.error
    )


async def find(qmp: QmpSession, job: str) -> BlockJob | None:
    """See `Blocks.job`."""
    found = (await block.query_jobs(qmp)).get(job)
    return None if found is None else block_job(found)


async def mirror(
    qmp: QmpSession, aio: Aio, job: str, disk: Disk, target: DiskSource, export: str | None, speed: int
) -> None:
    """See `Blocks.mirror`. A disk of one layer is copied without the target being zeroed before (`top` means all of it
    then): the target reads as zeroes already."""
    if await find(qmp, job) is not None:
        return
    layers.check_seen(disk)
    copy = _written(disk, target)
    node = blockdev.blockdev_options(copy, export, aio)
    if disk.source.base.exported and disk.discard:
        # QEMU's VHD and VHDX drivers do not tell zeroes from data: without this the copy would not be sparse.
        node["detect-zeroes"] = "unmap"
    added = await layers.add_node(qmp, copy, node)
    options: Options = {
        **_common(disk, job, speed),
        "device": blockdev.node_name(disk),
        "target": blockdev.node_name(copy),
        "sync": "top" if disk.source.backing is None else "full",
        "on-source-error": "report",
        "on-target-error": "report",
        "copy-mode": "background",
    }
    try:
        await block.blockdev_mirror(qmp, options)
    except BaseException as error:
        if added:
            await layers.drop_quietly(qmp, [blockdev.node_name(copy)])
        if isinstance(error, QemuFailed):
            raise layers.explained(disk, target, error) from error
        raise


async def commit(
    qmp: QmpSession, aio: Aio, job: str, disk: Disk, top: DiskSource, base: DiskSource, speed: int
) -> None:
    """See `Blocks.commit`. No name of a backing file is written into the layer above."""
    if await find(qmp, job) is not None:
        return
    check_commit(disk, top, base)
    above = next((layer for layer in disk.source.layers() if _below(layer, top)), None)
    await bitmaps.extend_down(qmp, aio, disk, top, base)
    await layers.reopen(qmp, aio, disk, base, writes=True)
    options: Options = {
        **_common(disk, job, speed),
        "device": blockdev.node_name(disk),
        "top-node": blockdev.layer_node(disk, top),
        "base-node": blockdev.layer_node(disk, base),
        "on-error": "report",
    }
    if above is not None:
        # QEMU writes this one's header when the job ends, and aborts as a whole where it must not.
        await layers.reopen(qmp, aio, disk, above, writes=True)
        options["backing-file"] = ""
    try:
        await block.block_commit(qmp, options)
    except QemuFailed as error:
        raise layers.explained(disk, disk.source, error) from error


def _below(layer: DiskSource, below: DiskSource) -> bool:
    return layer.backing is not None and layer.backing.node == below.node


def check_commit(disk: Disk, top: DiskSource, base: DiskSource) -> None:
    """InvalidInput when these layers cannot be merged."""
    order = [layer.node for layer in disk.source.layers()]
    if top.node not in order or base.node not in order or order.index(top.node) >= order.index(base.node):
        raise InvalidInput(f"disk {disk.id}", "these are not an upper and a lower layer of it", "read its layers back")
    largest = max(layer.size for layer in disk.source.layers())
    if 0 < base.size < largest and (base.exported or not can_grow(base)):
        raise InvalidInput(
            f"disk {disk.id}",
            f"its layer {base.path} has {base.size} bytes, the disk {largest}, and this format cannot grow",
            "convert the disk instead",
        )


def can_grow(layer: DiskSource) -> bool:
    """Whether QEMU can make this image larger."""
    return layer.kind is SourceKind.VOLUME and layer.format in (ImageFormat.RAW, ImageFormat.QCOW2)


async def stream(qmp: QmpSession, aio: Aio, job: str, disk: Disk, base: DiskSource | None, speed: int) -> None:
    """See `Blocks.stream`. What the lower layers' bitmaps mark is added to the top one's before they go."""
    if await find(qmp, job) is not None:
        return
    await bitmaps.lift(qmp, disk, base)
    options: Options = {**_common(disk, job, speed), "device": blockdev.node_name(disk), "on-error": "report"}
    if base is not None:
        options |= {"base-node": blockdev.layer_node(disk, base), "backing-file": ""}
    try:
        await block.block_stream(qmp, options)
    except QemuFailed as error:
        raise layers.explained(disk, disk.source, error) from error


async def backup(
    qmp: QmpSession,
    aio: Aio,
    jobs: Mapping[str, str],
    disks: Sequence[Disk],
    targets: Mapping[str, DiskSource],
    bitmap: str | None,
    fresh: str | None,
    speed: int,
) -> None:
    """See `Blocks.backup`."""
    there = await block.query_jobs(qmp)
    if all(job in there for job in jobs.values()):
        return
    for disk in disks:
        layers.check_seen(disk)
    if fresh is not None and fresh != bitmap:
        await bitmaps.drop(qmp, aio, disks, fresh)
    copies = {disk.id: _written(disk, targets[disk.id]) for disk in disks}
    actions = await _backup_actions(qmp, jobs, disks, copies, bitmap, fresh, speed)
    added: list[str] = []
    try:
        for copy in copies.values():
            if await layers.add_node(qmp, copy, blockdev.blockdev_options(copy, None, aio)):
                added.append(blockdev.node_name(copy))
        await block.transaction(qmp, actions)
    except BaseException as error:
        await layers.drop_quietly(qmp, added)
        if isinstance(error, QemuFailed):
            raise layers.explained(disks[0], targets[disks[0].id], error) from error
        raise
    if fresh is not None:
        # Lower layers still hold the marks of before. Left there they would only make the next copy larger.
        with suppress(HostlerError):
            await bitmaps.drop(qmp, aio, disks, fresh, but_the_top_one=True)


async def _backup_actions(
    qmp: QmpSession,
    jobs: Mapping[str, str],
    disks: Sequence[Disk],
    copies: Mapping[str, Disk],
    bitmap: str | None,
    fresh: str | None,
    speed: int,
) -> list[block.Action]:
    """For each disk: what to copy, then the new bitmap, then the job.

    In this order no write is lost wherever it falls between two of these actions: it is in the working bitmap, which
    notes too, until the job has taken it over, and in the new one. Each job's disk stands still from the beginning of
    its job to the end of the transaction.
    """
    nodes = await block.block_nodes(qmp)
    actions: list[block.Action] = []
    for disk in disks:
        job, top = jobs[disk.id], blockdev.node_name(disk)
        options = _common(disk, job, speed) | {
            "device": top,
            "target": blockdev.node_name(copies[disk.id]),
            "sync": "full",
            "on-source-error": "report",
            "on-target-error": "report",
        }
        if bitmap is not None:
            working = bitmaps.working_name(job)
            actions += [
                block.bitmap_add_action(top, working, persistent=False),
                block.bitmap_merge_action(top, working, bitmaps.run_of(disk, bitmap, nodes)),
            ]
            options |= {"sync": "bitmap", "bitmap": working, "bitmap-mode": "never"}
        if fresh is not None:
            actions.append(bitmaps.fresh_action(disk, fresh, nodes))
        actions.append(block.backup_action(options))
    return actions


def _written(disk: Disk, target: DiskSource) -> Disk:
    """The disk as it is at its target, which is written to also where the guest only reads."""
    return disk.model_copy(update={"source": target, "read_only": False, "media": Media.DISK})


def _common(disk: Disk, job: str, speed: int) -> Options:
    return {
        "job-id": job,
        "speed": speed,
        "auto-dismiss": False,
        "auto-finalize": True,
        "filter-node-name": blockdev.job_node(disk, job),
    }


async def watch(
    qmp: QmpSession, job: str, on_progress: OnBlockJob | None = None, until_ready: bool = False
) -> BlockJob:
    """See `Blocks.watch`."""
    events = qmp.events()
    while True:
        found = await find(qmp, job)
        if found is None:
            raise NotFound(qmp.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
        if on_progress is not None:
            on_progress(found)
        if found.state in _OVER:
            return _succeeded(qmp, found)
        if until_ready and found.state is BlockJobState.READY:
            return found
        await events.wait_for(lambda event: _tells_of(event, job), TICK)


def _tells_of(event: MachineEvent, job: str) -> bool:
    return event.name == EVENTS_LOST or (
        event.name == "JOB_STATUS_CHANGE"
        and event.data.get("id") == job
        and event.data.get("status") in ("ready", "concluded", "null")
    )


def _succeeded(qmp: QmpSession, job: BlockJob) -> BlockJob:
    if job.state is not BlockJobState.FAILED:
        return job
    if job.error == _CANCELLED:
        raise Cancelled(qmp.name, f"the job {job.id} was cancelled")
    raise image_error(qmp.name, job.error) or QemuFailed(
        qmp.name, f"QEMU's {job.kind} job failed: {job.error}", "look at the storage of the disk", qemu=job.error
    )


async def finish(qmp: QmpSession, job: str) -> None:
    """See `Blocks.finish`. TimedOut when it does not end: then the outcome is unknown."""
    found = await find(qmp, job)
    if found is None:
        raise NotFound(qmp.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
    if found.state is BlockJobState.RUNNING:
        raise WrongState(qmp.name, f"its job {job} is not ready", "wait until it is")
    if found.state is BlockJobState.READY:
        with suppress(QemuFailed):  # it has ended since, or ends: what it says at its end counts
            await block.job_complete(qmp, job)
    await _ended(qmp, job)


async def cancel(qmp: QmpSession, job: str) -> None:
    """See `Blocks.cancel`."""
    found = await find(qmp, job)
    if found is None or found.state in _OVER:
        return
    with suppress(QemuFailed):
        await block.job_cancel(qmp, job)
    try:
        await _ended(qmp, job)
    except TimedOut:
        raise
    except HostlerError as error:  # how it ended does not matter, that it did does
        if error.details.get("gone"):
            raise


async def _ended(qmp: QmpSession, job: str) -> None:
    try:
        async with asyncio.timeout(END_DEADLINE):
            await watch(qmp, job)
    except TimeoutError:
        raise TimedOut(qmp.name, f"its job {job} did not end within {END_DEADLINE:g} s", job=job) from None


async def forget(qmp: QmpSession, job: str) -> None:
    """See `Blocks.forget`. WrongState while it works."""
    found = await find(qmp, job)
    if found is not None:
        if found.state not in _OVER:
            raise WrongState(qmp.name, f"its job {job} is not over", "finish or cancel it first")
        try:
            await block.job_dismiss(qmp, job)
        except QemuFailed as error:
            if "not found" not in error.cause:
                raise
    await bitmaps.drop_working(qmp, job)
    await layers.close_unused(qmp)
