"""What recorded volumes are now, by a quick look at their files: each directory in a lane of its own, so that a share
that hangs hides its own volumes only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import HostlerError, NotFound, TimedOut
from hostler.model.volume import Volume, VolumeState
from hostler.storage.formats import recognise
from hostler.storage.pools.lane import Lane

LOOK = 10.0
"""Seconds a file system may take to show the volumes of one directory."""


class Observer:
    """Looks at volumes."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}

    async def each(self, volumes: Sequence[Volume]) -> Sequence[Volume]:
        """All of them, in their order; missing, where the file system does not answer."""
        places: dict[str, list[Volume]] = {}
        for volume in volumes:
            places.setdefault(os.path.dirname(volume.path), []).append(volume)
        seen = await asyncio.gather(*(self._look_at(place, found) for place, found in places.items()))
        by_name = {volume.name: volume for found in seen for volume in found}
        return [by_name[volume.name] for volume in volumes]

    async def one(self, volume: Volume) -> Volume:
        """One of them. TimedOut where the file system does not answer."""
        return await self._lane(os.path.dirname(volume.path)).run(lambda: _observe(volume), LOOK)

    async def _look_at(self, directory: str, volumes: Sequence[Volume]) -> Sequence[Volume]:
        try:
            return await self._lane(directory).run(lambda: [_observe(volume) for volume in volumes], LOOK)
        except TimedOut:
            ready = VolumeState.READY
            return [v.but(state=VolumeState.MISSING) if v.state is ready else v for v in volumes]

    def _lane(self, directory: str) -> Lane:
        return self._lanes.setdefault(directory, Lane(f"directory {directory}"))


def _observe(volume: Volume) -> Volume:
    """What a recorded volume is now, from a quick look at its file. (LUNs and exports are looked at by their pool.)"""
    if volume.state is not VolumeState.READY or volume.kind is not SourceKind.VOLUME:
        return volume
    try:
        shape = recognise(volume.path, volume.format, overlay=volume.backing is not None)
    except NotFound:
        return volume.but(state=VolumeState.MISSING)
    except HostlerError:
        return volume.but(state=VolumeState.DAMAGED)
    if shape.size < volume.size:
        return volume.but(state=VolumeState.DAMAGED, allocated=shape.allocated)
    # The size of a dynamic VHD is QEMU's word (see QemuImg.info), which the footer alone does not tell.
    size = volume.size if volume.format is ImageFormat.VHD else shape.size
    return volume.but(size=size, allocated=shape.allocated)
