"""Disks and network adapters of a VM."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Response

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import DryRun, VmRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.job import Job
from hostler.model.requests import DiskAdd, NicAdd
from hostler.model.vm import VmRecord

router = noun_router("device")

DeviceRef = Annotated[str, Path(max_length=100, description="Id of the device in the VM")]


@router.post(
    "/vms/{vm}/disks",
    responses={
        200: {"description": "The job is over; or, with `dry_run`, the VM as it would be"},
        202: JOB_ANSWERS[202],
    },
)
async def attach_disk(
    vm: VmRef, request: DiskAdd, app: App, by: By, answer: Answer, response: Response, dry_run: DryRun = False
) -> Job | VmRecord:
    """Attach a volume or a block device, also while the VM runs (on SCSI)."""
    outcome = await app.vms.attach_disk(vm, request, by, dry_run)
    return await answer.answer(outcome) if isinstance(outcome, Job) else outcome


@router.delete("/vms/{vm}/disks/{disk}", responses=JOB_ANSWERS)
async def detach_disk(
    vm: VmRef,
    disk: DeviceRef,
    app: App,
    by: By,
    answer: Answer,
    timeout: Annotated[
        float | None, Query(gt=0, le=3600, description="Seconds the guest may take to let go of it")
    ] = None,
) -> Job:
    """Detach a disk, also while the VM runs; its volume stays."""
    return await answer.answer(await app.vms.detach_disk(vm, disk, by, timeout))


@router.post("/vms/{vm}/nics")
async def add_nic(vm: VmRef, request: NicAdd, app: App, by: By) -> VmRecord:
    """Add a network adapter."""
    return await app.vms.add_nic(vm, request, by)


@router.delete("/vms/{vm}/nics/{nic}")
async def remove_nic(vm: VmRef, nic: DeviceRef, app: App, by: By) -> VmRecord:
    """Remove a network adapter."""
    return await app.vms.remove_nic(vm, nic, by)
