"""Growing and shrinking, in place.

The last step changes the file and records it. It may be repeated wherever it was interrupted: each way of changing a
file leaves the old or the new image, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.host.steps import JobContext, Step
from hostler.host.volumes.operations.base import Params, Tools, VolumeOperation, shown
from hostler.host.volumes.operations.rewriting import rewritten
from hostler.model.disk import ImageFormat
from hostler.model.errors import InvalidInput
from hostler.model.job import Progress
from hostler.model.units import format_size
from hostler.model.volume import Volume
from hostler.storage.resizing import Obstacles, look_behind, resize
from hostler.storage.vhdx_size import has_room
from hostler.storage.volumes import check_size
from hostler.storage.waiting import in_thread


def _change(tools: Tools, volume: Volume, size: int) -> Step:
    begun: list[bool] = []
    """One when the file may be changed, two when that is recorded."""

    async def do(context: JobContext) -> None:
        context.no_return()
        context.progress(Progress(text="changing its size"))
        if not await tools.changes.is_done(volume):
            begun.append(True)
            await resize(tools.changes.image, volume.path, volume.format, volume.size, size)
        changed = await tools.changes.record(volume)
        begun[:] = [True, True]
        await tools.finish(context, volume, changed)

    async def undo(_context: JobContext) -> None:
        if begun and not await tools.changes.is_done(volume):
            await resize(tools.changes.image, volume.path, volume.format, size, volume.size)

    return Step("change", do, undo, insist=lambda: len(begun) > 1)


def _grow(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    if params.get("rewrite"):
        return rewritten(tools, volume, {**params, "path": volume.path, "format": volume.format})
    return (_change(tools, volume, int(str(params["size"]))),)


def _shrink(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    size = int(str(params["size"]))

    async def look(context: JobContext) -> None:
        found = await obstacles(context)
        if not params.get("discard_data"):
            found.refuse(volume.name, size)
        if params.get("dry_run"):
            context.result({"name": volume.name, "size": size, "obstacles": list(found.texts)})

    async def obstacles(context: JobContext) -> Obstacles:
        async with tools.changes.open(volume) as content:
            return await look_behind(content, size, shown(context, "looking at its end"))

    steps = (Step("look", look),)
    return steps if params.get("dry_run") else (*steps, _change(tools, volume, size))


async def _may_grow(tools: Tools, volume: Volume, params: Params) -> None:
    await tools.users.require_alone(volume)
    size = int(str(params["size"]))
    check_size(tools.changes.service.limits, f"volume {volume.name}", size, volume.format)
    if size <= volume.size:
        raise InvalidInput(
            f"size {format_size(size)}",
            f"is not more than the {volume.size} bytes volume {volume.name} has",
            "give a larger size; 'hostler volume shrink' makes it smaller",
        )
    if volume.format is ImageFormat.VHDX:
        params["rewrite"] = not await in_thread(f"image {volume.path}", lambda: has_room(volume.path, size))


async def _may_shrink(tools: Tools, volume: Volume, params: Params) -> None:
    await tools.users.require_alone(volume)
    size = int(str(params["size"]))
    check_size(tools.changes.service.limits, f"volume {volume.name}", size, volume.format)
    if size >= volume.size:
        raise InvalidInput(
            f"size {format_size(size)}",
            f"is not less than the {volume.size} bytes volume {volume.name} has",
            "give a smaller size; 'hostler volume grow' makes it larger",
        )


GROW = VolumeOperation("volume.grow", _grow, writes=True, check=_may_grow)
SHRINK = VolumeOperation("volume.shrink", _shrink, writes=True, check=_may_shrink)
