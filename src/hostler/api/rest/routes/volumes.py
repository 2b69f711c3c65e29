"""Volumes: disk images with a name."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import DryRun
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.chain import ChainReport, ChainRequest, FlattenRequest
from hostler.model.image import ImageDetails, VolumeView
from hostler.model.job import Job
from hostler.model.requests import InspectRequest, VolumeCreate, VolumeRegister
from hostler.model.views import Deleted
from hostler.model.volume import Volume

router = noun_router("volume")

VolumeRef = Annotated[str, Path(max_length=300, description="Name of a volume")]


@router.get("/volumes")
async def list_volumes(
    app: App, pool: Annotated[str | None, Query(max_length=100, description="Only those in this pool")] = None
) -> list[Volume]:
    """All volumes known to this host."""
    return list(await app.volumes.list(pool))


@router.post("/volumes", responses=JOB_ANSWERS)
async def create_volume(request: VolumeCreate, app: App, by: By, answer: Answer) -> Job:
    """A new volume, empty or copied from an image."""
    return await answer.answer(await app.volumes.create(request, by))


@router.post("/volumes/register", status_code=201)
async def register_volume(request: VolumeRegister, app: App, by: By) -> Volume:
    """Make an image that is there already a volume, in place."""
    return await app.volumes.register(request, by)


@router.post("/volumes/inspect")
async def inspect_image(request: InspectRequest, app: App) -> ImageDetails:
    """Everything about an image file. Changes nothing."""
    return await app.volumes.inspect(request.path)


@router.post("/volumes/chain")
async def survey_chain(request: ChainRequest, app: App) -> ChainReport:
    """An image with its parents, or every image of a directory. Changes nothing."""
    return await app.volumes.chain(request)


@router.post("/volumes/flatten", responses=JOB_ANSWERS)
async def flatten_chain(request: FlattenRequest, app: App, by: By, answer: Answer) -> Job:
    """A new volume with the content of an image and its parents."""
    return await answer.answer(await app.volumes.flatten(request, by))


@router.get("/volumes/{volume}")
async def get_volume(volume: VolumeRef, app: App) -> VolumeView:
    """One volume, and who depends on it."""
    return await app.volumes.get(volume)


@router.delete("/volumes/{volume}")
async def delete_volume(
    volume: VolumeRef,
    app: App,
    by: By,
    keep_file: Annotated[bool, Query(description="Forget the volume, leave its file where it is")] = False,
    dry_run: DryRun = False,
) -> Deleted:
    """Delete a volume that no VM has."""
    return await app.volumes.delete(volume, by, keep_file, dry_run)
