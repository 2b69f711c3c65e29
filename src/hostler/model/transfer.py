"""What people ask for when a machine comes in from elsewhere, or goes out. Sizes in bytes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from hostler.model.base import Input, Record
from hostler.model.disk import ImageFormat
from hostler.model.requests import Name, Path
from hostler.model.vm import Firmware

NetworkChoice = Annotated[str, StringConstraints(pattern=r"^(user|none|bridge:[A-Za-z0-9_.-]{1,15})$")]
"""What an adapter is connected to: `user`, `none` or `bridge:NAME`."""


class ImportRequest(Input):
    """A machine to import, or to look at before. Paths are on the host.

    `path`: an exported folder, a description (.xml, .exp, .vmcx, .ovf, .ova, vm.json) or a disk image. Its images are
    copied into new volumes of `format`, in `directory` (default: the host's), or with `in_place` become volumes where
    they are, if Hostler runs their format. `search`: more directories with images. `checkpoint`: name or id of the
    snapshot to import instead of the present state.

    `networks`: by the name of the network it was connected to there, what an adapter is connected to here; `network`:
    for those that are not named (default: nothing is plugged in).
    """

    path: Path
    name: Name | None = None
    format: ImageFormat | None = None
    directory: Path | None = None
    in_place: bool = False
    search: tuple[Path, ...] = Field(default=(), max_length=32)
    checkpoint: str | None = Field(default=None, max_length=300)
    networks: dict[str, NetworkChoice] = Field(default={}, max_length=64)
    network: NetworkChoice | None = None
    new_macs: bool = False
    """Give the adapters new MAC addresses: for a copy of a machine that goes on living."""
    keep_id: bool = False
    """Take over the id, so that it is the same VM (our own folders only)."""
    skip_missing: bool = False
    """Leave disks out whose image is not there."""
    raw: bool = False
    """Take images without any known header as raw."""
    vcpus: int | None = Field(default=None, ge=1)
    memory: int | None = Field(default=None, ge=1024**2)
    firmware: Firmware | None = None


class ExportForm(StrEnum):
    FOLDER = "folder"
    """Our own: vm.json, the disks, manifest.sha256. Nothing is lost."""
    OVF = "ovf"
    OVA = "ova"


class ExportRequest(Input):
    """A VM to write to `directory` (absolute, on the host), in a new folder or file named like the VM. `format` of the
    disks in a folder of our own (default: as they are); OVF and OVA have VMDK."""

    directory: Path
    form: ExportForm = ExportForm.FOLDER
    format: ImageFormat | None = None


class ExportReport(Record):
    """What an export writes, or has written. `size`: bytes, an upper bound beforehand. `lost`: what the form has no
    words for."""

    vm: str
    form: ExportForm
    path: str
    files: tuple[str, ...] = ()
    size: int = 0
    lost: tuple[str, ...] = ()
