"""Begins operations on volumes, and takes up those that a dead daemon left."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hostler.host.jobs import JobRunner
from hostler.host.pools.places import Places
from hostler.host.pools.service import Pools
from hostler.host.steps import JobContext, Plan, Step
from hostler.host.volumes.operations import VOLUME_OPERATIONS
from hostler.host.volumes.operations.base import Params, Tools, VolumeOperation
from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import AlreadyExists, HostlerError, InvalidInput, WrongState
from hostler.model.image import ImageDetails
from hostler.model.job import Job, StepState
from hostler.model.names import check_name, new_id
from hostler.model.pool import DEFAULT_POOL
from hostler.model.volume import Volume, VolumeState
from hostler.model.volume_requests import (
    VolumeClone,
    VolumeCompact,
    VolumeConvert,
    VolumeGrow,
    VolumeShrink,
    VolumeValidate,
)
from hostler.storage.catalogue import real_target
from hostler.storage.claims import ClaimBook, job_holder
from hostler.storage.formats import SUFFIX

Change = Callable[[Sequence[Step]], Sequence[Step]]

_SEEN = "volume"
"""The parameter of every job that has the volume as it was when the job was asked for."""
_ADVICE = {
    VolumeState.MISSING: "bring its file back",
    VolumeState.DAMAGED: "see what is wrong: hostler volume validate",
}


class VolumeWork:
    """The application functions that work on volumes no VM has open."""

    def __init__(self, tools: Tools, claims: ClaimBook, jobs: JobRunner, pools: Pools, places: Places) -> None:
        self.tools = tools
        self._pools = pools
        self._places = places
        self._claims = claims
        self._jobs = jobs

    # looking

    async def details(self, ref: str) -> ImageDetails:
        """Everything about a volume's image."""
        volume = await self.tools.changes.service.get(ref)
        return await self.tools.changes.inspect(volume.path)

    async def inspect(self, path: str) -> ImageDetails:
        """Everything about an image file, whether or not it is a volume."""
        return await self.tools.changes.inspect(path)

    # working

    async def checksum(self, ref: str, by: str) -> Job:
        """SHA-256 of all that a guest would read."""
        return await self.begin("volume.checksum", ref, {}, by)

    async def validate(self, ref: str, request: VolumeValidate, by: str) -> Job:
        """Whether it is sound; with `repair`, put right what can be."""
        kind = "volume.repair" if request.repair else "volume.validate"
        return await self.begin(kind, ref, {"repair": request.repair}, by)

    async def grow(self, ref: str, request: VolumeGrow, by: str) -> Job:
        """Make it larger."""
        return await self.begin("volume.grow", ref, {"size": request.size}, by)

    async def shrink(self, ref: str, request: VolumeShrink, by: str) -> Job:
        """Make it smaller, if nothing is lost by that."""
        return await self.begin("volume.shrink", ref, request.model_dump(mode="json"), by)

    async def convert(self, ref: str, request: VolumeConvert, by: str) -> Job:
        """Another format: as a new volume, or in its place."""
        volume = await self.tools.changes.service.get(ref)
        if request.name is not None:
            where = await self._where(volume, request.name, request.format, request.path, request.pool)
            return await self.begin("volume.convert", ref, where, by)
        path = real_target(request.path or _ending(volume, request.format))
        if path != volume.path and os.path.lexists(path):
            raise AlreadyExists(f"file {path}", "exists already; files are never overwritten", "give another --to")
        pool = await self._pools.pool_at(path)
        place = pool.name if pool else ""
        params: Params = {"path": path, "format": request.format, "size": volume.size, "pool": place}
        return await self.begin("volume.replace", ref, params, by)

    async def compact(self, ref: str, request: VolumeCompact, by: str) -> Job:
        """Give back what its zeroes and unused parts take."""
        return await self.begin("volume.compact", ref, {"in_place": request.in_place}, by)

    async def clone(self, ref: str, request: VolumeClone, by: str) -> Job:
        """A copy under another name."""
        volume = await self.tools.changes.service.get(ref)
        where = await self._where(volume, request.name, volume.format, request.path, request.pool)
        return await self.begin("volume.clone", ref, where, by)

    async def _where(
        self, volume: Volume, name: str, format: ImageFormat, path: str | None, pool: str | None
    ) -> Params:
        """Where a new volume made from this one goes. InvalidInput for a pool of LUNs, NoSpace, NotFound."""
        check_name("volume", name)
        found = await self._pools.pool_at(path) if path is not None else None
        place = found.name if found is not None else ""
        if path is None:
            plan = await self._places.plan(pool or DEFAULT_POOL, name, volume.size, format)
            if plan.kind is not SourceKind.VOLUME:
                raise InvalidInput(f"pool {plan.pool}", "has LUNs or exports, into which nothing is copied here")
            path, place = plan.path, plan.pool
        return {"name": name, "format": format, "path": path, "pool": place}

    async def begin(self, kind: str, ref: str, params: Params, by: str, change: Change = list) -> Job:
        """Take the volume and start the job. WrongState for a volume that is not ready; InUse, Busy while somebody has
        it; what the operation's own check raises. `change`: makes other steps of its steps (tests)."""
        operation = VOLUME_OPERATIONS[kind]
        seen = await self.tools.changes.service.get(ref)
        _require_ready(operation, seen)
        job_id = new_id()
        try:
            await self._claims.hold(job_id, _paths(operation, seen, params), seen.generation)
            # Only now nobody else changes it.
            volume = await self.tools.changes.service.get(seen.name)
            if volume.generation != seen.generation or volume.path != seen.path:
                raise WrongState(f"volume {seen.name}", "was changed at this moment", "look at it, and ask again")
            await operation.check(self.tools, volume, params)
            made = self.plan(operation, {**params, _SEEN: volume.to_json()}, job_id)
            return await self._jobs.start(replace(made, steps=change(made.steps)), by, job_id)
        except BaseException:
            await self._claims.let_go(job_id)
            raise

    def plan(self, operation: VolumeOperation, params: Params, job_id: str) -> Plan:
        """The job to run; it lets go of the volume at its end."""
        volume = Volume.model_validate(params[_SEEN])

        async def finish(_job: Job) -> None:
            await self._claims.let_go(job_id)

        return Plan(
            kind=operation.kind,
            target=volume.name,
            target_name=volume.name,
            steps=operation.steps(self.tools, volume, params),
            params=params,
            finish=finish,
        )

    async def recover(self, job: Job) -> None:
        """Take up a job that a dead daemon left. What its last step had begun goes on; everything before that is
        undone."""
        operation = VOLUME_OPERATIONS[job.kind]
        if operation.makes is not None:
            await self._recover_making(job, operation)
            return
        plan = self.plan(operation, job.params, job.id)
        last = job.steps[-1]
        begun = last.state not in (StepState.PENDING, StepState.UNDONE)
        if not await self._claims.of(job_holder(job.id)):
            await self._end(plan, job, operation)
        elif begun and operation.writes and operation.kind != "volume.repair":
            self._jobs.resume(plan, job, last.name)
        else:
            self._jobs.unwind(plan, job)

    async def _recover_making(self, job: Job, operation: VolumeOperation) -> None:
        """The storage service has tidied up at its own start: the new volume is there, whole, or nothing of it is."""
        plan = self.plan(operation, job.params, job.id)
        known = await self.tools.changes.service.list()
        made = next((v for v in known if v.made_by == job.id and v.state is VolumeState.READY), None)
        if made is None:
            self._jobs.unwind(plan, job)
            return

        async def tell(context: JobContext) -> None:
            context.result(made.to_json())

        self._jobs.resume(replace(plan, steps=(Step("copy", tell),)), job, "copy")

    async def _end(self, plan: Plan, job: Job, operation: VolumeOperation) -> None:
        """It had let go of its volume: only its last word is missing. Its file may be somebody else's by now."""
        volume = Volume.model_validate(job.params[_SEEN])

        async def tell(context: JobContext) -> None:
            context.result((await self.tools.changes.service.get(volume.name)).to_json())

        done = operation.writes and await self._is_done(volume)
        only = Plan(plan.kind, plan.target, plan.target_name, (Step(job.steps[-1].name, tell),), plan.params)
        if done:
            self._jobs.resume(only, job, job.steps[-1].name)
        else:
            self._jobs.unwind(Plan(plan.kind, plan.target, plan.target_name, (), plan.params), job)

    async def _is_done(self, volume: Volume) -> bool:
        try:
            return await self.tools.changes.is_done(volume)
        except HostlerError:
            return False


def _paths(operation: VolumeOperation, volume: Volume, params: Params) -> dict[str, bool]:
    """What the job works on, and whether it writes that."""
    paths = {volume.path: operation.writes}
    if operation.writes and "path" in params:
        paths[str(params["path"])] = True
    return paths


def _ending(volume: Volume, format: ImageFormat) -> str:
    """Its path with the usual ending of a format."""
    if format is volume.format:
        return volume.path
    path = Path(volume.path)
    stem = path.with_suffix("") if path.suffix == SUFFIX[volume.format] else path
    return str(stem.with_name(stem.name + SUFFIX[format]))


def _require_ready(operation: VolumeOperation, volume: Volume) -> None:
    allowed = {VolumeState.READY, VolumeState.DAMAGED} if operation.damaged else {VolumeState.READY}
    if volume.state not in allowed:
        raise WrongState(
            f"volume {volume.name}", f"is {volume.state}", _ADVICE.get(volume.state, "wait until it is ready")
        )
