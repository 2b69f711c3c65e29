r"""Move a disk to another place, in another format if wanted, while the VM runs or is off.

    create --> copy --> switch --> clean-up
    running or paused: QEMU copies and keeps the copy up to date; the guest stands still for the switch alone
    off:               qemu-img copies

Where the newest data is, at every moment:

    create, copy   in the source; the copy is thrown away when anything fails
    switch         guest stopped -> QEMU switches -> recorded, on disk -> guest goes on
                   \____ nothing is written by the guest ____/
    clean-up       in the target; the source is what is thrown away

Between QEMU's switch and the record both images are the same and stay so. A daemon that dies there finds the guest
stopped, asks QEMU which one it has, records that, and lets the guest go on; when QEMU dies there, the record still
names the source, which is whole.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import structlog

from hostler.host.actor import VmActor
from hostler.host.blocks import Blocks
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.operations.copying import Copying
from hostler.host.operations.disk_edit import change_disk, claim_exactly, source_of
from hostler.host.operations.disks import CHANGEABLE
from hostler.host.operations.launching import claim
from hostler.host.steps import JobContext, Step
from hostler.model.disk import Disk, SourceKind
from hostler.model.errors import AlreadyExists, HostlerError, NotFound
from hostler.model.image import UserKind
from hostler.model.job import Job, Progress, StepState
from hostler.model.machine import RunStatus
from hostler.model.vm import VmState
from hostler.qemu.blockdev import layer_node

log = structlog.get_logger()


class Move:
    """One move: what goes where. `params`: `disk_id`; `source` and `target` (DiskSource); `volume`, the name of the
    target's volume while it is made, `name`, the one it has in the end; `pool`, the one it is in; `keep_source`;
    `limit` in bytes/s."""

    def __init__(self, host: Host, actor: VmActor, params: Params) -> None:
        self._host = host
        self._actor = actor
        self.live = actor.record.state is not VmState.OFF
        self.disk_id = str(params["disk_id"])
        self.source = source_of(params["source"])
        self.target = source_of(params["target"])
        self._volume = str(params["volume"])
        self._name = str(params["name"])
        self._pool = str(params.get("pool", ""))
        self._keep = bool(params["keep_source"])
        self._limit = int(cast(int, params["limit"]))
        self._copying = Copying(actor, self.disk_id)
        self._unsure = False
        """Whether QEMU was asked to switch, and nobody knows whether it did."""

    # what is where

    @property
    def disk(self) -> Disk:
        """The disk as it is on record."""
        disk = self._actor.record.config.disk(self.disk_id)
        assert disk is not None, "the job holds the VM, and no other job takes its disk away"
        return disk

    @property
    def before(self) -> Disk:
        """The disk on the old image."""
        return self.disk.model_copy(update={"source": self.source})

    @property
    def copy(self) -> Disk:
        """The disk on the new image."""
        return self.disk.model_copy(update={"source": self.target})

    @property
    def recorded(self) -> bool:
        """Whether the record names the new image."""
        return self.disk.source.node == self.target.node

    @property
    def blocks(self) -> Blocks:
        """QEMU's block work. QemuFailed when QEMU is gone."""
        return self._actor.present().blocks

    async def switched(self) -> bool:
        """Whether QEMU has the new image under the device."""
        layers = (await self.blocks.layers()).get(self.disk_id, ())
        return layers[:1] == (layer_node(self.copy, self.target),)

    # create

    async def create(self, _context: JobContext) -> None:
        """Make the new image, and let QEMU reach it."""
        if not self.live:
            return
        service = self._host.volumes.service
        if not await self._made():
            await service.create(self._volume, self.target.size, self.target.format, self.target.path, self._pool)
        await claim(self._host, self._actor, (self.copy,))
        await self._host.resources.grant(self._actor.record.config, self.copy)

    async def _made(self) -> bool:
        with suppress(NotFound):
            await self._host.volumes.service.get(self._volume)
            return True
        return False

    async def uncreate(self, _context: JobContext) -> None:
        """Throw the copy away. QEMU has let go of it, or is gone; one that does not answer writes nothing to it that is
        not in the source as well."""
        if self.recorded:
            return
        await self._give_back(self.copy)
        with suppress(NotFound):
            await self._host.volumes.service.delete(self._volume)

    async def _give_back(self, image: Disk) -> None:
        """End the VM's rights to an image that its disk is not on; where there is no QEMU, all claims end."""
        await self._host.resources.revoke(self._actor.record.config, image)
        if self._actor.machine is not None:
            await claim_exactly(self._host, self._actor, (self.disk,))
        else:
            await self._host.claims.release(self._actor.record.id)

    # copy

    async def fill(self, context: JobContext) -> None:
        """Copy everything; at the end the copy is the same, or kept the same, as the source."""
        if not self.live:
            return await self._convert(context)
        await self.blocks.mirror(job_name(context.job), self.disk, self.target, self._export(), speed=self._limit)
        return await self._copying.keep_up(context, job_name(context.job))

    def _export(self) -> str | None:
        return self._host.resources.export_of(self._actor.record.config, self.copy)

    async def _convert(self, context: JobContext) -> None:
        """By qemu-img. Others may read the source meanwhile, and nobody may open the copy."""
        if await self._made():
            return

        def show(fraction: float) -> None:
            context.progress(Progress(fraction=fraction, text="copying the image"))

        reading = self.disk.model_copy(update={"read_only": True})
        await claim(self._host, self._actor, (reading, self.copy))
        await self._host.volumes.service.create_from(
            self._volume,
            self.source.path,
            self.target.format,
            self.target.size,
            self.target.path,
            self.source.format,
            show,
            self._pool,
        )

    async def unfill(self, context: JobContext) -> None:
        """Let QEMU stop copying and close the copy."""
        if not self.recorded and self._actor.machine is not None:
            await self.blocks.cancel(job_name(context.job))
            await self.blocks.forget(job_name(context.job))
            await self._copying.release_brake(context)

    # switch

    async def switch(self, context: JobContext) -> None:
        """Make the new image the disk. The guest stands still from before QEMU's switch until after the record."""
        context.no_return()
        machine = self._actor.machine
        if machine is None:
            if self.live and not self.recorded:
                self._actor.present()
            await change_disk(self._actor, self.disk_id, durable=True, source=self.target)
            return
        self._unsure = "run" in context.job.data  # an interrupted one may have got as far as QEMU's switch
        self._unsure = done = await self.switched()
        if "run" not in context.job.data:
            await context.remember(run=await machine.status() is RunStatus.RUNNING)
        noted = not done and await self._copying.ready_to_stop(job_name(context.job))
        await machine.stop()
        if not done:
            await self._finish(job_name(context.job), noted)
        await change_disk(self._actor, self.disk_id, durable=True, source=self.target)
        self._unsure = False
        await self._copying.release_brake(context)
        if context.job.data["run"]:
            await machine.run()

    async def _finish(self, job: str, noted: bool) -> None:
        """Let QEMU switch. An answer that did not come, or tells of a failure, is no news: its block graph is."""
        await self.blocks.watch(job, until_ready=True)
        if noted:
            await self._copying.keep_bitmaps(self.disk, self.target)
        self._unsure = True
        try:
            await self.blocks.finish(job)
        except HostlerError:
            if not await self.switched():
                self._unsure = False
                raise

    def no_way_back(self) -> bool:
        """While QEMU may have the new image and the record may not name it, or the guest has not gone on."""
        return self.recorded or (self._unsure and self._actor.machine is not None)

    async def unswitch(self, context: JobContext) -> None:
        """The guest goes on with the source."""
        machine = self._actor.machine
        if not self.recorded and machine is not None and context.job.data.get("run"):
            await machine.run()

    # clean-up

    async def clean_up(self, context: JobContext) -> None:
        """Close the old image everywhere, and remove it if it was a volume of this host's."""
        if self._actor.machine is not None:
            await self.blocks.forget(job_name(context.job))
        await self._give_back(self.before)
        removed = await self._remove_source()
        name = await self._rename()
        context.result(
            {
                "disk": self.disk_id,
                "volume": name,
                "path": self.target.path,
                "format": str(self.target.format),
                "removed": [self.source.path] if removed else [],
                "kept": [] if removed else [self.source.path],
            }
        )

    async def _remove_source(self) -> bool:
        """Whether the old image is gone. One that is no volume of this host's, that somebody else uses, or that cannot
        be removed, stays."""
        if self._keep or self.source.kind is not SourceKind.VOLUME:
            return False
        service = self._host.volumes.service
        try:
            volume = await service.get(self.source.path)
            if any(user.kind is not UserKind.JOB for user in await self._host.volumes.users.of(volume)):
                return False  # a checkpoint holds it, or another VM reads it
            await service.delete(self.source.path)
            self._host.events.publish("volume", volume.name, None)
        except NotFound:
            return not await asyncio.to_thread(os.path.lexists, self.source.path)
        except HostlerError as error:
            log.warning("disk.source-kept", vm=self._actor.record.id, path=self.source.path, why=str(error))
            return False
        return True

    async def _rename(self) -> str:
        """The new volume takes over the name, if it is free now."""
        service = self._host.volumes.service
        try:
            volume = await self._host.volumes.work.tools.changes.rename(self._volume, self._name)
        except NotFound:
            volume = await service.get(self.target.path)
        except AlreadyExists:
            volume = await service.get(self._volume)
        self._host.events.publish("volume", volume.name, volume)
        return volume.name


def job_name(job: Job) -> str:
    """QEMU's name of the copying."""
    return f"move-{job.id}"


def steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    move = Move(host, actor, params)
    return (
        Step("create", move.create, move.uncreate),
        Step("copy", move.fill, move.unfill),
        Step("switch", move.switch, move.unswitch, insist=move.no_way_back),
        Step("clean-up", move.clean_up, insist=lambda: True),
    )


async def resume_at(host: Host, actor: VmActor, job: Job) -> str | None:
    """What is recorded as moved is finished. Copying goes on as long as QEMU does it, whoever watches. A switch under
    way is done again from its beginning: it finds out what QEMU has."""
    move = Move(host, actor, job.params)
    states = {step.name: step.state for step in job.steps}
    if states["switch"] is StepState.DONE or (move.recorded and actor.machine is None):
        return "clean-up"
    if move.recorded or (actor.machine is not None and states["switch"] is not StepState.PENDING):
        return "switch"
    if actor.machine is not None and states["copy"] is not StepState.PENDING:
        return "copy"
    return None


OPERATION = Operation("disk.move", "move a disk", CHANGEABLE, steps, resume_at)
