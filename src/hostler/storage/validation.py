"""Is an image sound? Our own look at its structure, then QEMU's; and putting right what can be put right.

QEMU checks qcow2 and VHDX only. Of a VHD, whose blocks nothing else protects, we check that no two lie over each other,
none over the tables, none outside of the file, and that both footers agree.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from array import array

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage
from hostler.model.image import Soundness, Verdict
from hostler.storage.chains.source import ImageFile
from hostler.storage.chains.vhd import VhdLayer, bitmap_size, open_vhd
from hostler.storage.details import read_details
from hostler.storage.files import open_regular
from hostler.storage.footer import SECTOR, DiskType, parse_footer
from hostler.storage.formats import recognise
from hostler.storage.qemu_img import QemuImg
from hostler.storage.waiting import in_thread

_UNUSED = 0xFFFFFFFF
_OURS, _QEMU = "hostler", "qemu-img"


async def validate(path: str, format: ImageFormat, image: QemuImg, repair: bool) -> Verdict:
    """Look at an image that nobody else uses. What is wrong with it is the verdict; NotFound, InUse, HostLacks and
    NotPermitted are raised, since they are not about its content."""
    try:
        await in_thread(f"image {path}", lambda: recognise(path, format, deep=True))
        findings = await in_thread(f"image {path}", lambda: _structure(path, format, repair))
    except BadImage as error:
        # QEMU may know how to mend a qcow2, but opens for writing what one refers to: as root, whatever that is.
        if not (format is ImageFormat.QCOW2 and repair) or "refers" in error.details:
            return Verdict(path=path, verdict=Soundness.DAMAGED, errors=1, findings=(error.cause,), checked_by=(_OURS,))
        findings = Findings([error.cause], errors=1)
    if format in (ImageFormat.QCOW2, ImageFormat.VHDX):
        return await _by_qemu(path, format, image, repair, findings)
    return findings.verdict(path, (_OURS,))


class Findings:
    """What is wrong, as sentences, and how much of it."""

    def __init__(self, texts: list[str] | None = None, errors: int = 0, mendable: int = 0, repaired: int = 0) -> None:
        self.texts = texts or []
        self.errors, self.mendable, self.repaired = errors, mendable, repaired

    def verdict(self, path: str, by: tuple[str, ...]) -> Verdict:
        found = Soundness.DAMAGED if self.errors else Soundness.REPAIRABLE if self.mendable else Soundness.SOUND
        return Verdict(
            path=path,
            verdict=found,
            errors=self.errors + self.mendable,
            repaired=self.repaired,
            findings=tuple(self.texts),
            checked_by=by,
        )


async def _by_qemu(path: str, format: ImageFormat, image: QemuImg, repair: bool, findings: Findings) -> Verdict:
    pending = format is ImageFormat.VHDX and bool(read_details(path, format)["log_pending"])
    if pending and not repair:
        text = "its last user did not close it: its log has to be replayed"
        return Verdict(path=path, verdict=Soundness.REPAIRABLE, errors=1, findings=(text,), checked_by=(_OURS,))
    try:
        check = await image.examine(path, format, "all" if repair else None)
    except BadImage as error:
        why = (*findings.texts, error.cause)
        return Verdict(path=path, verdict=Soundness.DAMAGED, errors=1, findings=why, checked_by=(_OURS, _QEMU))
    assert check is not None
    texts = list(findings.texts) if check.errors else []
    texts += [f"{check.errors} errors in its tables"] if check.errors else []
    texts += [f"{check.leaks} clusters take space and belong to nothing"] if check.leaks else []
    texts += ["its log was replayed"] if pending else []
    if check.errors:
        verdict = Soundness.DAMAGED if repair or format is ImageFormat.VHDX else Soundness.REPAIRABLE
    else:
        verdict = Soundness.LEAKS if check.leaks else Soundness.SOUND
    return Verdict(
        path=path,
        verdict=verdict,
        errors=check.errors,
        leaks=check.leaks,
        repaired=check.repaired + pending,
        findings=tuple(texts),
        checked_by=(_OURS, _QEMU),
    )


def _structure(path: str, format: ImageFormat, repair: bool) -> Findings:
    if format is not ImageFormat.VHD:
        return Findings()
    fd = open_regular(path)
    try:
        layer = open_vhd(ImageFile.of(fd, path))
        found = Findings(_blocks(fd, layer))
        found.errors = len(found.texts)
        head, tail = os.pread(fd, SECTOR, 0), os.pread(fd, SECTOR, layer.file.size - SECTOR)
    finally:
        os.close(fd)
    if head != tail and layer.kind is DiskType.DYNAMIC:
        _footers(path, head, tail, repair and not found.errors, found)
    return found


def _footers(path: str, head: bytes, tail: bytes, repair: bool, found: Findings) -> None:
    found.texts.append("its two footers differ: its last writer did not finish")
    if not repair:
        found.mendable += 1
        return
    # QEMU goes by the first. It is written last, so that what it says of the disk's size holds with either.
    good = head if parse_footer(head) is not None else tail
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if good is tail:
            os.pwrite(fd, good, 0)
        else:
            end = os.fstat(fd).st_size
            at = end - SECTOR if parse_footer(tail) is not None else end + -end % SECTOR
            os.pwrite(fd, good, at)
        os.fsync(fd)
    except OSError as error:
        raise BadImage(f"image {path}", f"cannot be written: {error.strerror}", "look at its disk") from error
    finally:
        os.close(fd)
    found.repaired += 1


def _blocks(fd: int, layer: VhdLayer) -> list[str]:
    """Blocks of a dynamic VHD that lie over each other or over what describes them."""
    length = bitmap_size(layer.block) + layer.block
    count = -(-layer.size // layer.block)
    table = array("I", os.pread(fd, count * 4, layer.table))
    if sys.byteorder == "little":
        table.byteswap()
    used = sorted((sector * SECTOR, index) for index, sector in enumerate(table) if sector != _UNUSED)
    header = struct.unpack(">Q", os.pread(fd, 24, 0)[16:24])[0]
    reserved = [(0, SECTOR), (header, header + 1024), (layer.table, layer.table + count * 4)]
    texts = []
    for (at, index), (following, other) in itertools.pairwise(used):
        if at + length > following:
            texts.append(f"blocks {index} and {other} lie over each other")
    for at, index in used:
        if any(at < end and at + length > start for start, end in reserved):
            texts.append(f"block {index} lies over the tables")
        if len(texts) > 20:
            return [*texts[:20], "and more"]
    return texts[:20]
