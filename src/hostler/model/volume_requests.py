"""What people ask for a volume that is there: the bodies of the REST API, used as they are by the client and the CLI.
Sizes in bytes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from hostler.model.base import Input
from hostler.model.disk import ImageFormat
from hostler.model.pool import PoolName
from hostler.model.requests import Name, Path


class VolumeValidate(Input):
    """`repair`: put right what can be: lost space and counts of a qcow2, the log of a VHDX, the footers of a VHD."""

    repair: bool = False


class VolumeGrow(Input):
    """`size`: what a guest will see, more than now."""

    size: int = Field(ge=512)


class VolumeShrink(Input):
    """`size`: what a guest will see, less than now. Refused while a partition or anything but zeroes lies behind it,
    unless `discard_data` says that this may be lost. `dry_run`: only look."""

    size: int = Field(ge=512)
    discard_data: bool = False
    dry_run: bool = False


class VolumeConvert(Input):
    """A volume in another format: a new one of that `name` (at `path`, or in `pool`), or with `replace` in its own
    place; then `path` moves it there, and it keeps its name. Its file gets the format's usual ending."""

    format: ImageFormat
    name: Name | None = None
    replace: bool = False
    path: Path | None = None
    pool: PoolName | None = None

    @model_validator(mode="after")
    def _which(self) -> Self:
        if (self.name is None) != self.replace:
            raise ValueError("give the 'name' of a new volume, or 'replace'")
        if self.pool is not None and (self.path is not None or self.replace):
            raise ValueError("'pool' is for a new volume without a 'path'")
        return self


class VolumeCompact(Input):
    """`in_place`: make holes in the file instead of writing a new one, which needs no space; the file stays as long as
    it is. Raw images and VHDs are always compacted in place."""

    in_place: bool = False


class VolumeClone(Input):
    """A copy under a new name, at `path` or in `pool`; it shares its blocks with the original where the file system can
    do that."""

    name: Name
    path: Path | None = None
    pool: PoolName | None = None

    @model_validator(mode="after")
    def _place(self) -> Self:
        if self.path is not None and self.pool is not None:
            raise ValueError("give 'pool' or 'path', not both")
        return self
