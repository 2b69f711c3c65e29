"""What QEMU's texts mean. QEMU has hardly any error classes, so its words are all there is; they are matched here only.

Pure. The texts are those of QEMU 7.2 (block.c, block/file-posix.c, util/osdep.c) and of strerror(3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from hostler.model.errors import BadImage, HostLacks, HostlerError, InUse, NoSpace, NotFound, NotPermitted, QemuFailed


@dataclass(frozen=True, slots=True)
class _Meaning:
    text: re.Pattern[str]
    kind: type[HostlerError]
    cause: str
    advice: str


def _meaning(text: str, kind: type[HostlerError], cause: str, advice: str) -> _Meaning:
    return _Meaning(re.compile(text), kind, cause, advice)


_MEANINGS: Final = (
    _meaning(
        r"Failed to (get|lock)|Permission conflict",
        InUse,
        "{path} is open for writing in another VM or program",
        "turn off the VM that has it, or detach it there",
    ),
    _meaning(
        r"No such file or directory",
        NotFound,
        "{path} does not exist",
        "check the path, and whether its share is mounted",
    ),
    _meaning(
        r"Permission denied|Operation not permitted",
        NotPermitted,
        "QEMU may not open {path}",
        "check the owner and the access rights of the file and its directories",
    ),
    _meaning(
        r"Can't reopen read-only NBD",
        NotPermitted,
        "the export of {path} is for reading only",
        "serve it with the right to write",
    ),
    _meaning(r"No space left", NoSpace, "no space is left for {path}", "free some space there"),
    _meaning(
        r"is not in \w+ format|invalid VPC|[Ii]nvalid argument|ignature|Is a directory|driver requires",
        BadImage,
        "{path} is not what it is said to be",
        "check its format with: hostler volume show",
    ),
    _meaning(r"[Cc]orrupt", BadImage, "{path} is damaged", "repair it, or use a copy"),
)
_PATHS: Final = (re.compile(r"using the image \[(.+?)\]\?"), re.compile(r"Could not (?:re)?open '(.+?)'"))


def image_error(about: str, text: str, path: str | None = None) -> HostlerError | None:
    """QEMU's text as an error about an image; None when it does not sound like one. `path`: the image, where the caller
    knows better than the text."""
    named = path or _path_in(text)
    for meaning in _MEANINGS:
        if meaning.text.search(text):
            cause = meaning.cause.format(path=named or "a disk of it")
            return meaning.kind(about, cause, meaning.advice, path=named, qemu=text)
    return None


def start_error(about: str, output: str) -> HostlerError:
    """Why QEMU ended at its start, from what it wrote."""
    text = output.strip()
    words = _without_prefix(text.splitlines()[-1]) if text else "it wrote nothing"
    if "Cannot allocate memory" in text:
        return HostLacks(
            about, "this host has not enough free memory for it", "free memory, or give the VM less", output=text
        )
    error = image_error(about, text) if _path_in(text) else None
    if error is None:
        return QemuFailed(about, f"QEMU ended at its start: {words}", output=text, gone=True)
    error.details["output"] = text
    return error


def _path_in(text: str) -> str | None:
    found = (pattern.search(text) for pattern in _PATHS)
    return next((match.group(1) for match in found if match), None)


def _without_prefix(line: str) -> str:
    """The line without the time stamp and program name QEMU puts in front."""
    return re.sub(r"^(\d{4}-\S+ )?(\S*qemu\S*: )?", "", line).rstrip(". ")
