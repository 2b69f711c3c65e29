"""The disks of a simulated QEMU: layers, jobs, bitmaps, limits and media as values; see hostler.host.blocks.Blocks.

A job goes on by one step whenever somebody looks at it, and is over (or ready) after `qemu.job_steps` of them; it
stands while `qemu.jobs_stand`, and fails with `qemu.job_error`, in QEMU's words, where that is set.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.disk import Disk, DiskSource, IoLimits, Media, SourceKind
from hostler.model.errors import (
    Busy,
    Cancelled,
    GuestRefused,
    HostlerError,
    InvalidInput,
    NotFound,
    QemuFailed,
    WrongState,
)
from hostler.model.pool import Connection
from hostler.qemu import blockdev
from hostler.qemu.blockjobs import can_grow, check_commit
from hostler.qemu.failures import image_error
from hostler.qemu.layers import check_seen
from hostler.testing.faults import Faults
from hostler.testing.simulated_moments import SimulatedMoments
from hostler.testing.simulated_world import SimulatedJob, SimulatedQemu

OnBlockJob = Callable[[BlockJob], None]

_OVER = (BlockJobState.DONE, BlockJobState.FAILED)
_STANDING = 0.01
"""Seconds between two looks at a job that stands."""


@dataclass(frozen=True, slots=True)
class _Switch:
    """What a job makes of its disk at its end: the new chain."""

    qemu: SimulatedQemu
    disk_id: str
    chain: Callable[[DiskSource], DiskSource]

    def __call__(self) -> None:
        disk = self.qemu.disks.get(self.disk_id)
        if disk is not None:
            self.qemu.replace_chain(disk, self.chain(disk.source))


class SimulatedBlocks:
    """The disks of one simulated QEMU. Its methods fail on request under their own names (`faults`)."""

    def __init__(self, qemu: SimulatedQemu, faults: Faults) -> None:
        self._qemu = qemu
        self._faults = faults
        self.moments = SimulatedMoments(qemu, faults)

    async def layers(self) -> dict[str, tuple[str, ...]]:
        """Nodes of each disk."""
        await _enter(self, "layers")
        return {disk.id: _nodes(disk) for disk in self._qemu.disks.values()}

    async def connect(self, connection: Connection) -> None:
        """Remember it."""
        await _enter(self, "connect")
        self._qemu.connections[connection.pool] = connection

    async def push(self, disks: Sequence[Disk], bitmaps: Mapping[str, Sequence[str]] = {}) -> None:
        """New top layers."""
        await _enter(self, "push")
        for disk in disks:
            check_seen(disk)
        new = [disk for disk in disks if blockdev.node_name(disk) not in _nodes(_disk(self._qemu, disk))]
        for disk in new:
            below = disk.source.backing
            if below is None or blockdev.layer_node(disk, below) != _nodes(_disk(self._qemu, disk))[0]:
                raise WrongState(f"disk {disk.id}", "its top layer is not the one the new layer builds on")
            _refuse_if_busy(self._qemu, disk)
            _look_for(disk, disk.source)
        for disk in new:
            self._qemu.replace_chain(_disk(self._qemu, disk), disk.source)
            self._qemu.bitmaps.setdefault(blockdev.node_name(disk), set()).update(bitmaps.get(disk.id, ()))

    async def reopen(self, disk: Disk, layer: DiskSource, writes: bool) -> None:
        """Nothing is seen of it."""
        await _enter(self, "reopen")
        if blockdev.layer_node(disk, layer) not in _nodes(_disk(self._qemu, disk)):
            raise WrongState(f"disk {disk.id}", f"QEMU has not its layer {layer.path}", "read its layers back")

    async def flush(self, disk: Disk) -> None:
        """Nothing is kept in memory here."""
        await _enter(self, "flush")
        if blockdev.node_name(disk) not in _nodes(_disk(self._qemu, disk)):
            raise WrongState(f"disk {disk.id}", f"QEMU has not its layer {disk.source.path}", "read its layers back")

    async def mirror(self, job: str, disk: Disk, target: DiskSource, export: str | None = None, speed: int = 0) -> None:
        """Begin to copy."""
        await _enter(self, "mirror")
        if job in self._qemu.jobs:
            return
        check_seen(disk)
        if export is None:
            _look_for(disk, target)
        _begin(self._qemu, job, "mirror", disk, _Switch(self._qemu, disk.id, lambda _old: target), ready=True)

    async def commit(self, job: str, disk: Disk, top: DiskSource, base: DiskSource, speed: int = 0) -> None:
        """Begin to merge downwards."""
        await _enter(self, "commit")
        if job in self._qemu.jobs:
            return
        check_commit(disk, top, base)
        chain = list(disk.source.layers())
        first, last = (next(i for i, layer in enumerate(chain) if layer.node == end.node) for end in (top, base))
        merged = {
            n for layer in chain[first:last] for n in self._qemu.bitmaps.get(blockdev.layer_node(disk, layer), ())
        }
        into = self._qemu.bitmaps.setdefault(blockdev.layer_node(disk, base), set())
        into.update(merged & _whole(self._qemu, disk))
        active = top.node == disk.source.node
        _begin(
            self._qemu,
            job,
            "commit",
            disk,
            _Switch(self._qemu, disk.id, lambda old: _without(old, top, base)),
            ready=active,
        )

    async def stream(self, job: str, disk: Disk, base: DiskSource | None = None, speed: int = 0) -> None:
        """Begin to merge upwards."""
        await _enter(self, "stream")
        if job in self._qemu.jobs:
            return
        kept = next((layer for layer in disk.source.layers() if base is not None and layer.node == base.node), None)
        _begin(self._qemu, job, "stream", disk, _Switch(self._qemu, disk.id, lambda old: old.but(backing=kept)))

    async def job(self, job: str) -> BlockJob | None:
        """A job, one step further."""
        await _enter(self, "job")
        return _step(self._qemu, job)

    async def watch(self, job: str, on_progress: OnBlockJob | None = None, until_ready: bool = False) -> BlockJob:
        """Follow it."""
        await _enter(self, "watch")
        while True:
            found = _step(self._qemu, job)
            if found is None:
                raise NotFound(self._qemu.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
            if on_progress is not None:
                on_progress(found)
            if found.state is BlockJobState.FAILED:
                raise _failure(self._qemu, found)
            if found.state is BlockJobState.DONE or (until_ready and found.state is BlockJobState.READY):
                return found
            await asyncio.sleep(_STANDING if self._qemu.jobs_stand or found.state is BlockJobState.READY else 0)
            _refuse_if_gone(self._qemu, "query-jobs")

    async def speed(self, job: str, speed: int) -> None:
        """Nothing takes time here."""
        await _enter(self, "speed")
        if job not in self._qemu.jobs:
            raise QemuFailed(self._qemu.name, "QEMU refused block-job-set-speed: Job not found")

    async def finish(self, job: str) -> None:
        """Let it switch."""
        await _enter(self, "finish")
        found = self._qemu.jobs.get(job)
        if found is None:
            raise NotFound(self._qemu.name, f"QEMU knows no job {job}", "it was never begun, or was forgotten")
        if found.state is BlockJobState.RUNNING:
            raise WrongState(self._qemu.name, f"its job {job} is not ready", "wait until it is")
        if found.state is BlockJobState.READY:
            found.end(self._qemu.job_error)
        if found.state is BlockJobState.FAILED:
            raise _failure(self._qemu, found.seen())

    async def cancel(self, job: str) -> None:
        """End it without."""
        await _enter(self, "cancel")
        found = self._qemu.jobs.get(job)
        if found is not None and found.state not in _OVER:
            found.end("Operation canceled")

    async def forget(self, job: str) -> None:
        """Drop it."""
        await _enter(self, "forget")
        found = self._qemu.jobs.get(job)
        if found is not None and found.state not in _OVER:
            raise WrongState(self._qemu.name, f"its job {job} is not over", "finish or cancel it first")
        self._qemu.jobs.pop(job, None)

    async def close(self, disk_id: str, layer: str) -> None:
        """Close a layer."""
        await _enter(self, "close")
        disk = self._qemu.disks.get(disk_id)
        if disk is not None and layer in _nodes(disk):
            raise Busy(f"disk {disk_id}", f"its layer {layer} is still used", "wait for what uses it")

    async def resize(self, disk: Disk, size: int) -> None:
        """Grow."""
        await _enter(self, "resize")
        have = _disk(self._qemu, disk)
        if not can_grow(have.source):
            raise InvalidInput(f"disk {disk.id}", f"QEMU cannot grow {have.source.format.value} while the VM runs")
        self._qemu.disks[disk.id] = have.but(source=have.source.but(size=size))

    async def limit(self, disk_id: str, limits: IoLimits) -> None:
        """Remember it."""
        await _enter(self, "limit")
        if disk_id not in self._qemu.disks:
            raise NotFound(f"disk {disk_id}", "the VM has no such disk", "attach it first")
        self._qemu.disks[disk_id] = self._qemu.disks[disk_id].but(limits=limits)

    async def change_medium(self, disk: Disk, export: str | None = None, force: bool = False) -> None:
        """Another medium."""
        await _enter(self, "change_medium")
        have = self._qemu.disks.get(disk.id)
        if have is None or have.media is Media.DISK:
            raise NotFound(f"disk {disk.id}", "the VM has no such drive for removable media", "attach it first")
        if have.source == disk.source:
            return
        if disk.source.kind is not SourceKind.EMPTY and export is None:
            _look_for(disk, disk.source)
        if disk.id in self._qemu.locked_trays and have.source.kind is not SourceKind.EMPTY and not force:
            raise GuestRefused(f"disk {disk.id}", "the guest has locked its drive", "unmount it there, or use force")
        self._qemu.replace_chain(have, disk.source)

    async def bitmaps(self, disk: Disk) -> dict[str, int]:
        """What is known of changes."""
        await _enter(self, "bitmaps")
        return dict.fromkeys(sorted(_whole(self._qemu, disk)), 0)

    async def add_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Begin to note changes."""
        await _enter(self, "add_bitmaps")
        for disk in disks:
            check_seen(disk)
            if name not in _whole(self._qemu, disk):
                _forget_bitmap(self._qemu, disk, name)
                self._qemu.bitmaps.setdefault(blockdev.node_name(disk), set()).add(name)

    async def drop_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Stop that."""
        await _enter(self, "drop_bitmaps")
        for disk in disks:
            _forget_bitmap(self._qemu, disk, name)

    async def keep_bitmaps(self, disk: Disk, target: DiskSource) -> None:
        """Give them to a copy."""
        await _enter(self, "keep_bitmaps")
        self._qemu.bitmaps.setdefault(blockdev.layer_node(disk, target), set()).update(_whole(self._qemu, disk))

    async def freeze(self, deadline: float) -> int:
        """Freeze the guest."""
        await _enter(self, "freeze")
        if not self._qemu.agent:
            raise GuestRefused(self._qemu.name, "no guest agent answered within 2 s", "install qemu-guest-agent")
        self._qemu.frozen = True
        return 1

    async def thaw(self) -> None:
        """Thaw it."""
        await _enter(self, "thaw")
        self._qemu.frozen = False


async def _enter(blocks: SimulatedBlocks, method: str) -> None:
    await blocks._faults.enter(method)
    _refuse_if_gone(blocks._qemu, method)


def _refuse_if_gone(qemu: SimulatedQemu, method: str) -> None:
    if not qemu.alive:
        raise QemuFailed(qemu.name, f"QEMU is gone, {method} was not answered", gone=True)


def _disk(qemu: SimulatedQemu, disk: Disk) -> Disk:
    have = qemu.disks.get(disk.id)
    if have is None:
        raise WrongState(f"disk {disk.id}", "QEMU has no such disk", "read its layers back")
    return have


def _nodes(disk: Disk) -> tuple[str, ...]:
    if disk.source.kind is SourceKind.EMPTY:
        return ()
    return tuple(blockdev.layer_node(disk, layer) for layer in disk.source.layers())


def _look_for(disk: Disk, source: DiskSource) -> None:
    if source.local and not os.path.exists(source.path):
        raise NotFound(f"disk {disk.id}", f"{source.path} does not exist", path=source.path)


def _without(chain: DiskSource, top: DiskSource, base: DiskSource) -> DiskSource:
    """The chain without the layers from `top` down to `base`."""
    if chain.node == top.node:
        return next(layer for layer in chain.layers() if layer.node == base.node)
    assert chain.backing is not None
    return chain.but(backing=_without(chain.backing, top, base))


def _refuse_if_busy(qemu: SimulatedQemu, disk: Disk) -> None:
    if any(job.disk_id == disk.id for job in qemu.jobs.values()):
        raise Busy(f"disk {disk.id}", "other work on it is under way", "wait for it, or cancel it")


def _begin(
    qemu: SimulatedQemu, job: str, kind: str, disk: Disk, switch: Callable[[], None], ready: bool = False
) -> None:
    have = _disk(qemu, disk)
    _refuse_if_busy(qemu, disk)
    qemu.jobs[job] = SimulatedJob(job, kind, disk.id, have.source.size or 1, switch, ready)


def _step(qemu: SimulatedQemu, job: str) -> BlockJob | None:
    found = qemu.jobs.get(job)
    if found is None:
        return None
    if not qemu.jobs_stand and found.state is BlockJobState.RUNNING:
        found.step(qemu.job_steps, qemu.job_error)
    return found.seen()


def _failure(qemu: SimulatedQemu, job: BlockJob) -> HostlerError:
    if job.error == "Operation canceled":
        return Cancelled(qemu.name, f"the job {job.id} was cancelled")
    return image_error(qemu.name, job.error) or QemuFailed(
        qemu.name, f"QEMU's {job.kind} job failed: {job.error}", qemu=job.error
    )


def _whole(qemu: SimulatedQemu, disk: Disk) -> set[str]:
    """The bitmaps that the top layer has, and below it no layer after one that lacks it."""
    holds = [qemu.bitmaps.get(node, set()) for node in _nodes(_disk(qemu, disk))]
    found = set(holds[0]) if holds else set()
    for name in list(found):
        run = [name in held for held in holds]
        if any(run[run.index(False) :] if False in run else ()):
            found.discard(name)
    return found


def _forget_bitmap(qemu: SimulatedQemu, disk: Disk, name: str) -> None:
    for node in _nodes(_disk(qemu, disk)):
        qemu.bitmaps.get(node, set()).discard(name)
