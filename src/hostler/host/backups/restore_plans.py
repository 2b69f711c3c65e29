"""Jobs that make something new of a backup: a VM, or one volume.

volumes   each disk becomes a new volume
define    the new VM, off
"""

from __future__ import annotations

import asyncio

from pydantic import JsonValue

from hostler.host.backups.restoring import Restoring, restored_config
from hostler.host.context import Host
from hostler.host.steps import JobContext, Plan, Step
from hostler.host.vms import VmService
from hostler.model.job import Job
from hostler.removal import remove_tree

RESTORE = "backup.restore"
RESTORE_VOLUME = "backup.restore-volume"


# a single volume


def plan_volume(host: Host, params: dict[str, JsonValue]) -> Plan:
    """The job that makes one volume of one disk."""
    work = Restoring(host, params)
    name = str(work.params["disks"][0]["volume"])

    async def do(context: JobContext) -> None:
        await work.make_volumes(context)
        context.no_return()
        context.result((await host.volumes.get(name)).to_json())

    return Plan(RESTORE_VOLUME, name, name, (Step("restore", do),), params=params)


async def recover_volume(host: Host, job: Job) -> None:
    """The volume is there, whole, or nothing of it is."""
    plan = plan_volume(host, job.params)
    work = Restoring(host, job.params)
    if await work.mine(work.params["disks"][0], job.id) is None:
        host.jobs.unwind(plan, job)
    else:
        host.jobs.resume(plan, job, "restore")


# a new VM


def plan_vm(host: Host, vms: VmService, vm_id: str, params: dict[str, JsonValue]) -> Plan:
    """The job that makes a new VM of a backup."""
    work = Restoring(host, params)
    name = str(params["name"])

    def is_defined() -> bool:
        return vm_id in host.actors

    async def undo(context: JobContext) -> None:
        if not is_defined():
            await work.remove_volumes(context.job.id)
            await asyncio.to_thread(remove_tree, host.paths.vm_state(vm_id))

    async def define(context: JobContext) -> None:
        if not is_defined():
            backup = await work.backup()
            config, changed = await restored_config(
                host, backup.config, vm_id, name, await work.sources(context.job.id)
            )
            await context.remember(changed=[*changed])
            await work.bring_state(backup, vm_id, config.run_as)
            await vms.define(config, context.job.by)
        context.no_return()
        record = host.actor(vm_id).record
        context.result({**record.to_json(), "changed": context.job.data.get("changed", [])})

    steps = (Step("volumes", work.make_volumes, undo), Step("define", define, insist=is_defined))
    return Plan(RESTORE, vm_id, name, steps, params=params)
