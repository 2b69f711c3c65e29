"""From a chain of backup files to an image, each block checked before it is written."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from hostler.model.backup import BLOCK
from hostler.model.disk import ImageFormat
from hostler.model.errors import Cancelled
from hostler.storage.backups.qcow2 import Writer
from hostler.storage.backups.reading import Chain, Link
from hostler.storage.qemu_img import QemuImg, explain_os, new_file, scratch_file

OnFraction = Callable[[float], None]
Made = Callable[[int], Awaitable[None]]


async def write_image(part: str, links: Sequence[Link], format: ImageFormat, on_fraction: OnFraction) -> None:
    """Fill the new empty file `part` with the disk: raw or qcow2. BadImage for damage, NoSpace. Cancelling ends it."""
    stop = threading.Event()
    loop = asyncio.get_running_loop()

    def tell(fraction: float) -> None:
        loop.call_soon_threadsafe(on_fraction, fraction)

    work = asyncio.ensure_future(asyncio.to_thread(_write, part, links, format, tell, stop))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()
        raise


def _write(part: str, links: Sequence[Link], format: ImageFormat, tell: OnFraction, stop: threading.Event) -> None:
    fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with Chain(links) as chain:
            writer = Writer(fd, chain.size) if format is ImageFormat.QCOW2 else _Raw(fd, chain.size)
            for count, (index, data) in enumerate(chain.content()):
                if data is not None:
                    writer.put(index, data)
                if count % 256 == 0:
                    if stop.is_set():
                        raise Cancelled(f"image {part}", "was cancelled")
                    tell(min(1.0, index * BLOCK / chain.size) if chain.size else 1.0)
            writer.finish()
    except OSError as error:
        raise explain_os(f"image {part}", error, Path(part).parent) from error
    finally:
        os.close(fd)


class _Raw:
    """Writes a raw image; what is not written stays a hole."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        os.ftruncate(fd, size)

    def put(self, index: int, data: bytes) -> None:
        """One block; the last one may be cut."""
        view = memoryview(data)[: max(0, self._size - index * BLOCK)]
        at = index * BLOCK
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def finish(self) -> None:
        """On disk."""
        os.fsync(self._fd)


async def restore_image(
    path: str, links: Sequence[Link], format: ImageFormat, image: QemuImg, on_fraction: OnFraction, made: Made
) -> None:
    """A new image at `path` in any format. `made` is told the inode of the file before it gets its name (raw and qcow2;
    right after it otherwise), so that whoever cleans up after a crash removes no other one. AlreadyExists, BadImage,
    NoSpace."""
    if format in (ImageFormat.RAW, ImageFormat.QCOW2):
        async with new_file(path) as part:
            await write_image(part, links, format, on_fraction)
            await made(os.stat(part).st_ino)
        return
    async with scratch_file(path) as raw:
        await write_image(raw, links, ImageFormat.RAW, lambda f: on_fraction(f / 2))
        size = links[0].disk.size
        await image.convert(raw, ImageFormat.RAW, path, format, size, lambda f: on_fraction(0.5 + f / 2))
        await made(os.stat(path).st_ino)
