"""Starting the process that flattens a chain, and understanding what it says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hostler.model.errors import BY_CODE, ErrorCode, HostlerError, InternalError
from hostler.storage import programs
from hostler.storage.chains.journal import journal_of
from hostler.storage.qemu_img import OnProgress, new_file

PROGRAM = "hostler.storage.chains.flatten_process"
BOUNDS = programs.Bounds(memory=2 * 1024**3)
"""Address space: some threads with an arena and a stack each; it really uses some tens of MiB."""


async def flatten(
    image: str, part: str, format: str, size: int = 0, search: Sequence[str] = (), on_progress: OnProgress | None = None
) -> None:
    """Copy the chain of `image` into the file `part` as one disk of that format (and of `size` bytes, where that is
    more), going on where an earlier attempt was stopped. Parents are looked for beside each image and in `search`.
    Cancelling kills the process and leaves `part` as it is. BadImage, InUse, NotFound, NoSpace, NotPermitted,
    InvalidInput."""
    argv = [sys.executable, "-P", "-m", PROGRAM, part, format, str(size), image, *search]
    outcome = await programs.run(argv, f"image {image}", None, BOUNDS, _teller(on_progress))
    if outcome.status != 0:
        raise _refusal(image, outcome)


async def flatten_into(image: str, path: str, format: str, size: int, on_progress: OnProgress | None = None) -> None:
    """A new file `path`, whole or not at all. Errors as `flatten`, and AlreadyExists."""
    async with new_file(path) as part:
        try:
            await flatten(image, part, format, size, (), on_progress)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(journal_of(part))


def _teller(on_progress: OnProgress | None) -> programs.OnText | None:
    if on_progress is None:
        return None
    tell = on_progress
    rest = ""

    def on_text(text: str) -> None:
        nonlocal rest
        *lines, rest = (rest + text).split("\n")
        for said in map(_parsed, lines):
            if "done" in said and said.get("size"):
                tell(min(1.0, said["done"] / said["size"]))

    return on_text


def _parsed(line: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _refusal(image: str, outcome: programs.Outcome) -> HostlerError:
    """The error that it printed; else what is known of its end."""
    for line in reversed(outcome.out.splitlines()):
        problem = _parsed(line).get("error")
        if isinstance(problem, dict):
            kind = BY_CODE[ErrorCode(problem["code"])]
            return kind(problem["object"], problem["cause"], problem["advice"])
    last = (outcome.err.strip().splitlines() or ["it said nothing"])[-1]
    return InternalError(f"image {image}", f"flattening it ended with {outcome.status}: {last}", "see the daemon's log")
