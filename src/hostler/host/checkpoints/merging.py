"""Carries out what `layers.plan_merges` says about one VM's disks: by its QEMU where that has the layers open, else by
qemu-img. A job holds the VM.

A merge of the layer that is being written ends with a switch: the guest is stopped, QEMU makes the lower layer the one
that is written, that is recorded durably, the guest goes on. At no moment between does anything run that could write
what the record does not lead to. Whatever was killed where, the upper layer has it all until the record has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TypeVar

import structlog

from hostler.host.actor import VmActor
from hostler.host.blocks import Blocks
from hostler.host.checkpoints.book import put
from hostler.host.checkpoints.layer_changes import delete_layers, forget_layers, layers_of, rewrite, together
from hostler.host.checkpoints.layers import Merge, Remove, merged, plan_merges, with_sources
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.resources import renew
from hostler.host.steps import JobContext
from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.checkpoint import Checkpoint
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import HostlerError, InternalError, QemuFailed
from hostler.model.job import Progress
from hostler.model.machine import RunStatus
from hostler.model.vm import VmConfig, VmState
from hostler.qemu.blockdev import layer_node
from hostler.storage.catalogue import Catalogue
from hostler.store.contract import Transaction

log = structlog.get_logger()
T = TypeVar("T")

MOST = 10_000
"""Rounds after which a plan that never ends is a fault of ours."""
RECORD_FIRST, RECORD_MOST = 0.02, 1.0
"""Seconds between attempts to record a switch while the guest stands still."""


class Merging:
    """The merges that are due for one VM."""

    def __init__(self, host: Host, actor: VmActor, context: JobContext) -> None:
        self._host = host
        self._actor = actor
        self._context = context
        self._released = False
        self.changed = False
        """Whether any layer may have been written to, or is gone."""

    async def run(self) -> None:
        """Until nothing is left to be done. A QEMU that dies meanwhile is no reason to end: qemu-img goes on then."""
        await self._go_on_after_crash()
        done = 0
        for _ in range(MOST):
            plan = await self._plan()
            if not plan:
                return
            try:
                await self._do(plan[0], done, done + len(plan))
            except QemuFailed as error:
                if not error.details.get("gone"):
                    raise
                await self._actor.gone.wait()
                continue
            done += 1
        raise InternalError(self._actor.subject, "its layers are not merged after many rounds", "report this")

    async def remove_unneeded(self, before: VmConfig) -> None:
        """Only delete what nothing needs any more of what the VM was before; merge nothing."""
        paths = [action.path for action in await self._plan(before) if isinstance(action, Remove)]
        if paths:
            await remove_layers(self._host, self._actor, paths)

    async def _plan(self, before: VmConfig | None = None) -> list[Remove | Merge]:
        points = await self._host.checkpoints.of(self._actor.record.id)
        return plan_merges(*await layers_of(self._host, self._actor.record, points, before))

    async def _do(self, action: Remove | Merge, done: int, total: int) -> None:
        def show(fraction: float) -> None:
            self._context.progress(
                Progress(fraction=(done + fraction) / total, text=f"merging layers, {done + 1} of {total}")
            )

        if isinstance(action, Remove):
            self.changed = True
            await surely(lambda: remove_layers(self._host, self._actor, [action.path]))
            return
        show(0.0)
        disk = _disk_with(self._actor.record.config.disks, action)
        if disk is not None and self._actor.machine is not None:
            live = _Live(self._host, self._actor, self._context, disk, action)
            await live.open_base()
            self.changed = True
            await live.run(self._actor.machine, show)
        else:
            await self._offline(action, show)

    # with qemu-img

    async def _offline(self, action: Merge, show: Callable[[float], None]) -> None:
        """Layer after layer, the lowest first: each is then in the base, and the next one reads through that."""
        await self._release_what_died()
        disk, chain = await self._chain_from(action.top)
        layers = list(chain.layers())
        paths = [layer.path for layer in layers]
        base = layers[paths.index(action.base)]
        upper = layers[: paths.index(action.base)]
        owner, generation = self._actor.record.id, self._actor.record.generation
        async with AsyncExitStack() as undo:
            await self._host.claims.claim(owner, [disk.at(base)], generation)
            undo.push_async_callback(self._claims_as_they_were, disk)
            self.changed = True
            for number, layer in enumerate(reversed(upper)):
                part = len(upper)
                await self._host.layers.commit(
                    layer.model_copy(update={"backing": base}),
                    lambda fraction, n=number, of=part: show((n + fraction) / of),  # type: ignore[misc]
                )
            await self._name_base(action, base)
            await surely(lambda: record_merge(self._host, self._actor, action))

    async def _name_base(self, action: Merge, base: DiskSource) -> None:
        """The headers of the layers that were on top of the merged ones; of those that the VM has now, too."""
        points = await self._host.checkpoints.of(self._actor.record.id)
        configs = [self._actor.record.config, *(p.config for p in points if p.config is not None)]
        layers = (s for c in configs for d in c.disks for s in d.source.layers())
        above = {s.path: s for s in layers if s.backing is not None and s.backing.path == action.top}
        for layer in above.values():
            await self._host.layers.name_below(layer, base)

    async def _release_what_died(self) -> None:
        """A QEMU that died in the middle has left exports that have images open."""
        if self._actor.machine is None and self._actor.record.state not in (VmState.OFF, VmState.SAVED):
            if not self._released:
                await self._host.resources.release(self._actor.record.config)
            self._released = True

    async def _claims_as_they_were(self, disk: Disk) -> None:
        record = self._actor.record
        if record.state is VmState.OFF:
            await self._host.claims.release(record.id, [disk.id])
        else:
            await rewrite(self._host, self._actor, lambda d: d.source)

    async def _chain_from(self, top: str) -> tuple[Disk, DiskSource]:
        """The layers from that one down, and the disk they are of."""
        points = await self._host.checkpoints.of(self._actor.record.id)
        configs = [self._actor.record.config, *(p.config for p in points if p.config is not None)]
        for disk in (d for config in configs for d in config.disks):
            for layer in disk.source.layers():
                if layer.path == top:
                    return disk, layer
        raise InternalError(self._actor.subject, f"nothing leads to its layer {top}", "report this")

    # after a crash

    async def _go_on_after_crash(self) -> None:
        """What QEMU really has decides; then a guest that stands still because of us goes on."""
        machine = self._actor.machine
        if machine is None:
            return
        await self._forget_ended(machine)
        have = await machine.blocks.layers()
        for disk in self._actor.record.config.disks:
            for action in _missing(disk, have.get(disk.id, ())):
                await record_merge(self._host, self._actor, action)
        if self._context.job.data.get("stopped") and await machine.status() is not RunStatus.RUNNING:
            await machine.run()
        if self._context.job.data.get("stopped"):
            await self._context.remember(stopped=False)

    async def _forget_ended(self, machine: Machine) -> None:
        """A job that has ended, and the images it had open."""
        name = self._context.job.data.get("block_job")
        if name is not None:
            found = await machine.blocks.job(str(name))
            if found is None or found.state in (BlockJobState.DONE, BlockJobState.FAILED):
                await machine.blocks.forget(str(name))


class _Live:
    """One merge by the VM's QEMU."""

    def __init__(self, host: Host, actor: VmActor, context: JobContext, disk: Disk, action: Merge) -> None:
        self._host = host
        self._actor = actor
        self._context = context
        self._disk = disk
        self._action = action
        layers = {layer.path: layer for layer in disk.source.layers()}
        self._top, self._base = layers[action.top], layers[action.base]
        self._job = f"merge-{disk.id}-{self._top.node}"

    async def run(self, machine: Machine, show: Callable[[float], None]) -> None:
        """Merge and record. Cancelled or failed, QEMU has the layers it had, and the job is gone."""

        def on_progress(job: BlockJob) -> None:
            show(job.fraction or 0.0)

        blocks, config = machine.blocks, self._actor.record.config
        active = self._top is self._disk.source
        try:
            await self._forget_failed(blocks)
            await self._context.remember(block_job=self._job)
            await blocks.commit(self._job, self._disk, self._top, self._base)
            await blocks.watch(self._job, on_progress, until_ready=active)
            if active:
                await to_its_end(self._switch(machine))
            else:
                await to_its_end(self._record_surely())
        except BaseException:  # also when cancelled; raised again
            await asyncio.shield(self._give_up(blocks))
            raise
        await blocks.forget(self._job)
        for path in self._action.gone:
            layer = next(s for s in self._disk.source.layers() if s.path == path)
            await blocks.close(self._disk.id, layer_node(self._disk, layer))
            await self._host.resources.revoke(config, self._disk.at(layer))
        await self._finish_rights()

    async def open_base(self) -> None:
        """QEMU may write what it has only read so far: by claim, by access right, and through the export of a base that
        another process serves. It also writes the header of the layer above those that are merged."""
        record = self._actor.record
        above = next((s for s in self._disk.source.layers() if s.backing is not None and s.backing is self._top), None)
        for layer in (self._base, above):
            if layer is not None:
                await self._host.claims.claim(record.id, [self._disk.at(layer)], record.generation)
                await self._host.resources.open_layer(record.config, self._disk, layer)

    async def _forget_failed(self, blocks: Blocks) -> None:
        """An earlier attempt may have left its failed job."""
        found = await blocks.job(self._job)
        if found is not None and found.error:
            await blocks.forget(self._job)

    async def _switch(self, machine: Machine) -> None:
        run = await machine.status() is RunStatus.RUNNING
        if run:
            await surely(lambda: self._context.remember(stopped=True))
            await machine.stop()
        try:
            await machine.blocks.finish(self._job)
        except HostlerError:
            await self._see(machine, run)
            raise
        await self._record_surely()
        if run:
            await machine.run()
            await surely(lambda: self._context.remember(stopped=False))

    async def _see(self, machine: Machine, run: bool) -> None:
        """Finishing failed, or nobody knows: what QEMU has decides, and the guest goes on."""
        have = (await machine.blocks.layers()).get(self._disk.id, ())
        if _missing(self._disk, have):
            await self._record_surely()
        if run:
            await machine.run()

    async def _record_surely(self) -> None:
        """After a switch the guest must not write to what the record does not name: it stands still until then."""
        await surely(lambda: record_merge(self._host, self._actor, self._action))

    async def _give_up(self, blocks: Blocks) -> None:
        if self._actor.machine is None:
            return
        with suppress(HostlerError):
            await blocks.cancel(self._job)
            await blocks.forget(self._job)
            await self._finish_rights()

    async def _finish_rights(self) -> None:
        """Claims and rights as they ought to be for what the record says now."""
        await rewrite(self._host, self._actor, lambda d: d.source)
        disk = self._actor.record.config.disk(self._disk.id)
        if disk is not None:
            await renew(self._actor.record.config, disk)


async def record_merge(host: Host, actor: VmActor, action: Merge) -> None:
    """The layers are one: in what the VM has now, in every checkpoint, and in the records of volumes."""
    points = await host.checkpoints.of(actor.record.id)
    changed = [put(p) for p in (_after(p, action) for p in points) if p is not None]
    layers, rows = await forget_layers(host, action.gone)
    base = await _base_record(host, actor, action)
    extra = together(Transaction(changed), layers, base)
    await rewrite(host, actor, lambda disk: merged(disk.source, action.top, action.base), extra)
    await delete_layers(host, rows)


def _after(point: Checkpoint, action: Merge) -> Checkpoint | None:
    """The checkpoint with its layers merged; None where they are not among its own."""
    if point.config is None:
        return None
    config = with_sources(point.config, lambda disk: merged(disk.source, action.top, action.base))
    return point.model_copy(update={"config": config}) if config != point.config else None


async def _base_record(host: Host, actor: VmActor, action: Merge) -> Transaction:
    """The record of what was merged into: another content, perhaps another size."""
    catalogue = Catalogue(host.store)
    row = await catalogue.find(action.base)
    if row is None:
        return Transaction([])
    sizes = [s.size for d in actor.record.config.disks for s in d.source.layers() if s.path == action.top]
    size = max([row.value.size, *sizes])
    return catalogue.plan_change(row, row.value.but(size=size, generation=row.value.generation + 1))


def _disk_with(disks: Sequence[Disk], action: Merge) -> Disk | None:
    """The disk the VM has now that is made of these layers."""
    for disk in disks:
        paths = {layer.path for layer in disk.source.layers()}
        if action.top in paths and action.base in paths:
            return disk
    return None


def _missing(disk: Disk, have: Sequence[str]) -> list[Merge]:
    """The merges that QEMU has done and the record does not know: runs of layers that QEMU has no more."""
    if not have:
        return []
    found: list[Merge] = []
    run: list[str] = []
    for layer in disk.source.layers():
        if layer_node(disk, layer) not in have:
            run.append(layer.path)
        elif run:
            found.append(Merge(run[0], layer.path, tuple(run)))
            run = []
    return found


async def remove_layers(host: Host, actor: VmActor, paths: Sequence[str]) -> None:
    """Delete layers that nothing needs."""
    layers, rows = await forget_layers(host, paths)
    await actor.set(durable=True, extra=layers)
    await delete_layers(host, rows)


async def surely(work: Callable[[], Awaitable[None]]) -> None:
    """Write to the store until it succeeds (its disk may be full for a while)."""
    delay = RECORD_FIRST
    while True:
        try:
            return await work()
        except HostlerError as error:
            log.warning("checkpoint.not-recorded", why=str(error))
        await asyncio.sleep(delay)
        delay = min(delay * 2, RECORD_MOST)


async def to_its_end(work: Awaitable[T]) -> T:
    """Await it to its end even when cancelled meanwhile; the cancellation goes on then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise
