"""Which format an image file has, told from its content and never from its name.

An image is hostile input: whoever fills a disk fills its first sectors. Hence two rules. A file is probed once, when it
becomes known; afterwards its recorded format holds, since a guest can write a qcow2 header (with a backing file of its
choice) onto a disk that was raw. And an image that refers to another file is refused, whatever that file is.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import BadImage
from hostler.storage import footer as vhd
from hostler.storage import vhdx
from hostler.storage.files import open_regular

QEMU_DRIVER: dict[ImageFormat, str] = {
    ImageFormat.RAW: "raw",
    ImageFormat.QCOW2: "qcow2",
    ImageFormat.VHD: "vpc",
    ImageFormat.VHD_FIXED: "vpc",
    ImageFormat.VHDX: "vhdx",
}
SUFFIX: dict[ImageFormat, str] = {
    ImageFormat.RAW: ".raw",
    ImageFormat.QCOW2: ".qcow2",
    ImageFormat.VHD: ".vhd",
    ImageFormat.VHD_FIXED: ".vhd",
    ImageFormat.VHDX: ".vhdx",
}
_PROMISES = {".vhd", ".avhd", ".vhdx", ".avhdx", ".qcow2"}
"""Endings of names of which a file without any known content is more likely damaged than raw."""

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"QED\0", "QED"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
)
_QCOW = struct.Struct(">4sIQIIQIIQQ")
"""Magic, version, backing file offset and size, cluster bits, size, encryption, level 1 entries and offset, refcount
table offset (qemu's docs/interop/qcow2.txt)."""
_QCOW2_DATA_FILE = 0x4
_QCOW2_CORRUPT = 0x2
_FLATTEN = "flatten it first: qemu-img convert -O qcow2 IMAGE NEW, where the image comes from"


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image file is. `size`: bytes a guest sees; `allocated`: bytes it takes on the disk."""

    format: ImageFormat
    size: int
    allocated: int


def recognise(path: str, declared: ImageFormat | None = None, deep: bool = False, overlay: bool = False) -> Shape:
    """The format of a regular file, by content.

    `declared`: the user's (or our record's) word: for raw it is simply taken, every other one must agree with the
    content. `deep` also looks for lost blocks of a dynamic VHD. `overlay`: our record
    knows it as a layer on top of another one, so a qcow2 may name a backing file (which nobody follows). Raises
    NotFound, NotPermitted, InvalidInput (no regular file), BadImage (damaged, refers to other files, another format
    than declared, one we do not use). Reads at most a few MiB; call it in a thread.
    """
    fd = open_regular(path)
    try:
        size, allocated = _sizes(fd)
        if declared is ImageFormat.RAW:
            return Shape(declared, size, allocated)
        shape = _probe(fd, path, size, allocated, deep, overlay)
        if declared is None:
            return shape if shape.format is not ImageFormat.RAW else _raw_by_default(path, shape)
        if shape.format is not declared:
            raise _other_format(path, declared, shape.format)
        return shape
    except OSError as error:
        raise BadImage(f"image {path}", f"cannot be read: {error.strerror}", "look at the disk it is on") from error
    finally:
        os.close(fd)


def require_own_data(source: DiskSource) -> None:
    """BadImage if a qcow2 layer keeps its data in another file, which qemu-img would open as whoever we are. What is
    below a layer can be said to qemu-img; that there is no such file cannot, so this is asked again before each use of
    an image that a VM could write. Blocking."""
    for layer in source.layers():
        if layer.kind is SourceKind.VOLUME and layer.format is ImageFormat.QCOW2:
            recognise(layer.path, layer.format, overlay=True)


def _sizes(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_blocks * 512


def _probe(fd: int, path: str, size: int, allocated: int, deep: bool, overlay: bool) -> Shape:
    """By the marks at the start, then by the one at the end (fixed VHD)."""
    head = os.pread(fd, 4096, 0)
    if head.startswith(b"QFI\xfb"):
        return Shape(ImageFormat.QCOW2, _qcow2(fd, path, head, overlay), allocated)
    if head.startswith(vhdx.SIGNATURE):
        return Shape(ImageFormat.VHDX, _vhdx(fd, path), allocated)
    if head.startswith(vhd.COOKIE):
        return Shape(ImageFormat.VHD, _dynamic_vhd(fd, path, head, deep), allocated)
    _refuse_foreign(path, head)
    tail = os.pread(fd, vhd.SECTOR, size - vhd.SECTOR) if size >= vhd.SECTOR else b""
    if tail.startswith(vhd.COOKIE):
        return Shape(ImageFormat.VHD_FIXED, _fixed_vhd(path, tail, size), allocated)
    return Shape(ImageFormat.RAW, size, allocated)


def _qcow2(fd: int, path: str, head: bytes, overlay: bool) -> int:
    if len(head) < 72:
        raise _damaged(path, "qcow2", "its header is cut off")
    _, version, backing_at, backing_length, _, size, encryption, entries, table, counts = _QCOW.unpack_from(head)
    if version not in (2, 3):
        raise BadImage(f"image {path}", f"is qcow version {version}, not 2 or 3", _FLATTEN)
    features = struct.unpack_from(">Q", head, 72)[0] if version == 3 and len(head) >= 80 else 0
    if backing_at and not overlay:
        name = os.pread(fd, min(backing_length, 1023), backing_at) if backing_at < 2**62 else b""
        raise _refers(path, "backing file", name.decode("utf-8", "replace"))
    if features & _QCOW2_DATA_FILE:
        raise _refers(path, "external data file", "")
    if features & _QCOW2_CORRUPT:
        raise _damaged(path, "qcow2", "QEMU has marked it as corrupt")
    if encryption:
        raise BadImage(f"image {path}", "is an encrypted qcow2, which Hostler does not open", "decrypt it first")
    if max(table + entries * 8, counts) > os.fstat(fd).st_size:
        raise _damaged(path, "qcow2", "its tables are cut off")
    return int(size)


def _vhdx(fd: int, path: str) -> int:
    found = vhdx.parse(fd, path)
    if found.has_parent:
        raise _differencing(path, "VHDX (.avhdx)")
    return found.size


def _dynamic_vhd(fd: int, path: str, head: bytes, deep: bool) -> int:
    found = vhd.parse_footer(head)
    if found is None:
        raise _damaged(path, "VHD", "the checksum of its header is wrong")
    if found.kind == vhd.DiskType.DIFFERENCING:
        raise _differencing(path, "VHD (.avhd)")
    if found.kind != vhd.DiskType.DYNAMIC:
        raise _damaged(path, "VHD", f"its disk type is {found.kind}, where 3 (dynamic) is expected")
    if deep:
        vhd.check_blocks(fd, path, found)
    return found.size


def _fixed_vhd(path: str, tail: bytes, size: int) -> int:
    found = vhd.parse_footer(tail)
    if found is None:
        raise _damaged(path, "VHD", "the checksum of its footer is wrong")
    if found.kind == vhd.DiskType.DIFFERENCING:
        raise _differencing(path, "VHD (.avhd)")
    if found.kind != vhd.DiskType.FIXED:
        raise _damaged(path, "VHD", "it is a dynamic one that has lost its beginning")
    if found.size != size - vhd.SECTOR:
        raise _damaged(
            path, "VHD", f"its footer says {found.size} bytes, the file has {size - vhd.SECTOR} before the footer"
        )
    return found.size


def _refuse_foreign(path: str, head: bytes) -> None:
    for at, mark, name in _FOREIGN:
        if head[at : at + len(mark)] == mark:
            raise BadImage(
                f"image {path}",
                f"is a {name} image, which is not a format Hostler runs",
                "convert it: qemu-img convert -O qcow2 IMAGE NEW; or say that its format is raw if it is",
            )


def _raw_by_default(path: str, shape: Shape) -> Shape:
    ending = os.path.splitext(path)[1].lower()
    if ending in _PROMISES:
        raise BadImage(
            f"image {path}",
            f"is named {ending} but has no such content, so it is damaged or cut off",
            "restore it, or say that its format is raw if it is",
        )
    return shape


def _other_format(path: str, declared: ImageFormat, found: ImageFormat) -> BadImage:
    return BadImage(f"image {path}", f"has the content of {found}, not of {declared}", f"say {found}", found=str(found))


def _refers(path: str, what: str, name: str) -> BadImage:
    shown = f" {name!r}" if name else ""
    return BadImage(f"image {path}", f"refers to a {what}{shown}, and would read it as its own", _FLATTEN, refers=name)


def _differencing(path: str, what: str) -> BadImage:
    return BadImage(
        f"image {path}",
        f"is a differencing {what}: it holds the changes to a parent disk only",
        "make one whole disk of it and its parents (hostler volume flatten IMAGE NAME), or attach it read-only",
        differencing=True,
    )


def _damaged(path: str, what: str, cause: str) -> BadImage:
    return BadImage(f"image {path}", f"the {what} is damaged: {cause}", "restore it from a backup")
