"""Virtual machines: what they are and what they do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Path, Query, Response

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.waiting import JOB_ANSWERS, Answer
from hostler.api.rest.state import App, By
from hostler.model.job import Job
from hostler.model.requests import MigrateRequest, ShutdownRequest, VmChange, VmCreate
from hostler.model.views import Deleted, MigrationPlan
from hostler.model.vm import VmRecord

router = noun_router("vm")

VmRef = Annotated[str, Path(max_length=300, description="Id or name of a VM")]
DryRun = Annotated[bool, Query(description="Check everything and change nothing")]


@router.get("/vms")
async def list_vms(app: App) -> list[VmRecord]:
    """All VMs of this host."""
    return list(app.vms.list())


@router.post("/vms", status_code=201)
async def create_vm(request: VmCreate, app: App, by: By, response: Response, dry_run: DryRun = False) -> VmRecord:
    """A new VM, off. With `dry_run` the answer (200) is the VM as it would be."""
    record = await app.vms.create(request, by, dry_run)
    response.status_code = 200 if dry_run else 201
    return record


@router.get("/vms/{vm}")
async def get_vm(vm: VmRef, app: App) -> VmRecord:
    """One VM."""
    return app.vms.get(vm)


@router.patch("/vms/{vm}")
async def change_vm(
    vm: VmRef,
    request: VmChange,
    app: App,
    by: By,
    when_off: Annotated[bool, Query(description="Keep what needs the VM to be off for its next start")] = False,
) -> VmRecord:
    """Change its configuration; fields left out stay as they are."""
    return await app.vms.change(vm, request, by, when_off)


@router.delete("/vms/{vm}")
async def delete_vm(
    vm: VmRef,
    app: App,
    by: By,
    disks: Annotated[bool, Query(description="Delete its volumes too")] = False,
    dry_run: DryRun = False,
) -> Deleted:
    """Delete a VM that is off; its volumes stay unless `disks` says otherwise."""
    return await app.vms.delete(vm, by, disks, dry_run)


@router.post("/vms/{vm}/shutdown", responses=JOB_ANSWERS)
async def shutdown_vm(vm: VmRef, request: ShutdownRequest, app: App, by: By, answer: Answer) -> Job:
    """Ask the guest to shut down."""
    return await answer.answer(await app.vms.shutdown(vm, request, by))


@router.post("/vms/{vm}/migrate", responses=JOB_ANSWERS)
async def migrate_vm(vm: VmRef, request: MigrateRequest, app: App, by: By, answer: Answer) -> Job:
    """Move it to another host."""
    return await answer.answer(await app.migrations.migrate(vm, request, by))


@router.post("/vms/{vm}/migrate/check")
async def check_migration(vm: VmRef, request: MigrateRequest, app: App) -> MigrationPlan:
    """Whether it may move there, with everything that stands in the way. Changes nothing."""
    return await app.migrations.check(vm, request)


@router.get(
    "/vms/{vm}/screenshot",
    response_class=Response,
    responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_screenshot(vm: VmRef, app: App) -> Response:
    """The guest's screen as PNG."""
    return Response(await app.vms.screenshot(vm), media_type="image/png")


ACTIONS = {
    "start": "Start a VM that is off.",
    "pause": "Stop the processors of a running VM.",
    "resume": "Let a paused VM go on.",
    "save": "Write the state of a running VM to disk and stop it.",
    "restore": "Go on from a saved state.",
    "discard-saved": "Throw a saved state away; the VM is off then.",
    "turn-off": "Pull the plug.",
    "reset": "Press the reset button.",
}
"""Actions without parameters, and what they do."""


def _acting(action: str) -> Callable[[VmRef, App, By, Answer], Awaitable[Job]]:
    async def act(vm: VmRef, app: App, by: By, answer: Answer) -> Job:
        return await answer.answer(await app.vms.act(vm, action, by))

    return act


for _action, _text in ACTIONS.items():
    router.add_api_route(
        f"/vms/{{vm}}/{_action}",
        _acting(_action),
        methods=["POST"],
        name=f"{_action.replace('-', '_')}_vm",
        description=_text,
        summary=_text.rstrip("."),
        responses=JOB_ANSWERS,
    )
