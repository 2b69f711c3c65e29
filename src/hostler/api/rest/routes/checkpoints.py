"""Checkpoints of a VM."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import VmRef
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.checkpoint import CheckpointView
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointChange, CheckpointClone, CheckpointCreate
from hostler.model.job import Job

router = noun_router("checkpoint")

CheckpointRef = Annotated[str, Path(max_length=300, description="Id or name of a checkpoint")]


@router.get("/vms/{vm}/checkpoints")
async def list_checkpoints(vm: VmRef, app: App) -> list[CheckpointView]:
    """All checkpoints of a VM, each after the one it builds on."""
    return list(await app.checkpoints.list(vm))


@router.post("/vms/{vm}/checkpoints", responses=JOB_ANSWERS)
async def create_checkpoint(vm: VmRef, request: CheckpointCreate, app: App, by: By, answer: Answer) -> Job:
    """Make a checkpoint, also while the VM runs."""
    return await answer.answer(await app.checkpoints.create(vm, request, by))


@router.get("/vms/{vm}/checkpoints/{checkpoint}")
async def get_checkpoint(vm: VmRef, checkpoint: CheckpointRef, app: App) -> CheckpointView:
    """One checkpoint, with the VM's configuration at that time."""
    return await app.checkpoints.get(vm, checkpoint)


@router.patch("/vms/{vm}/checkpoints/{checkpoint}")
async def change_checkpoint(
    vm: VmRef, checkpoint: CheckpointRef, request: CheckpointChange, app: App, by: By
) -> CheckpointView:
    """Change its name or notes."""
    return await app.checkpoints.change(vm, checkpoint, request, by)


@router.delete("/vms/{vm}/checkpoints/{checkpoint}", responses=JOB_ANSWERS)
async def delete_checkpoint(
    vm: VmRef,
    checkpoint: CheckpointRef,
    app: App,
    by: By,
    answer: Answer,
    subtree: Annotated[bool, Query(description="Also all that build on it")] = False,
) -> Job:
    """Delete a checkpoint; its layers are merged, also while the VM runs."""
    return await answer.answer(await app.checkpoints.delete(vm, checkpoint, by, subtree))


@router.post("/vms/{vm}/checkpoints/{checkpoint}/apply", responses=JOB_ANSWERS)
async def apply_checkpoint(
    vm: VmRef, checkpoint: CheckpointRef, request: CheckpointApply, app: App, by: By, answer: Answer
) -> Job:
    """Make the VM what it was then. What it is now is given up."""
    return await answer.answer(await app.checkpoints.apply(vm, checkpoint, request, by))


@router.post("/vms/{vm}/checkpoints/{checkpoint}/clone", responses=JOB_ANSWERS)
async def clone_checkpoint(
    vm: VmRef, checkpoint: CheckpointRef, request: CheckpointClone, app: App, by: By, answer: Answer
) -> Job:
    """Make a new VM from a checkpoint."""
    return await answer.answer(await app.checkpoints.clone(vm, checkpoint, request, by))
