"""The block nodes of an export, as options of QMP's blockdev-add. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import JsonValue

from hostler.model.disk import CacheMode, Disk, SourceKind
from hostler.storage.formats import QEMU_DRIVER

IMAGE = "image"
PLACEHOLDER = "placeholder"
_ZEROES = "placeholder-zeroes"

_EIO = 5

Options = dict[str, JsonValue]


def options(disk: Disk, node: str) -> Sequence[Options]:
    """The nodes to add, in order, so that `node` is there."""
    return [_image(disk)] if node == IMAGE else _placeholder(disk)


def unwanted(want: str | None) -> Sequence[str]:
    """The nodes that have to go when `want` is exported, in the order in which they can."""
    return [n for n in (IMAGE, PLACEHOLDER, _ZEROES) if n != want and not (n == _ZEROES and want == PLACEHOLDER)]


def _image(disk: Disk) -> Options:
    # Said for both layers: a child does not take over what its parent's options say about discard.
    common: Options = {
        "cache": {"direct": disk.cache is CacheMode.NONE, "no-flush": False},
        "discard": "unmap" if disk.discard else "ignore",
        "read-only": not disk.writes,
    }
    device = disk.source.kind is SourceKind.DEVICE
    file: Options = {**common, "driver": "host_device" if device else "file", "filename": disk.source.path}
    file["locking"] = "on"
    return {**common, "node-name": IMAGE, "driver": QEMU_DRIVER[disk.source.format], "file": file}


def _placeholder(disk: Disk) -> Sequence[Options]:
    """Reads as zeroes, fails writes. A discard is dropped, as any discard may be."""
    zeroes: Options = {"node-name": _ZEROES, "driver": "null-co", "size": disk.source.size, "read-zeroes": True}
    failing: list[JsonValue] = [
        {"event": "none", "iotype": iotype, "errno": _EIO} for iotype in ("write", "write-zeroes")
    ]
    return [zeroes, {"node-name": PLACEHOLDER, "driver": "blkdebug", "image": _ZEROES, "inject-error": failing}]
