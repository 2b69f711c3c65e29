"""A new file in the place of a volume's: another format, the same one without waste, or a larger block table.

    copy     a new image under a temporary name, which the job's id says         undo: removed
    switch   it gets its name, the record says so, VMs that are off hear of it, the old file goes

Until the new file has its name everything can be undone; from then on the switch is repeated until it is done. Where
the name stays the same, one rename does it: whatever is killed, the old or the new image is there, whole.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from hostler.host.steps import JobContext, Step
from hostler.host.volumes.operations.base import Params, Tools, VolumeOperation, shown
from hostler.model.disk import ImageFormat
from hostler.model.errors import InUse
from hostler.model.image import ImageDetails
from hostler.model.job import Progress
from hostler.model.volume import Volume
from hostler.storage.changes import blocking
from hostler.storage.copying import take_over
from hostler.storage.holes import punch_zeroes
from hostler.storage.qemu_img import Layout, leftovers, part_of, take_name
from hostler.storage.vhd_compact import compact_vhd


def rewritten(tools: Tools, volume: Volume, params: Params) -> tuple[Step, Step]:
    """The two steps. `params`: "path" and "format" the volume gets, "size", "if_smaller": drop the copy otherwise."""
    path, format = str(params["path"]), ImageFormat(str(params["format"]))
    pool = str(params["pool"]) if "pool" in params else None
    switched: list[bool] = []

    def part(context: JobContext) -> str:
        return part_of(path, context.job.id[:12])

    async def copy(context: JobContext) -> None:
        await asyncio.to_thread(_remove, part(context))
        details = await tools.changes.inspect(volume.path, deep=False)
        layout = _layout(details, format)
        show = shown(context, "copying")
        image = tools.changes.image
        size = int(str(params["size"]))
        await image.convert(volume.path, volume.format, part(context), format, size, show, layout)
        if params.get("if_smaller") and _space(part(context)) >= _space(volume.path):
            await asyncio.to_thread(_remove, part(context))

    async def undo_copy(context: JobContext) -> None:
        if not switched:
            await asyncio.to_thread(_remove, part(context))

    async def switch(context: JobContext) -> None:
        context.no_return()
        context.progress(Progress(fraction=1.0, text="taking its place"))
        if not await tools.changes.is_done(volume):
            if os.path.lexists(part(context)):
                new = part(context)
                taken = lambda: switched.append(True)  # noqa: E731
                await blocking(path, lambda _stop: _take_place(new, volume.path, path, taken))
            switched.append(True)
            changed = await tools.changes.record(volume, path, format, pool)
        else:
            switched.append(True)
            changed = await tools.changes.service.get(volume.name)
        await tools.finish(context, volume, changed)
        if path != volume.path:
            with suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, volume.path)

    return Step("copy", copy, undo_copy), Step("switch", switch, insist=lambda: bool(switched))


def _take_place(part: str, old: str, new: str, taken: Callable[[], None]) -> None:
    """`taken` is called at the moment from which there is no way back."""
    take_over(old, part)
    if old == new:
        os.rename(part, new)
        taken()
        directory = os.open(os.path.dirname(new), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    else:
        take_name(part, new)
        taken()
        with suppress(FileNotFoundError):
            os.unlink(part)


def _remove(part: str) -> None:
    for each in (part, *map(str, leftovers(part))):
        with suppress(FileNotFoundError):
            os.unlink(each)


def _space(path: str) -> int:
    found = os.stat(path)
    return found.st_blocks * 512 + found.st_size // 1_000_000


def _layout(details: ImageDetails, format: ImageFormat) -> Layout:
    if details.format is not format:
        return Layout()
    return Layout(block=details.block_size, bitmaps=bool(details.bitmaps))


async def may_rewrite(tools: Tools, volume: Volume, params: Params) -> None:
    """Nothing else builds on it, and nothing inside of it would be lost."""
    await tools.users.require_alone(volume)
    details = await tools.changes.inspect(volume.path, deep=False)
    format = ImageFormat(str(params.get("format", volume.format)))
    if details.snapshots:
        raise InUse(
            f"volume {volume.name}",
            f"has {len(details.snapshots)} snapshots inside, made by another program, which a new file would not have",
            "delete them first (qemu-img snapshot -d), or convert it to a new volume",
        )
    if details.bitmaps and format is not ImageFormat.QCOW2:
        raise InUse(
            f"volume {volume.name}",
            "has dirty bitmaps, which only a qcow2 keeps: the next backup would have to be a full one",
            "delete its backups' bitmaps first, or convert it to a new volume",
        )


def _replace(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    return rewritten(tools, volume, params)


# compacting

IN_PLACE = (ImageFormat.RAW, ImageFormat.VHD_FIXED, ImageFormat.VHD)
"""Formats that are made smaller without a copy."""


def _compact(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    if not params.get("in_place"):
        return rewritten(tools, volume, {**params, "path": volume.path, "format": volume.format, "if_smaller": True})
    recorded: list[bool] = []

    async def do(context: JobContext) -> None:
        if not await tools.changes.is_done(volume):
            show = shown(context, "looking for zeroes")
            if volume.format is ImageFormat.VHD:
                await blocking(volume.path, lambda stop: compact_vhd(volume.path, show, stop))
            end = volume.size if volume.format is ImageFormat.VHD_FIXED else os.path.getsize(volume.path)
            if volume.format is not ImageFormat.VHD:
                await blocking(volume.path, lambda stop: punch_zeroes(volume.path, end, show, stop))
        context.no_return()
        changed = await tools.changes.record(volume)
        recorded.append(True)
        await tools.finish(context, volume, changed)

    return (Step("change", do, insist=lambda: bool(recorded)),)


async def _may_compact(tools: Tools, volume: Volume, params: Params) -> None:
    params["in_place"] = bool(params.get("in_place")) or volume.format in IN_PLACE
    params["size"] = volume.size
    if params["in_place"]:
        await tools.users.require_alone(volume)
    else:
        await may_rewrite(tools, volume, params)


REPLACE = VolumeOperation("volume.replace", _replace, writes=True, check=may_rewrite)
COMPACT = VolumeOperation("volume.compact", _compact, writes=True, check=_may_compact)
