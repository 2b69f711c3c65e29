"""The moment of a checkpoint: QEMU gets the new layers of all disks, with the guest's file systems frozen or with its
memory where that was asked for."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

import structlog

from hostler.host.actor import VmActor
from hostler.host.checkpoints.layer_changes import remove_layer
from hostler.host.checkpoints.new_layers import NewLayers, without_new_layers
from hostler.host.context import Host
from hostler.host.operations.save import save_progress, stop_writing
from hostler.host.resources import renew
from hostler.host.steps import JobContext
from hostler.model.checkpoint import CheckpointKind
from hostler.model.errors import HostlerError, NoSpace
from hostler.model.machine import RunStatus
from hostler.model.units import format_size
from hostler.model.vm import VmState
from hostler.qemu.saved import PARTIAL
from hostler.storage.layer_images import copy_file

log = structlog.get_logger()

FREEZE_DEADLINE = 10.0
"""Seconds the guest's file systems may take to freeze: its programs stand still from the first one on."""


class Freezing:
    """The freeze of one checkpoint."""

    def __init__(self, host: Host, actor: VmActor, new: NewLayers) -> None:
        self._host = host
        self._actor = actor
        self._new = new
        self._attempted = False
        self._noted: dict[str, tuple[str, ...]] = {}
        self.done = False
        """Whether the disks have their new layers."""

    async def freeze(self, context: JobContext) -> None:
        machine, kind = self._actor.machine, self._new.point.kind
        if self.done:
            return
        if kind is CheckpointKind.FULL and self._actor.record.saved is not None:
            await self._copy_saved(self._actor.record.saved)
        elif machine is not None:
            before = without_new_layers(self._new.written())
            self._noted = {disk.id: tuple(await machine.blocks.bitmaps(disk)) for disk in before}
            await self._freeze_running(context, kind)
        self.done = True
        context.no_return()
        if kind is CheckpointKind.FULL:  # of a transfer that nobody saw through
            await asyncio.to_thread(remove_layer, self._new.memory_path() + PARTIAL)
        if machine is not None:
            await self._narrow_rights()

    async def _freeze_running(self, context: JobContext, kind: CheckpointKind) -> None:
        if kind is CheckpointKind.FULL:
            await self._freeze_with_memory(context)
        elif kind is CheckpointKind.APPLICATION:
            await self._freeze_frozen()
        else:
            await self._push()

    async def _narrow_rights(self) -> None:
        """What has become a lower layer is only read from now on."""
        for disk in self._new.written():
            try:
                await renew(self._actor.record.config, disk)
            except HostlerError as error:
                log.warning("checkpoint.rights-not-narrowed", vm=self._actor.record.id, why=str(error))

    async def _push(self) -> None:
        self._attempted = True
        await self._actor.present().blocks.push(self._new.written(), self._noted)

    async def _freeze_frozen(self) -> None:
        """Thawed in every case, also when it is not known whether it was frozen."""
        blocks = self._actor.present().blocks
        try:
            await blocks.thaw()  # an earlier daemon may have left it frozen, and a frozen guest refuses to freeze
            await blocks.freeze(FREEZE_DEADLINE)
            await self._push()
        finally:
            await asyncio.shield(blocks.thaw())

    async def _freeze_with_memory(self, context: JobContext) -> None:
        machine = self._actor.present()
        if await self._is_in_qemu():  # an earlier daemon did it, and was killed before it saw the memory complete
            await self._go_on()
            return
        try:
            await machine.save_to(self._new.memory_path(), lambda p: save_progress(context, p), self._push)
        except HostlerError as error:
            if self._actor.machine is None or not await self._is_in_qemu():
                raise
            left = "what was made is a checkpoint of the disks alone"
            raise type(error)(error.object, f"{error.cause}; {left}", error.advice, **error.details) from error

    async def _is_in_qemu(self) -> bool:
        layers = await self._actor.present().blocks.layers()
        nodes = self._new.nodes()
        return bool(nodes) and all(node in layers.get(disk, ()) for disk, node in nodes.items())

    async def may_go_forward(self) -> bool:
        """After a crash in the middle of the freeze, with QEMU alive."""
        if self._new.point.kind is not CheckpointKind.FULL:
            return True
        try:
            return await self._is_in_qemu()
        except HostlerError:
            return True

    async def _copy_saved(self, saved: str) -> None:
        if not os.path.exists(self._new.memory_path()):
            await copy_file(saved, self._new.memory_path())

    async def unfreeze(self, _context: JobContext) -> None:
        """It did not come to the new layers: the guest goes on as it was."""
        if self.done:
            return  # it did, and a later step of a longer job has failed
        machine = self._actor.machine
        if self._new.point.kind is CheckpointKind.FULL:
            await self._go_on()
            for path in (self._new.memory_path(), self._new.memory_path() + PARTIAL):
                remove_layer(path)
        elif machine is not None and self._new.point.kind is CheckpointKind.APPLICATION:
            await machine.blocks.thaw()

    async def _go_on(self) -> None:
        """After a daemon that was killed while memory was written: no transfer goes on, the guest does."""
        machine = self._actor.machine
        if machine is not None:
            await stop_writing(self._actor.subject, machine)
            if self._actor.record.state is VmState.RUNNING and await machine.status() is not RunStatus.RUNNING:
                await machine.run()

    def has_happened(self) -> bool:
        """Whether there is no way back: the new layers are in QEMU, or QEMU is gone, and nobody knows."""
        return self.done or (self._attempted and self._actor.machine is None)

    async def may_be_in_qemu(self) -> bool:
        """Whether QEMU has any of the new layers, or has had it, or nobody can tell."""
        machine = self._actor.machine
        if machine is None:
            return self._attempted
        try:
            layers = await machine.blocks.layers()
        except HostlerError as error:
            log.info("checkpoint.unknown", vm=self._actor.record.id, why=str(error))
            return True
        names = {name for nodes in layers.values() for name in nodes}
        return bool(names & set(self._new.nodes().values()))


def require_room(subject: str, path: str, needed: int) -> None:
    """NoSpace where the memory would not fit: better before than after the guest's disks have their new layers."""
    directory = os.path.dirname(path)
    with suppress(OSError):
        found = os.statvfs(directory)
        free = found.f_bavail * found.f_frsize
        if free < needed:
            raise NoSpace(
                subject,
                f"its memory takes up to {format_size(needed)}, and {directory} has {format_size(free)} left",
                "free some space there, or make a checkpoint of the disks alone (--kind disks)",
            )
