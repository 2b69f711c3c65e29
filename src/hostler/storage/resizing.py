"""Another size for an image, in place, whatever its format; and what stands in the way of a smaller one."""

from __future__ import annotations

import os
import threading
from contextlib import aclosing
from dataclasses import dataclass

from hostler.model.disk import ImageFormat
from hostler.model.errors import InUse
from hostler.model.units import format_size
from hostler.storage.chains.source import ZERO
from hostler.storage.changes import blocking
from hostler.storage.content import CHUNK, Content
from hostler.storage.partitions import Table, read_table
from hostler.storage.qemu_img import OnProgress, QemuImg
from hostler.storage.vhd_size import resize_vhd
from hostler.storage.vhdx_size import resize_vhdx


async def resize(image: QemuImg, path: str, format: ImageFormat, old: int, new: int) -> None:
    """Make an image that had `old` bytes one of `new`, durably. What lies behind a smaller size is lost. Repeating it
    is harmless, whatever interrupted it. BadImage, NoSpace, NotPermitted."""
    if format is ImageFormat.QCOW2:
        await image.resize(path, format, new, shrink=new < old)
        return

    def work(_stop: threading.Event) -> None:
        if format is ImageFormat.RAW:
            _truncate(path, new)
        elif format is ImageFormat.VHDX:
            resize_vhdx(path, new)
        else:
            resize_vhd(path, old, new)

    await blocking(path, work)


def _truncate(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Obstacles:
    """Why a disk should not be cut: sentences for people."""

    texts: tuple[str, ...]

    def refuse(self, name: str, size: int) -> None:
        """InUse if there are any."""
        if self.texts:
            raise InUse(
                f"volume {name}",
                f"cannot become {format_size(size)} without losing something: {'; '.join(self.texts)}",
                "make its partitions smaller and write zeroes behind them (or trim), then try again",
                obstacles=list(self.texts),
            )


async def look_behind(content: Content, size: int, on_progress: OnProgress) -> Obstacles:
    """What lies behind `size`: partitions that reach there, and anything but zeroes."""
    table = await read_table(content.read, content.size)
    texts = [f"{p.name} ends at {format_size(p.end)}" for p in table.beyond(size)]
    if table.kind == "gpt" and not texts:
        texts += ["the second copy of its partition table (GPT) is at its end"]
    found = await _first_data(content, size, on_progress)
    if found is not None and not (table.kind == "gpt" and _is_backup(table, found)):
        texts.append(f"there is data at {format_size(found)} (byte {found})")
    return Obstacles(tuple(texts))


def _is_backup(table: Table, at: int) -> bool:
    return table.backup is not None and at >= table.backup


async def _first_data(content: Content, start: int, on_progress: OnProgress) -> int | None:
    """Where behind `start` the first byte is that is no zero."""
    span = max(1, content.size - start)
    async with aclosing(content.pieces()) as batches:
        async for batch in batches:
            for piece in batch:
                if piece.end <= start or piece.at == ZERO:
                    continue
                for at in range(max(piece.offset, start), piece.end, CHUNK):
                    chunk = await content.read(at, min(CHUNK, piece.end - at))
                    if chunk != bytes(len(chunk)):
                        return at + len(chunk) - len(chunk.lstrip(b"\0"))
                    on_progress(min(1.0, (at - start) / span))
    return None
