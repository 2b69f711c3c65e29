"""From a chain of backup files to an image, each block checked before it is written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hostler.model.backup import BLOCK
from hostler.model.disk import ImageFormat
from hostler.model.errors import Cancelled
from hostler.storage.backups.qcow2 import Writer
from hostler.storage.backups.reading import Chain, Link, verify
from hostler.storage.qemu_img import OnProgress, QemuImg, explain_os, new_file, scratch_file
from hostler.storage.waiting import interruptible

Stop = Callable[[], bool]


async def restore_image(
    path: str, links: Sequence[Link], format: ImageFormat, image: QemuImg, on_progress: OnProgress
) -> None:
    """A new image at `path` in any format. AlreadyExists, BadImage (the backup is damaged), NotFound, NoSpace. Nothing
    is left of it on failure or when cancelled."""
    if format in (ImageFormat.RAW, ImageFormat.QCOW2):
        async with new_file(path) as part:
            await write_image(part, links, format, on_progress)
        return
    async with scratch_file(path) as raw:
        await write_image(raw, links, ImageFormat.RAW, lambda f: on_progress(f / 2))
        size = links[0].disk.size
        await image.convert(raw, ImageFormat.RAW, path, format, size, lambda f: on_progress(0.5 + f / 2))


async def write_image(part: str, links: Sequence[Link], format: ImageFormat, on_progress: OnProgress) -> None:
    """Fill the new empty file `part` with the disk: raw or qcow2."""
    tell = _teller(on_progress)
    await interruptible(lambda stop: _write(part, links, format, tell, stop))


async def verify_files(links: Sequence[Link], on_progress: OnProgress) -> int:
    """Read files of backups and check every block of them; how many there were. BadImage, NotFound."""
    tell = _teller(on_progress)
    return await interruptible(lambda stop: _verify(links, tell, stop))


def _teller(on_progress: OnProgress) -> OnProgress:
    """The same from a thread."""
    loop = asyncio.get_running_loop()

    def tell(fraction: float) -> None:
        loop.call_soon_threadsafe(on_progress, min(1.0, fraction))

    return tell


def _verify(links: Sequence[Link], tell: OnProgress, stop: Stop) -> int:
    whole = sum(link.disk.blocks for link in links) or 1
    done = 0
    for link in links:
        checked = 0
        for checked in verify(link):
            _give_up(stop, link.subject)
            tell((done + checked) / whole)
        done += checked
    return done


def _write(part: str, links: Sequence[Link], format: ImageFormat, tell: OnProgress, stop: Stop) -> None:
    fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with Chain(links) as chain:
            writer = Writer(fd, chain.size) if format is ImageFormat.QCOW2 else _Raw(fd, chain.size)
            for count, (index, data) in enumerate(chain.content()):
                if data is not None:
                    writer.put(index, data)
                if count % 256 == 0:
                    _give_up(stop, f"image {part}")
                    tell(index * BLOCK / chain.size if chain.size else 1.0)
            writer.finish()
    except OSError as error:
        raise explain_os(f"image {part}", error, Path(part).parent) from error
    finally:
        os.close(fd)


def _give_up(stop: Stop, subject: str) -> None:
    if stop():
        raise Cancelled(subject, "was cancelled")


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
