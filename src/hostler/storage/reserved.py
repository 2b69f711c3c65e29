"""Volumes whose file is made by a job that goes on after a restart of the daemon.

    reserve --> creating, with the job's id; the file grows under a temporary name
    finish  --> the file has its name; ready          give_up --> nothing is left

Each may be repeated: whatever was done when the daemon was killed, the job calls the same again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from hostler.model.base import utc_now
from hostler.model.disk import ImageFormat
from hostler.model.errors import AlreadyExists, NotFound
from hostler.model.volume import Volume, VolumeState
from hostler.storage.catalogue import Catalogue
from hostler.storage.chains.journal import journal_of
from hostler.storage.qemu_img import PART, explain_os, keep_file, leftovers, part_prefix
from hostler.storage.volumes import VolumeService
from hostler.store.contract import CheckFailed
from hostler.store.table import Row


class Reservations:
    """The reserved volumes of one host."""

    def __init__(self, volumes: VolumeService) -> None:
        self._store = volumes.store
        self._volumes = volumes
        self._catalogue = Catalogue(volumes.store)

    async def reserve(self, job: str, name: str, size: int, format: ImageFormat, path: str | None) -> Volume:
        """Take name and path for the job. Errors as `VolumeService.create`: AlreadyExists, InvalidInput, ..."""
        row = await self._find(job, name)
        if row is not None:
            return row.value
        target = self._volumes.check_new(name, size, format, path)
        await asyncio.to_thread(_refuse_taken, target)
        volume = Volume(
            name=name, path=target, format=format, size=size, state=VolumeState.CREATING, job=job, created=utc_now()
        )
        await self._catalogue.add(volume)
        await asyncio.to_thread(_touch, part_of(job, target), target)
        return volume

    async def finish(self, job: str, name: str) -> Volume:
        """Give the file its name and make the volume ready. NotFound when the reservation is gone, AlreadyExists when
        somebody else has made a file of that name meanwhile, BadImage."""
        row = await self._find(job, name)
        if row is None:
            known = await self._catalogue.find(name)
            if known is not None and known.value.state is VolumeState.READY and not known.value.job:
                await asyncio.to_thread(_remove_parts, known.value.path)
                return known.value
            raise NotFound(f"volume {name}", "is not reserved any more", "begin again")
        path = row.value.path
        await asyncio.to_thread(_give_name, job, path)
        shape = await self._volumes.examine(path, row.value.format)
        ready = row.value.but(size=shape.size, allocated=shape.allocated, state=VolumeState.READY, job="")
        await self._catalogue.change(row, ready)
        await asyncio.to_thread(_remove_parts, path)
        return ready

    async def give_up(self, job: str, name: str) -> None:
        """Remove the half-made file and the record. Harmless when there is nothing."""
        row = await self._find(job, name)
        if row is None:
            return
        await asyncio.to_thread(_remove, job, row.value.path)
        with suppress(CheckFailed):  # somebody else has dealt with it
            await self._store.commit(self._catalogue.plan_remove(row))

    async def _find(self, job: str, name: str) -> Row[Volume] | None:
        row = await self._catalogue.find(name)
        mine = row is not None and row.value.job == job and row.value.state is VolumeState.CREATING
        return row if mine else None


def part_of(job: str, path: str) -> str:
    """The temporary name of the file that will be `path`: the same after a restart, and found by `leftovers`."""
    return part_prefix(path) + job[:12] + PART


def is_made(job: str, path: str) -> bool:
    """Whether the file has its own name already, and only the record is missing. Blocking. The journal tells our file
    from one that somebody else has put there."""
    part = part_of(job, path)
    if not os.path.lexists(path) or not os.path.lexists(journal_of(part)):
        return False
    return not os.path.lexists(part) or os.path.samefile(part, path)


def _refuse_taken(path: str) -> None:
    if os.path.lexists(path):
        raise AlreadyExists(f"file {path}", "exists already; files are never overwritten", "choose another path")


def _touch(part: str, path: str) -> None:
    """Refuse what cannot be written before a long work begins."""
    try:
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise explain_os(f"image {path}", error, Path(path).parent) from error


def _give_name(job: str, path: str) -> None:
    """Also when it was done before, or half. The journal stays until the record is right."""
    part = part_of(job, path)
    if not is_made(job, path):
        keep_file(part, path)
    with suppress(FileNotFoundError):
        os.unlink(part)


def _remove(job: str, path: str) -> None:
    """The temporary files, and the finished one where it is ours."""
    if is_made(job, path):
        os.unlink(path)
    _remove_parts(path)


def _remove_parts(path: str) -> None:
    for one in leftovers(path):
        one.unlink(missing_ok=True)
