"""What people and programs ask of a disk that a VM has: bodies of the REST API. Sizes and rates in bytes."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from hostler.model.base import Input
from hostler.model.disk import CacheMode, ImageFormat, IoLimits
from hostler.model.pool import PoolName
from hostler.model.requests import Name, Path

Limit = Annotated[int, Field(ge=0, le=2**62)]
ImageRef = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]


class DiskMove(Input):
    """Copy a disk to another place and go on there. `to`: the path of the new image, or an existing directory, in which
    it is called like the old one; or `pool`: a pool of files. `format`: of the new image (left out: as it is; qcow2 for
    what was no image). `name`: of the volume afterwards (left out: its own). `limit`: bytes/s, 0: as fast as it goes.
    `keep_source`: the old image stays (one that is no volume of this host stays in any case)."""

    to: Path | None = None
    pool: PoolName | None = None
    format: ImageFormat | None = None
    name: Name | None = None
    limit: Limit = 0
    keep_source: bool = False

    @model_validator(mode="after")
    def _place(self) -> Self:
        if (self.to is None) == (self.pool is None):
            raise ValueError("give exactly one of 'to' and 'pool'")
        return self


class DiskFlatten(Input):
    """Copy all that a disk's lower layers hold into its top one, while the VM runs. `limit`: bytes/s, 0: as fast as it
    goes."""

    limit: Limit = 0


class DiskGrow(Input):
    """Make a disk larger. `size`: the new size in bytes, a multiple of 512."""

    size: int = Field(ge=512, le=2**62, multiple_of=512)


class DiskLimits(Input):
    """What a disk may do at most: operations and bytes per second, 0: unlimited, left out: as it is. A `..._burst` may
    be used for short peaks above the rate."""

    iops: Limit | None = None
    iops_read: Limit | None = None
    iops_write: Limit | None = None
    iops_burst: Limit | None = None
    bandwidth: Limit | None = None
    bandwidth_read: Limit | None = None
    bandwidth_write: Limit | None = None
    bandwidth_burst: Limit | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at least one limit; 0 takes one away")
        return self

    def over(self, limits: IoLimits) -> IoLimits:
        """These limits in place of those that were."""
        said = {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}
        return IoLimits.model_validate({**limits.model_dump(), **said})


class DiskMedium(Input):
    """Change the medium of a CD or floppy drive. `volume`: the name of a volume or the absolute path of an image; left
    out: the drive is emptied. `format` must be given for raw images that are not known volumes. `force`: also when the
    guest has locked the drive."""

    volume: ImageRef | None = None
    format: ImageFormat | None = None
    force: bool = False


class DiskChange(Input):
    """Fields left out stay as they are. A running VM must be restarted to see them."""

    cache: CacheMode | None = None
    discard: bool | None = None
    read_only: bool | None = None
    serial: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,36}$")] | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("nothing to change was given")
        return self
