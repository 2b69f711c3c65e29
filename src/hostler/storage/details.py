"""A close look into an image: what its headers say beside its size. Reads headers only, some KiB.

Sources: qemu's docs/interop/qcow2.txt; Microsoft's "Virtual Hard Disk Image Format Specification" (2006); [MS-VHDX].
Everything is hostile input: texts are cut and cleaned, numbers shown as they are and used for nothing.
"""

from __future__ import annotations

import os
import struct
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage
from hostler.model.image import ImageBitmap, ImageSnapshot
from hostler.storage import footer as vhd
from hostler.storage import vhdx
from hostler.storage.files import open_regular

_VHD_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_QCOW2_DIRTY, _QCOW2_CORRUPT, _QCOW2_EXTENDED = 0x1, 0x2, 0x10
_QCOW2_LAZY = 0x1
_MAX_TEXT = 100
_MAX_LISTED = 1000
"""Snapshots or bitmaps shown; an image may claim to have 65,535."""
_LOGICAL_SECTOR = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F").bytes_le
_DISK_ID = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746").bytes_le

Fields = dict[str, Any]
"""Fields of an ImageDetails."""


def read_details(path: str, format: ImageFormat) -> Fields:
    """What the headers of an image say. It has been recognised before as this format. BadImage, NotFound. Blocking."""
    fd = open_regular(path)
    try:
        fields: Fields = {"file_size": os.fstat(fd).st_size}
        reader = {
            ImageFormat.QCOW2: _qcow2,
            ImageFormat.VHD: _vhd,
            ImageFormat.VHD_FIXED: _vhd,
            ImageFormat.VHDX: _vhdx,
        }.get(format)
        return fields | (reader(fd, path) if reader is not None else {})
    except OSError as error:
        raise BadImage(f"image {path}", f"cannot be read: {error.strerror}", "look at the disk it is on") from error
    finally:
        os.close(fd)


def from_qemu(found: Fields) -> Fields:
    """What `qemu-img info` adds: snapshots, and the details of a qcow2. It is text of the image as well."""
    data = (found.get("format-specific") or {}).get("data") or {}
    snapshots = tuple(_snapshot(s) for s in (found.get("snapshots") or [])[:_MAX_LISTED])
    bitmaps = tuple(
        ImageBitmap(
            name=_clean(b.get("name", "")),
            granularity=int(b.get("granularity", 0)),
            flags=tuple(_clean(f) for f in b.get("flags", ())),
        )
        for b in (data.get("bitmaps") or [])[:_MAX_LISTED]
    )
    fields: Fields = {"snapshots": snapshots, "bitmaps": bitmaps}
    if data.get("compression-type"):
        fields["compression"] = _clean(data["compression-type"])
    return fields


def _snapshot(found: Fields) -> ImageSnapshot:
    seconds = int(found.get("date-sec", 0))
    return ImageSnapshot(
        id=_clean(found.get("id", "")),
        name=_clean(found.get("name", "")),
        memory=max(0, int(found.get("vm-state-size", 0))),
        created=datetime.fromtimestamp(seconds, UTC) if 0 < seconds < 2**33 else None,
    )


def _qcow2(fd: int, path: str) -> Fields:
    head = os.pread(fd, 112, 0)
    if len(head) < 72:
        raise BadImage(f"image {path}", "its header is cut off", "restore it from a backup")
    version, cluster_bits = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">I", head, 20)[0]
    features, compatible = struct.unpack_from(">QQ", head, 72) if version >= 3 and len(head) >= 88 else (0, 0)
    extended = ", extended L2 entries" if features & _QCOW2_EXTENDED else ""
    warnings = []
    if version == 2:
        warnings.append("it is a qcow2 of version 2, which keeps neither dirty bitmaps nor zeroes: convert it")
    return {
        "subformat": f"version {version}{extended}",
        "block_size": 1 << cluster_bits if cluster_bits <= 32 else None,
        "dirty": bool(features & _QCOW2_DIRTY),
        "corrupt": bool(features & _QCOW2_CORRUPT),
        "lazy_refcounts": bool(compatible & _QCOW2_LAZY),
        "warnings": tuple(warnings),
    }


def _vhd(fd: int, path: str) -> Fields:
    size = os.fstat(fd).st_size
    head, tail = os.pread(fd, vhd.SECTOR, 0), os.pread(fd, vhd.SECTOR, max(0, size - vhd.SECTOR))
    block = head if vhd.parse_footer(head) is not None else tail
    found = vhd.parse_footer(block)
    if found is None:
        raise BadImage(f"image {path}", "has no footer", "restore it from a backup")
    seconds = struct.unpack_from(">I", block, 24)[0]
    major, minor = struct.unpack_from(">HH", block, 32)
    system = {b"Wi2k": "Windows", b"Mac ": "Macintosh"}.get(block[36:40], _clean(block[36:40].decode("latin-1")))
    cylinders, heads, sectors = struct.unpack_from(">HBB", block, 56)
    fields: Fields = {
        "subformat": {2: "fixed", 3: "dynamic", 4: "differencing"}.get(found.kind, f"type {found.kind}"),
        "creator": f"{_clean(block[28:32].decode('latin-1'))} {major}.{minor} on {system}",
        "image_created": _VHD_EPOCH + timedelta(seconds=seconds) if seconds else None,
        "identifier": str(uuid.UUID(bytes=block[68:84])),
        "geometry": (cylinders, heads, sectors),
        "sector_size": vhd.SECTOR,
        "dirty": bool(block[84]),
    }
    if found.kind != vhd.DiskType.FIXED:
        header = os.pread(fd, 40, found.table) if found.table < 2**62 else b""
        fields["block_size"] = struct.unpack_from(">I", header, 32)[0] if len(header) >= 36 else None
        if tail != head:
            fields["warnings"] = ("its two footers differ: its last writer did not close it",)
    return fields


def _vhdx(fd: int, path: str) -> Fields:
    log = _log_pending(fd)
    region = _metadata(fd)
    table = os.pread(fd, 64 * 1024, region)

    def item(wanted: bytes, length: int) -> bytes:
        found = vhdx.find(table, b"metadata", 32, wanted, "<II")
        value = os.pread(fd, length, region + found[0]) if found is not None else b""
        return value if len(value) == length else bytes(length)

    block_size, flags = struct.unpack("<II", item(vhdx.FILE_PARAMETERS, 8))
    creator = os.pread(fd, 512, 8).decode("utf-16-le", "replace").split("\0", 1)[0]
    return {
        "subformat": "differencing" if flags & vhdx.HAS_PARENT else "fixed" if flags & 0x1 else "dynamic",
        "block_size": block_size,
        "sector_size": int.from_bytes(item(_LOGICAL_SECTOR, 4), "little"),
        "identifier": str(uuid.UUID(bytes_le=item(_DISK_ID, 16))),
        "creator": _clean(creator),
        "log_pending": log,
        "dirty": log,
    }


def _log_pending(fd: int) -> bool:
    """Whether the newer of the two valid headers names a log ([MS-VHDX] 2.2.2: sequence number at 8, its id at 48)."""
    headers = [os.pread(fd, vhdx.HEADER, at) for at in vhdx.HEADERS_AT]
    valid = [header for header in headers if vhdx.is_header(header)]
    newest = max(valid, key=lambda header: int.from_bytes(header[8:16], "little"), default=bytes(64))
    return any(newest[48:64])


def _metadata(fd: int) -> int:
    for at in vhdx.REGIONS_AT:
        found = vhdx.find(os.pread(fd, 64 * 1024, at), b"regi", 16, vhdx.METADATA_REGION, "<QI")
        if found is not None and found[0] < 2**62:
            return int(found[0])
    return 0


def _clean(text: object) -> str:
    """Text of an image, safe to show."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_MAX_TEXT]).rstrip()
