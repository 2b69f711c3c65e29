"""OVA: an OVF and its files in one tar. Nothing is unpacked: a member is a range of the file.

Only what the OVF standard allows in one is read: plain files with plain names. Every header is 512 bytes, so that a
hostile archive cannot ask for memory; long names (GNU, pax) are read up to a bound.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hostler.foreign.errors import bad_description

BLOCK = 512
MAX_MEMBERS = 1024
MAX_HEADERS = 8 * MAX_MEMBERS
"""Headers of all kinds, also of what is left out."""
MAX_EXTENDED = 64 * 1024
"""Bytes of a long name or pax header."""
_PAX = re.compile(rb"(?<!\d)\d{1,8} (path|size)=([^\n]*)\n")
"""Bounded, since a search holds up the whole daemon: without the bound a header of digits takes seconds."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive: bytes `offset` to `offset + size`."""

    name: str
    offset: int
    size: int


Reader = Callable[[int, int], bytes]
"""Reads that many bytes from there; fewer at the end."""


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so is a tar (POSIX or GNU)."""
    return len(head) >= BLOCK and head[257:262] == b"ustar"


def list_members(read: Reader, size: int, path: str) -> list[Member]:
    """The files of an archive of `size` bytes. InvalidInput for links, devices, names that are paths, twice the same
    name, and whatever is cut off."""
    found: list[Member] = []
    for member in _members(read, size, path):
        if os.path.basename(member.name) != member.name or member.name in ("", ".", "..") or "\0" in member.name:
            raise bad_description(path, f"has the file {member.name[:100]!r}, whose name is a path", "pack it again")
        if any(member.name == other.name for other in found):
            raise bad_description(path, f"has two files named {member.name[:100]!r}", "pack it again")
        found.append(member)
        if len(found) > MAX_MEMBERS:
            raise bad_description(path, f"has more than {MAX_MEMBERS} files")
    return found


def _members(read: Reader, size: int, path: str) -> Iterator[Member]:
    at, name, length, headers = 0, "", None, 0
    while at + BLOCK <= size:
        header = read(at, BLOCK)
        headers += 1
        if headers > MAX_HEADERS:
            raise bad_description(path, f"has more than {MAX_HEADERS} headers")
        if len(header) < BLOCK or header.count(0) == BLOCK:
            return
        _check(header, path)
        stored = _number(header[124:136], path)
        kind, content = header[156:157], at + BLOCK
        at = content + -(-stored // BLOCK) * BLOCK
        if content + stored > size:
            raise bad_description(path, "is cut off: a file in it goes on behind its end", "copy it again")
        if kind in (b"L", b"x", b"g"):
            name, length = _extended(kind, _bounded(read, content, stored, path), name, length, path)
            continue
        if kind == b"5":  # a folder: nothing is unpacked, so it is nothing
            name, length = "", None
            continue
        if kind not in (b"0", b"\0", b"7"):
            raise bad_description(
                path, f"has something in it that is no plain file (tar type {kind!r})", "pack only the OVF's files"
            )
        if length is not None and length != stored:
            raise bad_description(path, "has a file with two sizes", "pack it again")
        yield Member((name or _name(header)).removeprefix("./"), content, stored)
        name, length = "", None


def _bounded(read: Reader, at: int, length: int, path: str) -> bytes:
    if length > MAX_EXTENDED:
        raise bad_description(path, f"has a header of {length} bytes")
    return read(at, length)


def _extended(kind: bytes, content: bytes, name: str, size: int | None, path: str) -> tuple[str, int | None]:
    """Name and size that the next file gets from a GNU long name or a pax header."""
    if kind == b"L":
        return _text(content.rstrip(b"\0"), path), size
    if kind == b"x":
        for key, value in _PAX.findall(content):
            if key == b"path":
                name = _text(value, path)
            elif value.isdigit() and len(value) < 20:
                size = int(value)
    return name, size


def _check(header: bytes, path: str) -> None:
    """The sum of all bytes, with that of the field itself as blanks."""
    total = sum(header) - sum(header[148:156]) + 8 * 0x20
    if _number(header[148:156], path) != total:
        raise bad_description(path, "is no tar, or damaged: the checksum of a header is wrong", "copy it again")


def _number(field: bytes, path: str) -> int:
    """Octal digits, or GNU's base 256 for what is too large for them (above 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if digits and not re.fullmatch(rb"[0-7]{1,12}", digits):
        raise bad_description(path, "is damaged: a number in a header is none", "copy it again")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(value: bytes, path: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_description(path, "has a file whose name is no text", "pack it again") from error


class _Stopped(Exception):
    """Whoever waits for the archive has gone."""


class _Stoppable(io.BufferedReader):
    stop: Callable[[], bool] = staticmethod(lambda: False)

    def read(self, size: int | None = -1, /) -> bytes:
        if self.stop():
            raise _Stopped
        return super().read(size)


def write_archive(target: str, files: Sequence[tuple[str, str]], stop: Callable[[], bool]) -> None:
    """A new archive, mode 0600, with these files (name and path), in this order: descriptor, manifest, disks. OSError
    as writing fails; what is there of it is of no use once `stop` said yes."""
    with (
        open(target, "xb", opener=_private) as made,
        tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as archive,
        suppress(_Stopped),
    ):
        for name, path in files:
            member = tarfile.TarInfo(name)
            member.size = os.stat(path).st_size
            member.mode = 0o644
            with _Stoppable(io.FileIO(path)) as file:
                file.stop = stop
                archive.addfile(member, file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@dataclass(frozen=True, slots=True)
class Digest:
    """One line of a manifest. `algorithm` as hashlib calls it."""

    name: str
    algorithm: str
    value: str


_LINE = re.compile(r"(SHA1|SHA256|SHA512)\s*\(([^)\n]{1,255})\)\s*=\s*([0-9A-Fa-f]{40,128})")


def read_manifest(data: bytes, path: str) -> list[Digest]:
    """The lines of an OVF's manifest (`.mf`): `SHA256(disk1.vmdk)= 0f3a...`. InvalidInput for anything else in it."""
    found = []
    for line in data[: 1024 * 1024].decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise bad_description(path, f"has a line that is no digest: {line[:80]!r}")
        found.append(Digest(match[2].strip(), match[1].lower(), match[3].lower()))
    return found
