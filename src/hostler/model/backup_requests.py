"""What people and programs ask about backups. Directories are absolute paths on the host, made and read by it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.backup import BackupMode
from hostler.model.base import Input
from hostler.model.disk import DeviceId, ImageFormat
from hostler.model.requests import Name, Path

BackupRef = Annotated[str, StringConstraints(min_length=1, max_length=30, pattern=r"^[0-9A-Za-z-]+$")]
"""The id of a backup, or an unambiguous beginning of it."""


class WantedConsistency(StrEnum):
    """auto: application where a guest agent answers, else crash."""

    AUTO = "auto"
    APPLICATION = "application"
    CRASH = "crash"


class BackupRun(Input):
    """`rate`: bytes a second at most (0: as fast as it goes). `name`: for people."""

    directory: Path
    mode: BackupMode = BackupMode.AUTO
    consistency: WantedConsistency = WantedConsistency.AUTO
    rate: int = Field(default=0, ge=0)
    compress: bool = False
    name: Annotated[str, StringConstraints(max_length=200)] = ""


class BackupList(Input):
    """The backups in that directory (default: in every one this host has backed up to), of one VM (name or id) only."""

    directory: Path | None = None
    vm: Name | None = None


class BackupChoice(Input):
    """One backup."""

    directory: Path
    backup: BackupRef


class BackupExport(BackupChoice):
    """Serve one backup over NBD, for `timeout` seconds at most."""

    timeout: int = Field(default=3600, ge=1, le=7 * 86_400)


class BackupPrune(Input):
    """Keep the newest `keep` backups of each VM (or of one), and what they build on."""

    directory: Path
    keep: int = Field(ge=1)
    vm: Name | None = None


class BackupRestore(Input):
    """Exactly one of: `vm` (the name of a new VM), `replace` (the VM it was made of, which is off, goes back to it; its
    present volumes stay, detached), and `disk` with `volume` (one disk becomes a new volume of that name). `format` of
    the new volumes (default: as the disks were); `volumes`: the directory they go to (default: the host's)."""

    directory: Path
    backup: BackupRef
    vm: Name | None = None
    replace: bool = False
    disk: DeviceId | None = None
    volume: Name | None = None
    format: ImageFormat | None = None
    volumes: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.disk is None) != (self.volume is None):
            raise ValueError("give 'disk' and 'volume' together")
        if (self.vm is not None) + self.replace + (self.disk is not None) != 1:
            raise ValueError("give exactly one of 'vm', 'replace', and 'disk' with 'volume'")
        return self
