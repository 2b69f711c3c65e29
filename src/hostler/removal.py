"""Removing what lies in a directory that belongs to a VM's user, who may be hostile (a guest that broke out).

Such a user can put anything in the place of anything: a link, a FIFO that blocks whoever opens it, a directory where a
file is expected, a thousand directories in each other. Whoever cleans up must not care: nothing here follows a link,
opens anything but a directory, recurses, needs a descriptor for each level, or raises.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

import structlog

log = structlog.get_logger()

FEW = 1_000
"""Entries removed at most where the caller is the event loop: some 10 ms."""
MANY = 1_000_000
"""Entries removed at most in a thread. A process that goes on making files must not keep us busy for ever."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str | os.PathLike[str], most: int = MANY) -> bool:
    """Remove a file, link, socket, FIFO, or directory with all that is in it. True when nothing is there afterwards.

    Only the last part of `path` may be somebody else's: the way to it must be ours. Gives up, with a warning in the
    log, after `most` entries or when the system refuses. Never raises for what is there.
    """
    try:
        gone = _remove(os.fspath(path), _Budget(most))
        why = "there is too much in it"
    except OSError as error:
        gone, why = False, error.strerror or type(error).__name__
    if not gone:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")  # a name need not be text, a log line must be
        log.warning("file.not-removed", path=shown, why=why)
    return gone


class _Budget:
    """How many entries may still be looked at."""

    def __init__(self, most: int) -> None:
        self._left = most

    def spend(self) -> bool:
        """False when nothing is left."""
        self._left -= 1
        return self._left >= 0


def _remove(path: str, budget: _Budget) -> bool:
    if _unlink(path, None):
        return True
    top = os.open(path, _FOLDER)
    try:
        if not _empty(top, budget):
            return False
    finally:
        os.close(top)
    os.rmdir(path)
    return True


def _empty(top: int, budget: _Budget) -> bool:
    """Remove all in an open directory. What is in a subdirectory is lifted to the top before that one is removed, so
    the depth costs neither recursion nor descriptors, and each directory is moved once at most."""
    while names := _some(top):
        for name in names:
            if not budget.spend():
                return False
            if not _unlink(name, top) and not _dissolve(name, top, budget):
                return False
    return True


def _dissolve(name: str, top: int, budget: _Budget) -> bool:
    """Remove a directory in `top`; the directories in it are in `top` afterwards. False when the budget is spent."""
    folder = os.open(name, _FOLDER, dir_fd=top)
    try:
        while inner := _some(folder):
            for entry in inner:
                if not budget.spend():
                    return False
                if not _unlink(entry, folder):
                    os.rename(entry, secrets.token_hex(16), src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=top)
    return True


def _unlink(name: str, folder: int | None) -> bool:
    """Remove what is no directory; False for one. Linux says EISDIR then, unlink(2)."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    return True


def _some(folder: int) -> list[str]:
    """Up to FEW names of an open directory: it may hold more than should be in memory at once."""
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) == FEW:
                break
    return names
