"""A VM that is off goes back to a backup of its own: each disk becomes a new volume, then the VM has these instead.

Its former volumes stay as they are, detached: whoever went back to the wrong backup has lost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.actor import VmActor
from hostler.host.backups.restoring import Restoring, restored_config
from hostler.host.context import Host
from hostler.host.operation import Operation, Params
from hostler.host.steps import JobContext, Step
from hostler.model.disk import ImageFormat
from hostler.model.job import Job
from hostler.model.vm import VmRecord, VmState
from hostler.storage.formats import SUFFIX


def switch_steps(host: Host, actor: VmActor, params: Params) -> Sequence[Step]:
    """The steps of a VM that goes back to a backup of its own."""
    work = Restoring(host, params)

    def has_them() -> bool:
        return actor.record.config.disk(work.params["disks"][0]["disk"]) is not None and any(
            d.source.path in _paths(work) for d in actor.record.config.disks
        )

    async def undo(context: JobContext) -> None:
        await work.remove_volumes(context.job.id, [d.source.path for d in actor.record.config.disks])

    async def switch(context: JobContext) -> None:
        backup, record = await work.backup(), actor.record
        sources = await work.sources(context.job.id)
        config, changed = await restored_config(host, backup.config, record.id, record.name, sources)
        before = context.job.data.get("before", [d.source.path for d in record.config.disks])
        await context.remember(before=before, changed=[*changed])
        context.no_return()
        await work.bring_state(backup, record.id, record.config.run_as)

        def edit(now: VmRecord) -> VmRecord:
            latest = config.but(name=now.config.name, run_as=now.config.run_as)
            return now.but(config=latest, next_config=None, checkpoint=None)

        await actor.change(edit)
        context.result({"vm": record.id, "kept": before, "changed": [*changed]})

    return (Step("volumes", work.make_volumes, undo), Step("switch", switch, insist=has_them))


def _paths(work: Restoring) -> list[str]:
    volumes = work.host.paths.volumes
    return [i["path"] or str(volumes / (i["volume"] + SUFFIX[ImageFormat(i["format"])])) for i in work.params["disks"]]


async def _resume_switch(host: Host, actor: VmActor, job: Job) -> str | None:
    work = Restoring(host, job.params)
    have = {d.source.path for d in actor.record.config.disks}
    return "switch" if have & set(_paths(work)) else None


OPERATION = Operation(
    "vm.restore-backup", "go back to a backup", frozenset({VmState.OFF}), switch_steps, _resume_switch
)
