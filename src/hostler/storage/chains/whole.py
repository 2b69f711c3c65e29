"""A chain made one new image in one go: whole, or not there at all.

Where copying shall survive the daemon, `volume.flatten` has a job of its own; this is for jobs that begin anew instead.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress

from hostler.model.disk import ImageFormat
from hostler.storage.chains.flatten import flatten
from hostler.storage.chains.journal import journal_of
from hostler.storage.qemu_img import OnProgress, new_file


async def flatten_whole(
    source: str, path: str, format: ImageFormat, size: int, search: Sequence[str], on_progress: OnProgress | None = None
) -> None:
    """A new image of `size` bytes at `path` with the content of the chain of `source`. Parents are looked for beside
    each image and in `search`. AlreadyExists, and what `flatten` raises; nothing is left then."""
    async with new_file(path) as part:
        try:
            await flatten(source, part, format.value, size, search, on_progress)
        finally:
            await asyncio.to_thread(_forget, part)


def _forget(part: str) -> None:
    for path in (journal_of(part), journal_of(journal_of(part))):
        with suppress(OSError):
            os.unlink(path)
