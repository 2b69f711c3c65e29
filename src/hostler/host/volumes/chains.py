"""Chains of VHD and VHDX as the host's users see them: looked at, and made one whole volume by a job.

    reserve (name, path) -> copy (a process of its own, with a journal) -> finish (the file gets its name)

A daemon that dies leaves file and journal; the next one goes on with the copying where it was.
"""

from __future__ import annotations

import asyncio

import structlog

from hostler.host.events import EventHub
from hostler.host.jobs import JobRunner
from hostler.host.steps import JobContext, Plan, Step
from hostler.model.chain import ChainReport, ChainRequest, FlattenRequest
from hostler.model.disk import DiskSource, SourceKind
from hostler.model.errors import InvalidInput
from hostler.model.job import Job, Progress, StepState
from hostler.model.names import new_id
from hostler.model.units import format_size
from hostler.model.volume import Volume
from hostler.storage.chain_exports import search_of
from hostler.storage.chains.chain import open_chain
from hostler.storage.chains.flatten import flatten
from hostler.storage.chains.survey import survey
from hostler.storage.claims import ClaimBook
from hostler.storage.reserved import Reservations, is_made, part_of
from hostler.storage.volumes import VolumeService
from hostler.storage.waiting import in_thread

log = structlog.get_logger()

FLATTEN = "volume.flatten"
"""The kind of job."""


class Chains:
    """The application functions about chains."""

    def __init__(self, service: VolumeService, claims: ClaimBook, jobs: JobRunner, events: EventHub) -> None:
        self._reservations = Reservations(service)
        self._claims = claims
        self._jobs = jobs
        self._events = events

    async def survey(self, request: ChainRequest) -> ChainReport:
        """An image with its parents, or all images of a directory. Changes nothing. BadImage, NotFound, InvalidInput,
        NotPermitted about the image itself; what is wrong with a parent is in the report."""
        return await in_thread(f"image {request.path}", lambda: survey(request.path, request.search))

    async def source(self, path: str) -> DiskSource:
        """The chain of an image as something that a disk can read. BadImage when it is not sound."""
        request = FlattenRequest(name="disk", source=path, search=search_of(path))
        size, _ = await asyncio.to_thread(_look, request)
        return DiskSource(kind=SourceKind.CHAIN, path=path, size=size)

    async def flatten(self, request: FlattenRequest, by: str) -> Job:
        """Begin to make a volume of an image and its parents; the job's result is the volume. What is wrong with the
        chain is refused at once."""
        job_id = new_id()
        _, files = await asyncio.to_thread(_look, request)
        try:
            # Until the end of the job no VM opens one of the files for writing.
            await self._claims.hold(job_id, dict.fromkeys(files, False))
            await self._size(request)
            return await self._jobs.start(self._plan(request, job_id), by, job_id)
        except BaseException:
            await self._claims.let_go(job_id)
            raise

    async def give_up(self, volume: Volume) -> None:
        """Remove what a job has left of a volume that it did not finish."""
        await self._reservations.give_up(volume.job, volume.name)

    async def recover(self, job: Job) -> None:
        """Go on with an interrupted flattening, at the first step that was not done."""
        plan = self._plan(FlattenRequest.model_validate(job.params), job.id)
        first = next((step.name for step in job.steps if step.state is not StepState.DONE), "finish")
        self._jobs.resume(plan, job, first)

    def _plan(self, request: FlattenRequest, job_id: str) -> Plan:
        async def let_go(_job: Job) -> None:
            await self._claims.let_go(job_id)

        steps = (
            Step("reserve", self._reserve(request).do, self._reserve(request).undo),
            Step("copy", lambda context: self._copy(request, context)),
            Step("finish", lambda context: self._finish(request, context)),
        )
        params = request.model_dump(mode="json")
        return Plan(FLATTEN, request.name, request.name, steps, params=params, finish=let_go)

    def _reserve(self, request: FlattenRequest) -> Step:
        async def do(context: JobContext) -> None:
            size = await self._size(request)
            await self._reservations.reserve(context.job.id, request.name, size, request.format, request.path)

        async def undo(context: JobContext) -> None:
            await self._reservations.give_up(context.job.id, request.name)

        return Step("reserve", do, undo)

    async def _size(self, request: FlattenRequest) -> int:
        """Bytes of the new disk; refuses a chain that is not sound."""
        size, _ = await asyncio.to_thread(_look, request)
        if request.size is not None and request.size < size:
            raise InvalidInput(
                f"size {format_size(request.size)}",
                f"is less than the {format_size(size)} of {request.source}, whose end would be lost",
                f"give {size} or more",
            )
        wanted = max(size, request.size or 0)
        return wanted + -wanted % 512

    async def _copy(self, request: FlattenRequest, context: JobContext) -> None:
        def show(fraction: float) -> None:
            context.progress(Progress(fraction=fraction, text="copying the chain"))

        size = await self._size(request)
        volume = await self._reservations.reserve(context.job.id, request.name, size, request.format, request.path)
        part = part_of(context.job.id, volume.path)
        if not await asyncio.to_thread(is_made, context.job.id, volume.path):
            await flatten(request.source, part, request.format.value, volume.size, request.search, show)

    async def _finish(self, request: FlattenRequest, context: JobContext) -> None:
        volume = await self._reservations.finish(context.job.id, request.name)
        context.no_return()
        self._events.publish("volume", volume.name, volume)
        log.info("volume.flattened", name=volume.name, path=volume.path, source=request.source, by=context.job.by)
        context.result(volume.to_json())


def _look(request: FlattenRequest) -> tuple[int, list[str]]:
    """Size and files of the chain. BadImage when it is not sound, or not a VHD or VHDX."""
    with open_chain(request.source, request.search) as chain:
        chain.require_sound()
        return chain.size, [layer.file.path for layer in chain.layers]
