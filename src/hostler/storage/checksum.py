"""The checksum of what a guest would read: the same for every format that holds the same content."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing

from hostler.model.image import Checksum
from hostler.storage.content import Content
from hostler.storage.qemu_img import OnProgress

_ZEROES = bytes(1024 * 1024)


async def checksum(content: Content, on_progress: OnProgress | None = None) -> Checksum:
    """SHA-256 of all of it. Zeroes that are not stored are not read, but hashed. BadImage, InUse."""
    digest, done, data = hashlib.sha256(), 0, 0
    async with aclosing(content.chunks()) as chunks:
        # The next chunk is read while this one is hashed: hashlib lets other threads run.
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while (chunk := await coming) is not None:
                coming = asyncio.ensure_future(anext(chunks, None))
                length = await asyncio.to_thread(_add, digest, chunk)
                done += length
                data += length if isinstance(chunk, bytes) else 0
                if on_progress is not None and content.size:
                    on_progress(min(1.0, done / content.size))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
    return Checksum(path=content.path, size=done, sha256=digest.hexdigest(), data=data)


def _add(digest: hashlib._Hash, chunk: bytes | int) -> int:
    if isinstance(chunk, bytes):
        digest.update(chunk)
        return len(chunk)
    for start in range(0, chunk, len(_ZEROES)):
        digest.update(_ZEROES[: chunk - start])
    return chunk
