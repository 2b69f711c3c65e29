"""Changes of volumes that no VM has open: what is recorded, and the work on their files.

Each change raises the generation of the record. Who begins a change says which generation it saw; it is refused when
another change came between, and is known to be done when the record has the next one. Meanwhile the job holds a claim
on the file (`ClaimBook.hold`), so nobody else touches either.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from hostler.model.disk import ImageFormat
from hostler.model.errors import Busy, HostlerError, WrongState
from hostler.model.image import AllocationMap, Checksum, ImageDetails, Verdict
from hostler.model.names import check_name
from hostler.model.volume import Volume
from hostler.storage.catalogue import Catalogue
from hostler.storage.chains.source import ZERO
from hostler.storage.checksum import checksum
from hostler.storage.content import Content
from hostler.storage.details import from_qemu, read_details
from hostler.storage.formats import recognise
from hostler.storage.qemu_img import OnProgress, QemuImg, explain_os
from hostler.storage.validation import validate
from hostler.storage.volumes import VolumeService
from hostler.storage.waiting import in_thread
from hostler.store.contract import CheckFailed, Store, Transaction

T = TypeVar("T")

MAX_MAP = 500_000
"""Pieces counted for the allocation map of one image: some seconds."""


class VolumeChanges:
    """The volumes of one host, as those see them who change them."""

    def __init__(self, store: Store, service: VolumeService, image: QemuImg | None = None) -> None:
        self._store = store
        self._catalogue = Catalogue(store)
        self.service = service
        self.image = image or QemuImg()

    # looking

    async def inspect(self, ref: str, format: ImageFormat | None = None, deep: bool = True) -> ImageDetails:
        """Everything about an image: the name of a volume, or the path of a file. `deep`: with its allocation map,
        which an image in use has not got. BadImage, NotFound, InvalidInput."""
        row = await self._catalogue.find(ref)
        path = row.value.path if row is not None else ref
        volume = await self.service.inspect(path, format)
        if row is not None:
            volume = row.value.but(size=volume.size, allocated=volume.allocated)
        fields = await in_thread(f"image {path}", lambda: read_details(path, volume.format))
        if volume.format is ImageFormat.QCOW2:
            fields |= from_qemu(await self.image.describe(path, volume.format))
        if deep:
            fields["map"] = await self._map(volume)
        return ImageDetails(**{**dict(volume), **fields, "known": row is not None})

    async def _map(self, volume: Volume) -> AllocationMap | None:
        data = zeroes = extents = fragments = pieces = 0
        end = -1
        try:
            async with self.open(volume) as content, aclosing(content.pieces()) as batches:
                async for batch in batches:
                    for piece in batch:
                        if piece.at == ZERO:
                            zeroes += piece.length
                            continue
                        data += piece.length
                        extents += 1
                        fragments += piece.at >= 0 and end >= 0 and piece.at != end
                        end = piece.at + piece.length
                    pieces += len(batch)
                    if pieces >= MAX_MAP:
                        break
        except HostlerError:  # in use, or damaged inside: the headers are worth showing all the same
            return None
        complete = data + zeroes >= volume.size
        return AllocationMap(data=data, zeroes=zeroes, extents=extents, fragments=fragments, complete=complete)

    def open(self, volume: Volume) -> Content:
        """Its content, for reading."""
        return Content(volume.path, volume.format, volume.size, self.image)

    async def checksum(self, volume: Volume, on_progress: OnProgress) -> Checksum:
        """SHA-256 of what a guest would read from it."""
        async with self.open(volume) as content:
            return await checksum(content, on_progress)

    async def validate(self, volume: Volume, repair: bool) -> Verdict:
        """Whether it is sound."""
        return await validate(volume.path, volume.format, self.image, repair)

    # the record

    async def current(self, volume: Volume) -> Volume:
        """The record of a volume that was seen with this generation. WrongState when it was changed since."""
        row = await self._catalogue.get(volume.name)
        if row.value.generation != volume.generation:
            raise late(volume, row.value)
        return row.value

    async def is_done(self, volume: Volume) -> bool:
        """Whether the change of a volume seen with this generation is recorded."""
        row = await self._catalogue.find(volume.name)
        return row is not None and row.value.generation > volume.generation

    async def record(
        self, volume: Volume, path: str | None = None, format: ImageFormat | None = None, pool: str | None = None
    ) -> Volume:
        """Look at the changed file and record it as the next generation of `volume`, durably. Harmless when that is
        done. WrongState when somebody else has changed it, Busy when its new path is taken."""
        row = await self._catalogue.get(volume.name)
        if row.value.generation == volume.generation + 1:
            return row.value
        if row.value.generation != volume.generation:
            raise late(volume, row.value)
        path, format = path or volume.path, format or volume.format
        seen = await self._look(path, format)
        changed = row.value.but(
            path=path,
            format=format,
            size=seen.size,
            allocated=seen.allocated,
            pool=volume.pool if pool is None else pool,
            generation=volume.generation + 1,
        )
        move = path != row.value.path
        plan = self._catalogue.plan_move(row, changed) if move else self._catalogue.plan_change(row, changed)
        try:
            await self._store.commit(Transaction(plan.writes, plan.checks, durable=True))
        except CheckFailed as error:
            raise Busy(f"volume {volume.name}", "somebody else changes it at this moment", "try again") from error
        return changed

    async def rename(self, ref: str, name: str) -> Volume:
        """Give a volume another name; its file stays where it is. NotFound, AlreadyExists, InvalidInput, Busy."""
        check_name("volume", name)
        row = await self._catalogue.get(ref)
        return row.value if row.id == name else (await self._catalogue.rename(row, name)).value

    async def grown(self, path: str, size: int) -> None:
        """Note that the image is larger now. Harmless when it is no known volume."""
        row = await self._catalogue.find(path)
        if row is not None and row.value.size != size:
            await self._catalogue.change(row, row.value.but(size=size, generation=row.value.generation + 1))

    async def _look(self, path: str, format: ImageFormat) -> Volume:
        """As `inspect` of the service, but as the format it has now, whatever the record says."""
        shape = await in_thread(f"image {path}", lambda: recognise(path, format, deep=True))
        size = shape.size
        if format is ImageFormat.VHD:  # QEMU's word, as everywhere
            size = (await self.image.info(path, format)).virtual_size
        return Volume(name="image", path=path, format=format, size=size, allocated=shape.allocated)


def late(seen: Volume, now: Volume) -> WrongState:
    """The refusal of a change that comes late."""
    return WrongState(
        f"volume {seen.name}",
        f"was changed since: this was asked of its generation {seen.generation}, it has {now.generation}",
        "look at it, and ask again",
        seen=seen.generation,
        now=now.generation,
    )


async def blocking(path: str, work: Callable[[threading.Event], T]) -> T:
    """Long work on a file in a thread, which is asked to stop when we are cancelled, and waited for: nobody else may
    touch the file before it has. OSErrors become what people understand."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise
    except OSError as error:
        raise explain_os(f"image {path}", error, Path(path).parent) from error
