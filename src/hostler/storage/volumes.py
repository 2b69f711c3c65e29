"""Volumes: make, copy, register, look at, list and delete disk images.

    creating --> ready --> deleting --> (gone);  creating --fails, is cancelled--> (gone)

The record is written before the file is made and removed after it: whenever the daemon is killed, `recover` finds in
the record what was under way. Missing and damaged are seen, not recorded: they end when the file is back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from hostler.model.base import utc_now
from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import BadImage, Busy, HostlerError, InvalidInput, NotPermitted
from hostler.model.image import Preallocation
from hostler.model.limits import Limits
from hostler.model.names import check_name
from hostler.model.units import format_size
from hostler.model.volume import Volume, VolumeState
from hostler.storage.catalogue import Catalogue, real_target
from hostler.storage.chains.flatten import flatten_into
from hostler.storage.claims import ClaimBook
from hostler.storage.cloning import cloned
from hostler.storage.formats import SUFFIX, Shape, recognise
from hostler.storage.observing import Observer
from hostler.storage.qemu_img import Layout, LogPending, OnProgress, QemuImg, check_preallocation, leftovers
from hostler.storage.waiting import in_thread, whole
from hostler.store.contract import CheckFailed, Delete, Put, Store, Transaction
from hostler.store.table import Row

SECTOR = 512
_TRIES = 20

Fill = Callable[[str, QemuImg], Awaitable[None]]
"""Makes the image of a new volume at that path."""


class VolumeService:
    """The volumes of one host. New ones without a path go to `directory`, which is made (0755) when first needed."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        limits: Limits,
        claims: ClaimBook | None = None,
        image: QemuImg | None = None,
    ) -> None:
        self.store = store
        self._directory = directory
        self.limits = limits
        self._claims = claims or ClaimBook(store)
        self._image = image or QemuImg()
        self.images = self._image
        """What makes and converts images here."""
        self._catalogue = Catalogue(store)
        self._observer = Observer()
        self._making: list[str] = []

    @property
    def image(self) -> QemuImg:
        """What makes and converts images here."""
        return self._image

    # making

    async def create(
        self,
        name: str,
        size: int,
        format: ImageFormat = ImageFormat.QCOW2,
        path: str | None = None,
        pool: str = "",
        preallocation: Preallocation = Preallocation.OFF,
    ) -> Volume:
        """A new empty volume of exactly `size` bytes, recorded as one of `pool`. InvalidInput, LimitExceeded,
        AlreadyExists, NoSpace, NotFound (the directory), NotPermitted; nothing is left of it on failure or
        cancellation."""
        target = self.check_new(name, size, format, path)
        check_preallocation(f"volume {name}", format, preallocation)
        async with AsyncExitStack() as undo:
            row = await self._begin(undo, name, size, format, target, pool)
            await self._image.create(target, format, size, Layout(preallocation=preallocation))
            undo.callback(_remove, target)
            return await self._complete(undo, row)

    async def create_from(
        self,
        name: str,
        source: str,
        format: ImageFormat | None = None,
        size: int | None = None,
        path: str | None = None,
        source_format: ImageFormat | None = None,
        on_progress: OnProgress | None = None,
        pool: str = "",
        made_by: str = "",
    ) -> Volume:
        """A new volume with the content of the image or volume `source`, converted to `format` (None: its own) and made
        larger where `size` is above its size. Errors as `create`, and BadImage, InUse about the source."""
        known, shape = await self._source(source, source_format)
        size = shape.size if size is None else size
        format = format or shape.format
        if size < shape.size:
            raise InvalidInput(
                f"size {format_size(size)}",
                f"is less than the {format_size(shape.size)} of {source}, whose end would be lost",
                f"give {shape.size} or more",
            )
        # An image may be any number of bytes long; what QEMU makes of it has whole sectors.
        size += -size % SECTOR

        async def fill(target: str, image: QemuImg) -> None:
            try:
                if not await cloned(known, shape, target, format, size):
                    await image.convert(known, shape.format, target, format, size, on_progress)
            except LogPending:  # QEMU would have to write the log's content into the source, we read it as if it had
                await flatten_into(known, target, format.value, size, on_progress)

        return await self.create_filled(name, size, format, fill, path, pool, made_by)

    async def create_filled(
        self,
        name: str,
        size: int,
        format: ImageFormat,
        fill: Fill,
        path: str | None = None,
        pool: str = "",
        made_by: str = "",
    ) -> Volume:
        """A new volume whose file `fill` makes: complete, of exactly `size` bytes for a guest, under the path it is
        given and never half of it there (`qemu_img.new_file`). Errors as `create`, and those of `fill`."""
        target = self.check_new(name, size, format, path)
        async with AsyncExitStack() as undo:
            row = await self._begin(undo, name, size, format, target, pool, made_by)
            await fill(target, self._image)
            undo.callback(_remove, target)
            return await self._complete(undo, row)

    async def register(self, name: str, path: str, format: ImageFormat | None = None, made_by: str = "") -> Volume:
        """Make an existing image known. Its format is told from its content now and holds ever after; only raw has to
        be said, for what looks like nothing may as well be damaged. BadImage, NotFound, InvalidInput, AlreadyExists."""
        check_name("volume", name)
        seen = await self.inspect(path, format)
        _require_said(path, seen.format, format)
        volume = seen.but(name=name, path=os.path.realpath(path), created=utc_now(), made_by=made_by)
        await whole(self._catalogue.add(volume), self._forget)
        return volume

    async def add(self, volume: Volume) -> Volume:
        """Record a volume whose image or LUN is there already. AlreadyExists, InvalidInput."""
        check_name("volume", volume.name)
        known = volume.but(created=utc_now())
        await whole(self._catalogue.add(known), self._forget)
        return known

    async def amend(self, name: str, **changes: object) -> Volume:
        """Change fields of a record other than its name and path. NotFound, Busy."""
        row = await self._catalogue.get(name)
        return (await self._catalogue.change(row, row.value.but(**changes))).value

    # looking

    async def records(self) -> Sequence[Volume]:
        """Every volume as it is on record; no file is looked at."""
        return [row.value for row in await self._catalogue.rows()]

    async def inspect(self, path: str, format: ImageFormat | None = None) -> Volume:
        """Look closely at an image file, known or not, in use or not. For a known volume the recorded format holds,
        whatever its content looks like by now. BadImage, NotFound, InvalidInput, NotPermitted."""
        seen = await self.look(path, format)
        shape = await self.examine(path, seen.format)
        return seen.but(size=shape.size, allocated=shape.allocated)

    async def look(self, path: str, format: ImageFormat | None = None) -> Volume:
        """As `inspect`, but by our own reading of the headers alone (milliseconds less): for an image that QEMU itself
        is about to open."""
        _check_path(path)
        row = await self._catalogue.find(path)
        declared = row.value.format if row else format
        shape = await in_thread(f"image {path}", lambda: recognise(path, declared, deep=True))
        if row is not None:
            return row.value.but(size=shape.size, allocated=shape.allocated)
        return Volume(
            name=Path(path).stem[:100], path=path, format=shape.format, size=shape.size, allocated=shape.allocated
        )

    async def list(self) -> Sequence[Volume]:
        """Every volume, ordered by name, each with what its file is now."""
        return await self._observer.each([row.value for row in await self._catalogue.rows()])

    async def get(self, ref: str) -> Volume:
        """The volume with that name or path, with what its file is now. NotFound with the nearest name."""
        row = await self._catalogue.get(ref)
        return await self._observer.one(row.value)

    # ending

    async def delete(self, ref: str, keep_file: bool = False) -> None:
        """Forget a volume and remove its file. InUse while a VM has it, Busy while it is made, NotFound."""
        for _ in range(_TRIES):
            row = await self._catalogue.get(ref)
            if row.value.state is VolumeState.CREATING:
                if row.id in self._making or row.value.job:
                    raise Busy(f"volume {row.id}", "is being created", "wait for that, or cancel it")
                await self._finish_create(row)  # nobody makes it any more: its undoing has failed
                continue
            keep_file = keep_file or row.value.kind is not SourceKind.VOLUME  # a LUN is not ours to remove
            keep = await self._claims.plan_keep(row.value.path, row.value.identity)
            plan = self._plan_delete(row, keep, keep_file)
            try:
                revision = await self.store.commit(plan)
            except CheckFailed:
                continue
            if not keep_file:
                await self._finish_delete(Row(row.id, row.value.but(state=VolumeState.DELETING), revision))
            return
        raise Busy(f"volume {ref}", "others change it at the same moment", "try again")

    async def recover(self) -> None:
        """After the start of the daemon, before anything else: finish what a killed one was doing."""
        for row in await self._catalogue.rows():
            if row.value.state is VolumeState.DELETING:
                with suppress(NotPermitted):  # still not deletable: it is ready again and says so when asked
                    await self._finish_delete(row)
            elif row.value.state is VolumeState.CREATING and not row.value.job:
                await self._finish_create(row)

    # steps

    def check_new(self, name: str, size: int, format: ImageFormat, path: str | None) -> str:
        """Refuse nonsense before anything is done; the path that the new file will have."""
        check_name("volume", name)
        subject = f"volume {name}"
        check_size(self.limits, subject, size, format)
        if path is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = str(self._directory / (name + SUFFIX[format]))
        _check_path(path)
        target = real_target(path)
        if len(os.fsencode(os.path.basename(target))) > 255:
            raise InvalidInput(subject, "its file name would have more than 255 bytes", "choose a shorter name or path")
        return target

    async def _begin(
        self,
        undo: AsyncExitStack,
        name: str,
        size: int,
        format: ImageFormat,
        path: str,
        pool: str,
        made_by: str = "",
    ) -> Row[Volume]:
        """Write the record, and see to it that it goes when the work fails."""
        volume = Volume(
            name=name,
            path=path,
            format=format,
            size=size,
            pool=pool,
            state=VolumeState.CREATING,
            created=utc_now(),
            made_by=made_by,
        )
        self._making.append(name)
        undo.callback(self._making.remove, name)
        row = await whole(self._catalogue.add(volume), self._forget)
        undo.push_async_callback(self._forget, row)
        return row

    async def _complete(self, undo: AsyncExitStack, row: Row[Volume]) -> Volume:
        shape = await self.examine(row.value.path, row.value.format)
        ready = row.value.but(size=shape.size, allocated=shape.allocated, state=VolumeState.READY)
        await whole(self._catalogue.change(row, ready), self._forget)
        undo.pop_all()
        self._making.remove(row.id)
        return ready

    async def _forget(self, row: Row[Volume]) -> None:
        with suppress(CheckFailed):  # somebody else has dealt with it
            await asyncio.shield(self.store.commit(self._catalogue.plan_remove(row)))

    def _plan_delete(self, row: Row[Volume], keep: Transaction, keep_file: bool) -> Transaction:
        """Without the file one transaction does it all; with it, the record says what is under way."""
        if keep_file:
            gone = self._catalogue.plan_remove(row)
            return Transaction(gone.writes, [*gone.checks, *keep.checks])
        change = self._catalogue.plan_change(row, row.value.but(state=VolumeState.DELETING))
        return Transaction([*change.writes, *keep.writes], [*change.checks, *keep.checks])

    async def _finish_delete(self, row: Row[Volume]) -> None:
        drop = self._claims.drop_keep(row.value.path)
        try:
            await in_thread(f"volume {row.id}", lambda: _remove(row.value.path))
        except OSError as error:
            back = self._catalogue.plan_change(row, row.value.but(state=VolumeState.READY))
            await self._commit(back, drop)
            raise NotPermitted(
                f"volume {row.id}",
                f"{row.value.path} cannot be removed: {error.strerror}",
                "check its directory's mode",
            ) from error
        await self._commit(self._catalogue.plan_remove(row), drop)

    async def _finish_create(self, row: Row[Volume]) -> None:
        """The file gets its name only when it is complete: if it is there, only the last word was missing."""
        for part in leftovers(row.value.path):
            part.unlink(missing_ok=True)
        try:
            shape = await self.examine(row.value.path, row.value.format)
        except HostlerError:
            await self._commit(self._catalogue.plan_remove(row))
            return
        ready = row.value.but(size=shape.size, allocated=shape.allocated, state=VolumeState.READY)
        await self._commit(self._catalogue.plan_change(row, ready))

    async def _commit(self, plan: Transaction, *more: Put | Delete) -> None:
        with suppress(CheckFailed):  # somebody else has finished the same
            await self.store.commit(Transaction([*plan.writes, *more], plan.checks))

    async def _source(self, source: str, format: ImageFormat | None) -> tuple[str, Shape]:
        """Path and shape of what shall be copied; refused while a VM may write it."""
        row = await self._catalogue.find(source)
        path = row.value.path if row else source
        _check_path(path)
        self._claims.refuse([c for c in await self._claims.on(path) if c.write], f"volume {source}")
        shape = await self.examine(path, row.value.format if row else format)
        if row is None:
            _require_said(path, shape.format, format)
        return path, shape

    async def examine(self, path: str, format: ImageFormat | None) -> Shape:
        """First our own look, which finds references to other files, then QEMU's, which opens it."""
        shape = await in_thread(f"image {path}", lambda: recognise(path, format, deep=True))
        if shape.format is ImageFormat.RAW:
            return shape
        try:
            info = await self._image.info(path, shape.format)
        except LogPending:
            return shape  # in use, or left by a crash: sound, and repaired when a VM opens it
        if info.corrupt:
            raise BadImage(f"image {path}", "QEMU has marked it as corrupt", "restore it from a backup")
        size = shape.size if shape.format is ImageFormat.VHD_FIXED else info.virtual_size
        return Shape(shape.format, size, shape.allocated)


def check_size(limits: Limits, subject: str, size: int, format: ImageFormat) -> None:
    """InvalidInput for a size that is no number of whole sectors, LimitExceeded for one above the format's."""
    if size <= 0 or size % SECTOR:
        near = max(SECTOR, size + -size % SECTOR)
        raise InvalidInput(subject, f"a size of {size} bytes is not a number of whole sectors", f"for example {near}")
    limit = "vhd_size" if format in (ImageFormat.VHD, ImageFormat.VHD_FIXED) else "volume_size"
    limits.refuse_above(subject, limit, size, "the size")


def _require_said(path: str, found: ImageFormat, said: ImageFormat | None) -> None:
    """InvalidInput for a file that looks like nothing known and was not said to be raw: it may as well be damaged."""
    if found is ImageFormat.RAW and said is not ImageFormat.RAW:
        raise InvalidInput(
            f"image {path}", "has no header of a known image format", "if it is a raw image, say that its format is raw"
        )


def _check_path(path: str) -> None:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise InvalidInput(
            f"path {path!r}", "is not an absolute path of a file", "write it from the root: /srv/vm/a.vhdx"
        )


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
