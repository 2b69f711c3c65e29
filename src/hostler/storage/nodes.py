"""A disk's layers as a block node for qemu-img, all read-only: every file is named here, and nothing that an image
refers to is opened beside them."""

from __future__ import annotations

from typing import Any

from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import InvalidInput
from hostler.storage.formats import QEMU_DRIVER


def read_node(source: DiskSource) -> dict[str, Any]:
    """The node through which the whole content of a disk is read. InvalidInput for a source that is no file here."""
    if source.kind is not SourceKind.VOLUME:
        raise InvalidInput(
            f"disk {source.path}", f"is a source of the kind '{source.kind}', not an image file", "copy it to a volume"
        )
    file = {"driver": "file", "filename": source.path, "read-only": True}
    if source.format is ImageFormat.VHD_FIXED:
        # Raw data before a footer: see decision 0005.
        return {"driver": "raw", "size": source.size, "read-only": True, "file": file}
    node: dict[str, Any] = {"driver": QEMU_DRIVER[source.format], "read-only": True, "file": file}
    if source.format is ImageFormat.QCOW2:
        node["backing"] = None if source.backing is None else read_node(source.backing)
    return node
