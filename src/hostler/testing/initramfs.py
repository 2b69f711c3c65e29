"""The parts of an initramfs, as values: which kernel modules in which order, and the archive the kernel unpacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the archive. `mode` holds the permission bits."""

    path: str
    content: bytes
    mode: int = 0o644


def parse_modules_dep(text: str) -> dict[str, list[str]]:
    """`modules.dep` of a kernel: each module's path to the paths it needs, as depmod orders them (needs last first)."""
    depends: dict[str, list[str]] = {}
    for line in text.splitlines():
        module, colon, needs = line.partition(":")
        if colon:
            depends[module.strip()] = needs.split()
    return depends


def load_order(names: Sequence[str], depends: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths of the named modules and of all they need, each after what it needs.

    A name without a module is left out: it is built into that kernel, or the kernel has not got it.
    """
    by_name = {PurePosixPath(path).name.split(".")[0].replace("-", "_"): path for path in depends}
    order: list[str] = []
    for name in names:
        path = by_name.get(name.replace("-", "_"))
        if path is not None:
            wanted = [*reversed(depends[path]), path]
            order.extend(module for module in wanted if module not in order)
    return order


def archive(members: Iterable[Member]) -> bytes:
    """A cpio archive in the "newc" format (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

    Everything belongs to root and carries no time, so the same members give the same bytes.
    """
    parts: list[bytes] = []
    made: set[str] = set()
    number = 0
    for member in members:
        for parent in reversed(PurePosixPath(member.path).parents):
            directory = str(parent)
            if directory not in (".", *made):
                made.add(directory)
                number += 1
                parts.append(_entry(directory, b"", 0o040755, number))
        number += 1
        parts.append(_entry(member.path, member.content, 0o100000 | member.mode, number))
    parts.append(_entry("TRAILER!!!", b"", 0, 0))
    return b"".join(parts)


def _entry(path: str, content: bytes, mode: int, inode: int) -> bytes:
    name = path.encode() + b"\0"
    #         inode  mode  uid gid links mtime size          device x2  rdev x2  name size  checksum
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % value for value in fields)
    return _padded(header + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
