"""Opening a file that somebody named: it may be anything, or not there."""

from __future__ import annotations

import os
import stat

from hostler.model.errors import HostlerError, InvalidInput, NotFound, NotPermitted


def open_regular(path: str) -> int:
    """A read-only descriptor of the regular file at `path`; the caller closes it. Never blocks on a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _cannot_open(path, error) from error
    except ValueError as error:
        raise InvalidInput(f"path {path!r}", "has a NUL character", "give another path") from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise InvalidInput(f"path {path}", f"is {_kind(mode)}, not a file", "name the image file itself")


def _cannot_open(path: str, error: OSError) -> HostlerError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"file {path}", "does not exist", "check the path")
    if isinstance(error, PermissionError):
        return NotPermitted(f"file {path}", "may not be read by this daemon", "check its owner and mode")
    return InvalidInput(f"path {path}", f"cannot be opened: {error.strerror}", "give another path")


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISBLK, "a block device"), (stat.S_ISCHR, "a character device"))
    return next((text for test, text in kinds if test(mode)), "a pipe or socket")
