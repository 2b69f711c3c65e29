"""Checksum and validation: reading all of a volume, while nobody writes it."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.steps import JobContext, Step
from hostler.host.volumes.operations.base import Params, Tools, VolumeOperation, shown
from hostler.model.job import Progress
from hostler.model.volume import Volume


def _checksum(tools: Tools, volume: Volume, _params: Params) -> Sequence[Step]:
    async def do(context: JobContext) -> None:
        found = await tools.changes.checksum(volume, shown(context, "reading"))
        context.result({"name": volume.name, **found.to_json()})

    return (Step("read", do),)


def _validate(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    repair = bool(params.get("repair"))

    async def do(context: JobContext) -> None:
        if repair:
            context.no_return()
        context.progress(Progress(text="repairing" if repair else "checking"))
        verdict = await tools.changes.validate(volume, repair)
        context.result({"name": volume.name, **verdict.to_json()})

    return (Step("check", do),)


async def _may_repair(tools: Tools, volume: Volume, params: Params) -> None:
    if params.get("repair"):
        await tools.users.require_alone(volume)


CHECKSUM = VolumeOperation("volume.checksum", _checksum)
VALIDATE = VolumeOperation("volume.validate", _validate, damaged=True)
REPAIR = VolumeOperation("volume.repair", _validate, writes=True, damaged=True, check=_may_repair)
