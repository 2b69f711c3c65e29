"""Work on volumes that no VM has open."""

from __future__ import annotations

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.volumes import VolumeRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.image import ImageDetails
from hostler.model.job import Job
from hostler.model.volume_requests import (
    VolumeClone,
    VolumeCompact,
    VolumeConvert,
    VolumeGrow,
    VolumeShrink,
    VolumeValidate,
)

router = noun_router("volume")


@router.get("/volumes/{volume}/details")
async def get_volume_details(volume: VolumeRef, app: App) -> ImageDetails:
    """Everything about a volume's image."""
    return await app.volume_work.details(volume)


@router.post("/volumes/{volume}/checksum", responses=JOB_ANSWERS)
async def checksum_volume(volume: VolumeRef, app: App, by: By, answer: Answer) -> Job:
    """SHA-256 of all that a guest would read; the same for every format."""
    return await answer.answer(await app.volume_work.checksum(volume, by))


@router.post("/volumes/{volume}/validate", responses=JOB_ANSWERS)
async def validate_volume(volume: VolumeRef, request: VolumeValidate, app: App, by: By, answer: Answer) -> Job:
    """Whether its image is sound, and putting right what can be."""
    return await answer.answer(await app.volume_work.validate(volume, request, by))


@router.post("/volumes/{volume}/grow", responses=JOB_ANSWERS)
async def grow_volume(volume: VolumeRef, request: VolumeGrow, app: App, by: By, answer: Answer) -> Job:
    """Make it larger, in place."""
    return await answer.answer(await app.volume_work.grow(volume, request, by))


@router.post("/volumes/{volume}/shrink", responses=JOB_ANSWERS)
async def shrink_volume(volume: VolumeRef, request: VolumeShrink, app: App, by: By, answer: Answer) -> Job:
    """Make it smaller, in place, where nothing is lost by that."""
    return await answer.answer(await app.volume_work.shrink(volume, request, by))


@router.post("/volumes/{volume}/convert", responses=JOB_ANSWERS)
async def convert_volume(volume: VolumeRef, request: VolumeConvert, app: App, by: By, answer: Answer) -> Job:
    """Another format, as a new volume or in its place."""
    return await answer.answer(await app.volume_work.convert(volume, request, by))


@router.post("/volumes/{volume}/compact", responses=JOB_ANSWERS)
async def compact_volume(volume: VolumeRef, request: VolumeCompact, app: App, by: By, answer: Answer) -> Job:
    """Give back what its zeroes and unused parts take."""
    return await answer.answer(await app.volume_work.compact(volume, request, by))


@router.post("/volumes/{volume}/clone", responses=JOB_ANSWERS)
async def clone_volume(volume: VolumeRef, request: VolumeClone, app: App, by: By, answer: Answer) -> Job:
    """A copy under another name."""
    return await answer.answer(await app.volume_work.clone(volume, request, by))
