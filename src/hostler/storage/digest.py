"""The digest of a file, or of a piece of it: work for a thread, which can be told to stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from hostler.model.errors import BadImage, NotFound

PIECE = 1024 * 1024
Stop = Callable[[], bool]


def digest_of(path: str, algorithm: str, stop: Stop, at: int = 0, size: int | None = None) -> str:
    """Hexadecimal digest of `size` bytes from `at` (None: to the end). NotFound, BadImage when it cannot be read. Once
    `stop` says yes the result is meaningless."""
    total = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            file.seek(at)
            left = size
            while not stop():
                piece = file.read(PIECE if left is None else min(PIECE, left))
                if not piece:
                    break
                total.update(piece)
                left = None if left is None else left - len(piece)
    except FileNotFoundError as error:
        raise NotFound(f"file {path}", "is in the manifest but not there", "copy the whole folder") from error
    except OSError as error:
        raise BadImage(f"file {path}", f"cannot be read: {error.strerror}", "look at the disk it is on") from error
    return total.hexdigest()
