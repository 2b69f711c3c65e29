"""New volumes from one that is there: in another format, or as they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from hostler.host.steps import JobContext, Step
from hostler.host.volumes.operations.base import Params, Tools, VolumeOperation, shown
from hostler.model.disk import ImageFormat
from hostler.model.volume import Volume
from hostler.storage.changes import blocking
from hostler.storage.copying import copy_file
from hostler.storage.qemu_img import OnProgress, QemuImg, new_file


def _made(tools: Tools, volume: Volume, params: Params, text: str) -> Sequence[Step]:
    """One step: the new volume is there, whole, or not at all; the storage service sees to that."""
    format = ImageFormat(str(params["format"]))

    async def do(context: JobContext) -> None:
        if context.job.data.get("made"):
            return
        show = shown(context, text)

        async def fill(target: str, image: QemuImg) -> None:
            if format is volume.format and params.get("exact"):
                await _copy(volume.path, target, show)
            else:
                await image.convert(volume.path, volume.format, target, format, volume.size, show)

        name, path, pool = str(params["name"]), str(params["path"]), str(params["pool"])
        service = tools.changes.service
        made = await service.create_filled(name, volume.size, format, fill, path, pool, context.job.id)
        context.no_return()
        await context.remember(made=True)
        tools.events.publish("volume", made.name, made)
        context.result(made.to_json())

    return (Step("copy", do),)


async def _copy(source: str, target: str, show: OnProgress) -> None:
    async with new_file(target) as part:

        def work(stop: threading.Event) -> None:
            old = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                new = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    copy_file(old, new, show, stop)
                finally:
                    os.close(new)
            finally:
                os.close(old)

        await blocking(target, work)


def _convert(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    return _made(tools, volume, params, "converting")


def _clone(tools: Tools, volume: Volume, params: Params) -> Sequence[Step]:
    return _made(tools, volume, {**params, "exact": True}, "copying")


CONVERT = VolumeOperation("volume.convert", _convert, makes="name")
CLONE = VolumeOperation("volume.clone", _clone, makes="name")
