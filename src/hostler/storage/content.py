"""What a guest would read from an image: where its bytes are, and the bytes themselves.

Raw images and fixed VHDs are read by their holes, dynamic VHDs and VHDXs by our own readers (with a pending log
replayed in memory). Of a qcow2, `qemu-img map` says where in the file each piece is; pieces it cannot point at
(compressed clusters) are read through `qemu-nbd`. All of it is bounded in memory, whatever the image says.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import islice
from pathlib import Path
from typing import Self

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage
from hostler.storage import programs
from hostler.storage.chains.chain import open_layer
from hostler.storage.chains.layer import Layer
from hostler.storage.chains.source import ABSENT, LITERAL, ZERO, ImageFile, Piece, merged
from hostler.storage.files import open_regular
from hostler.storage.nbd_read import NbdImage
from hostler.storage.qemu_img import COPY_BOUNDS, QemuImg, explain
from hostler.storage.waiting import in_thread

ELSEWHERE = -4
"""A piece that is stored in a way only QEMU reads (see `chains.source` for the others)."""

CHUNK = 4 * 1024 * 1024
"""Bytes read at once."""
_BATCH = 4096
"""Pieces handed over together."""
_FLAT = (ImageFormat.RAW, ImageFormat.VHD_FIXED)


class Content:
    """An open image, read only. `size`: bytes of the virtual disk (see `recognise` and QemuImg.info)."""

    def __init__(self, path: str, format: ImageFormat, size: int, image: QemuImg) -> None:
        self.path, self.format, self.size = path, format, size
        self._image = image
        self._stack = AsyncExitStack()
        self._fd = -1
        self._nbd: NbdImage | None = None
        self._layer: Layer | None = None

    async def __aenter__(self) -> Self:
        self._fd = await in_thread(f"image {self.path}", lambda: open_regular(self.path))
        self._stack.callback(os.close, self._fd)
        if self.format in (ImageFormat.VHD, ImageFormat.VHDX):
            file = ImageFile.of(self._fd, self.path)
            try:
                self._layer = await in_thread(f"image {self.path}", lambda: _open(file))
            except BaseException:
                await self._stack.aclose()
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def pieces(self) -> AsyncGenerator[Sequence[Piece], None]:
        """All of the disk in order and without gaps, many pieces at a time. BadImage, InUse, ..."""
        walk = self._walk(0, self.size)
        if walk is None:
            async with aclosing(self._mapped()) as mapped:
                async for batch in mapped:
                    yield batch
            return
        while batch := await in_thread(f"image {self.path}", lambda: list(islice(walk, _BATCH))):
            yield batch

    def _walk(self, start: int, end: int) -> Iterator[Piece] | None:
        """The pieces of a part, by our own reading; None where only QEMU knows them."""
        if self.format in _FLAT:
            return _holes(self._fd, start, end)
        return None if self._layer is None else map(_plain, merged(self._layer.pieces(start, end)))

    async def chunks(self) -> AsyncGenerator[bytes | int, None]:
        """All of the disk in order: bytes, or the number of zeroes that nothing stores; twice CHUNK at most."""
        run: list[Piece] = []
        gathered = 0
        async with aclosing(self.pieces()) as batches:
            async for batch in batches:
                for piece in _cut(batch):
                    if piece.at == ZERO and piece.length > CHUNK:
                        if run:
                            yield await self._fetch(run)
                        yield piece.length
                        run, gathered = [], 0
                        continue
                    run.append(piece)
                    gathered += piece.length
                    if gathered >= CHUNK:
                        yield await self._fetch(run)
                        run, gathered = [], 0
        if run:
            yield await self._fetch(run)

    async def read(self, offset: int, length: int) -> bytes:
        """Some bytes of the disk (at most CHUNK), wherever they are; shorter at its end."""
        length = max(0, min(length, self.size - offset))
        walk = self._walk(offset, offset + length)
        if walk is None:
            return await self._fetch([Piece(offset, length, ELSEWHERE)])
        return await self._fetch(await in_thread(f"image {self.path}", lambda: list(walk)))

    async def _fetch(self, run: Sequence[Piece]) -> bytes:
        if self._nbd is None and any(piece.at == ELSEWHERE for piece in run):
            self._nbd = await self._stack.enter_async_context(
                NbdImage.of(self.path, self.format, self.size, self._image)
            )
        return await asyncio.to_thread(lambda: b"".join(map(self._read, run)))

    def _read(self, piece: Piece) -> bytes:
        if piece.at == ZERO:
            return bytes(piece.length)
        if piece.at == LITERAL:
            return piece.literal
        if piece.at == ELSEWHERE:
            assert self._nbd is not None
            return self._nbd.read(piece.offset, piece.length)
        return self._pread(piece)

    def _pread(self, piece: Piece) -> bytes:
        try:
            found = os.pread(self._fd, piece.length, piece.at)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(found) < piece.length:
            if self.format is not ImageFormat.RAW or piece.at + piece.length < self.size:
                raise BadImage(f"image {self.path}", "became shorter while it was read", "look at who writes it")
            found += bytes(piece.length - len(found))  # a raw image may end within a sector
        return found

    async def _mapped(self) -> AsyncGenerator[Sequence[Piece], None]:
        batch: list[Piece] = []
        position = 0
        try:
            argv = self._image.map_command(self.path, self.format)
            with self._image.admit({self.path: False}) as as_user:
                async with aclosing(programs.lines(argv, self.path, COPY_BOUNDS, as_user)) as found:
                    async for line in found:
                        piece = _piece(self.path, line, position)
                        if piece is None:
                            continue
                        position += piece.length
                        batch.append(piece)
                        if len(batch) >= _BATCH:
                            yield batch
                            batch = []
        except programs.Failed as failed:
            raise explain(f"image {self.path}", failed.outcome, Path(self.path).parent, looking=True) from failed
        if position < self.size:
            batch.append(Piece(position, self.size - position, ZERO))
        yield batch


def _cut(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same in pieces of at most CHUNK, but zeroes as they are."""
    for piece in pieces:
        if piece.at in (ZERO, LITERAL) or piece.length <= CHUNK:
            yield piece
            continue
        for start in range(0, piece.length, CHUNK):
            at = piece.at if piece.at == ELSEWHERE else piece.at + start
            yield Piece(piece.offset + start, min(CHUNK, piece.length - start), at)


def _piece(path: str, line: str, position: int) -> Piece | None:
    text = line.strip().strip("[],")
    if not text:
        return None
    try:
        found = json.loads(text)
        start, length = int(found["start"]), int(found["length"])
        at = ZERO if found["zero"] else int(found["offset"]) if found["data"] and "offset" in found else ELSEWHERE
    except (ValueError, KeyError, TypeError) as error:
        raise BadImage(f"image {path}", "qemu-img's map of it cannot be read", "check the file") from error
    if start != position or length <= 0 or at < ELSEWHERE:
        raise BadImage(f"image {path}", "qemu-img's map of it has gaps", "check the file")
    return Piece(start, length, at)


def _open(file: ImageFile) -> Layer:
    layer = open_layer(file)
    if layer.link is not None:
        raise BadImage(f"image {file.path}", "holds the changes to a parent only", "flatten its chain first")
    return layer


def _plain(piece: Piece) -> Piece:
    """Without a parent, what an image says nothing about is zeroes."""
    return Piece(piece.offset, piece.length, ZERO) if piece.at == ABSENT else piece


def _holes(fd: int, start: int, size: int) -> Iterator[Piece]:
    """Data and holes of a file from `start` to `size`, as its file system tells them."""
    end = min(size, os.fstat(fd).st_size)
    position = start
    while position < end:
        data = _seek(fd, position, os.SEEK_DATA, end)
        if data > position:
            yield Piece(position, data - position, ZERO)
        if data >= end:
            break
        position = _seek(fd, data, os.SEEK_HOLE, end)
        yield Piece(data, position - data, data)
    if end < size:
        yield Piece(max(end, start), size - max(end, start), ZERO)


def _seek(fd: int, position: int, whence: int, end: int) -> int:
    try:
        return min(end, os.lseek(fd, position, whence))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        if error.errno == errno.EINVAL:  # a file system that does not know: all is data
            return position if whence == os.SEEK_DATA else end
        raise


def _unreadable(path: str, error: OSError) -> BadImage:
    return BadImage(f"image {path}", f"cannot be read: {error.strerror}", "look at the disk it is on")
