"""What can be done to a disk that a VM has."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.devices import DeviceRef
from hostler.api.rest.routes.vms import DryRun, VmRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.disk_requests import DiskChange, DiskFlatten, DiskGrow, DiskLimits, DiskMedium, DiskMove
from hostler.model.job import Job
from hostler.model.vm import VmRecord

router = noun_router("disk")


@router.patch("/vms/{vm}/disks/{disk}")
async def change_disk(
    vm: VmRef,
    disk: DeviceRef,
    request: DiskChange,
    app: App,
    by: By,
    when_off: Annotated[
        bool, Query(description="While the VM runs: keep the change for its next start, instead of refusing it")
    ] = False,
) -> VmRecord:
    """Change how a disk is attached."""
    return await app.disks.change(vm, disk, request, by, when_off)


@router.post(
    "/vms/{vm}/disks/{disk}/move",
    responses={
        200: {"description": "The job is over; or, with `dry_run`, the VM as it would be"},
        202: JOB_ANSWERS[202],
    },
)
async def move_disk(
    vm: VmRef,
    disk: DeviceRef,
    request: DiskMove,
    app: App,
    by: By,
    answer: Answer,
    response: Response,
    dry_run: DryRun = False,
) -> Job | VmRecord:
    """Move a disk to another place, in another format if wanted, also while the VM runs."""
    outcome = await app.disks.move(vm, disk, request, by, dry_run)
    return await answer.answer(outcome) if isinstance(outcome, Job) else outcome


@router.post("/vms/{vm}/disks/{disk}/flatten", responses=JOB_ANSWERS)
async def flatten_disk(vm: VmRef, disk: DeviceRef, request: DiskFlatten, app: App, by: By, answer: Answer) -> Job:
    """Copy what a disk's lower layers hold into its top one, while the VM runs; the lower ones are free afterwards."""
    return await answer.answer(await app.disks.flatten(vm, disk, request, by))


@router.post("/vms/{vm}/disks/{disk}/grow", responses=JOB_ANSWERS)
async def grow_disk(vm: VmRef, disk: DeviceRef, request: DiskGrow, app: App, by: By, answer: Answer) -> Job:
    """Make a disk larger, also while the VM runs: the guest is told."""
    return await answer.answer(await app.disks.grow(vm, disk, request, by))


@router.post("/vms/{vm}/disks/{disk}/limits", responses=JOB_ANSWERS)
async def limit_disk(vm: VmRef, disk: DeviceRef, request: DiskLimits, app: App, by: By, answer: Answer) -> Job:
    """Limit the operations and bytes per second of a disk, also while the VM runs."""
    return await answer.answer(await app.disks.limit(vm, disk, request, by))


@router.post("/vms/{vm}/disks/{disk}/medium", responses=JOB_ANSWERS)
async def change_medium(vm: VmRef, disk: DeviceRef, request: DiskMedium, app: App, by: By, answer: Answer) -> Job:
    """Put another medium into a CD or floppy drive, or empty it, also while the VM runs."""
    return await answer.answer(await app.disks.change_medium(vm, disk, request, by))
