r"""Where the parent of an image is: the Windows paths in it, turned into places on this host.

What an image says is hostile. Only the directory of the image itself and those that the caller named are looked in; a
path or symbolic link that leads out of them is as good as none. `..\Virtual Hard Disks\base.vhd` is followed when it
stays within them. Of an absolute path the last parts are tried below each directory, the longest first: an export
folder keeps its parts together while its place changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from hostler.model.errors import HostlerError
from hostler.storage.chains.source import ImageFile
from hostler.storage.files import open_regular

MAX_PARTS = 3
"""Last parts of an absolute path that are tried: DIRECTORY/DIRECTORY/NAME."""
MAX_ENTRIES = 10_000
"""Names of a directory that are compared when the exact one is not there: Windows does not tell case apart."""
MAX_NAME_BYTES = 255
"""NAME_MAX of every file system in use."""
_SEPARATOR = re.compile(r"[\\/]+")
_DRIVE = re.compile(r"^([A-Za-z]:|\\\\\?\\Volume\{[^}]*\}|\\\\[^\\]+\\[^\\]+)?[\\/]", re.ASCII)


def candidates(names: Sequence[str], directory: str, search: Sequence[str]) -> Iterator[str]:
    """Places where the parent may be, the likeliest first; nothing is known of them yet. All are below `directory` or
    one of `search` by name; `open_within` sees to links."""
    allowed = [directory, *search]
    seen: set[str] = set()
    for path in _places(names, directory, search):
        if path not in seen and any(_is_below(path, place) for place in allowed):
            seen.add(path)
            yield path


def _places(names: Sequence[str], directory: str, search: Sequence[str]) -> Iterator[str]:
    split = [(name, _parts(name)) for name in names]
    for name, parts in split:
        if not _DRIVE.match(name) and parts:
            yield os.path.normpath(os.path.join(directory, *parts))
    for place in [directory, *search]:
        for _, parts in split:
            below = [part for part in parts if part not in ("..", ".")]
            for count in range(min(MAX_PARTS, len(below)), 0, -1):
                yield os.path.join(place, *below[-count:])


def _parts(name: str) -> list[str]:
    """The parts of a path, without its drive; none where a part cannot be a name here."""
    parts = [part for part in _SEPARATOR.split(_DRIVE.sub("", name)) if part not in ("", ".")]
    return parts if all(_is_name(part) for part in parts) else []


def _is_name(part: str) -> bool:
    try:
        return "\0" not in part and len(os.fsencode(part)) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def _is_below(path: str, place: str) -> bool:
    return os.path.commonpath([path, place]) == place != path


def open_within(path: str, allowed: Sequence[str]) -> ImageFile | None:
    """The file at `path`, or the one whose name differs in case only; None when there is none that really lies below
    one of `allowed` (real paths). The caller closes its descriptor."""
    for attempt in (path, _other_case(path)):
        if attempt is None:
            continue
        try:
            fd = open_regular(attempt)
        except (HostlerError, UnicodeError):
            continue
        real = os.readlink(f"/proc/self/fd/{fd}")
        if any(_is_below(real, place) for place in allowed):
            return ImageFile.of(fd, real)
        os.close(fd)
    return None


def _other_case(path: str) -> str | None:
    directory, name = os.path.split(path)
    wanted = name.casefold()
    try:
        with os.scandir(directory) as entries:
            found = (entry.name for _, entry in zip(range(MAX_ENTRIES), entries, strict=False))
            other = next((one for one in found if one.casefold() == wanted and one != name), None)
    except (OSError, ValueError):
        return None
    return None if other is None else os.path.join(directory, other)
