"""VMDK, as far as one is read to be converted: the sparse file of a single piece that OVF packages have.

VMware's "Virtual Disk Format 5.0" describes it. A VMDK may name other files: extents in its descriptor, and a parent.
QEMU would open them, so one that does is refused here, before QEMU sees it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from hostler.model.errors import BadImage
from hostler.storage.files import open_regular

MAGIC = b"KDMV"
SECTOR = 512
_HEADER = struct.Struct("<4sIIQQQQIQQQ?4sH")
"""Magic, version, flags, capacity, grain size, offset and size of the descriptor (sectors), entries of a grain table,
offsets of the spare and the used directory, overhead, unclean shutdown, line ends, compression."""
_MOST_DESCRIPTOR = 1024 * 1024
_KINDS = ("monolithicSparse", "streamOptimized")
_ACCESS = ("RW", "RDONLY", "NOACCESS")
"""How the line of an extent begins; its size and kind follow."""
_ADVICE = "convert it to one file where it comes from: qemu-img convert -O vmdk -o subformat=streamOptimized IMAGE NEW"


@dataclass(frozen=True, slots=True)
class Vmdk:
    """`size`: bytes a guest sees; `compressed`: whether what it holds may be larger than its file."""

    size: int
    compressed: bool


def inspect_vmdk(path: str, offset: int = 0, length: int | None = None) -> Vmdk:
    """Look at a VMDK, also one inside another file (`length` bytes from `offset`). BadImage when it is none, is
    damaged, or refers to other files. Reads at most 1 MiB; call it in a thread."""
    fd = open_regular(path)
    try:
        end = os.fstat(fd).st_size
        size = end - offset if length is None else length
        return _parse(fd, path, offset, min(size, end - offset))
    except OSError as error:
        raise BadImage(f"image {path}", f"cannot be read: {error.strerror}", "look at the disk it is on") from error
    finally:
        os.close(fd)


def is_vmdk(head: bytes) -> bool:
    """Whether a file that begins so is one, of either kind."""
    return head.startswith((MAGIC, b"# Disk DescriptorFile"))


def _parse(fd: int, path: str, offset: int, length: int) -> Vmdk:
    header = os.pread(fd, SECTOR, offset)
    if header.startswith(b"# Disk DescriptorFile"):
        raise BadImage(f"image {path}", "is a VMDK whose data is in other files, which it names", _ADVICE)
    if len(header) < SECTOR or not header.startswith(MAGIC):
        raise BadImage(f"image {path}", "is no VMDK", "check what kind of image it is")
    _, version, flags, capacity, _, text_at, text_size, *_, compression = _HEADER.unpack_from(header)
    if version not in (1, 2, 3):
        raise BadImage(f"image {path}", f"is a VMDK of version {version}, which is not known", _ADVICE)
    # With no capacity QEMU takes the descriptor's word for everything, and with it the extents it names.
    if not 0 < capacity < 2**54 or text_at == 0 or text_size == 0:
        raise BadImage(f"image {path}", "is a VMDK whose header says nothing of its size or content", _ADVICE)
    if text_size * SECTOR > _MOST_DESCRIPTOR or (text_at + text_size) * SECTOR > length:
        raise BadImage(f"image {path}", "the VMDK is damaged: its descriptor is not inside it", "copy it again")
    text = os.pread(fd, text_size * SECTOR, offset + text_at * SECTOR).split(b"\0", 1)[0].decode("utf-8", "replace")
    _check_descriptor(path, text)
    return Vmdk(size=capacity * SECTOR, compressed=bool(flags & 0x10000) or compression != 0)


def _check_descriptor(path: str, text: str) -> None:
    """By plain splitting: what a hostile descriptor can do to a regular expression holds up the whole daemon."""
    said: dict[str, str] = {}
    extents: list[str] = []
    for line in text.splitlines():
        words = line.split(None, 3)
        if words and words[0].upper() in _ACCESS:
            extents.append(words[2].upper() if len(words) > 2 else "")
            continue
        key, mark, value = line.partition("=")
        if mark:
            said[key.strip().lower()] = value.strip().strip('"')
    if "parentfilenamehint" in text.lower() or said.get("parentcid", "ffffffff").lower() != "ffffffff":
        raise BadImage(f"image {path}", "is a VMDK that holds the changes to a parent only", _ADVICE)
    kind = said.get("createtype", "")
    if kind not in _KINDS or len(extents) > 1 or any(form != "SPARSE" for form in extents):
        raise BadImage(f"image {path}", f"is a VMDK of the kind {kind[:40]!r} with {len(extents)} extents", _ADVICE)
