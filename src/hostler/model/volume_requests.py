"""What people ask for a volume that is there: the bodies of the REST API, used as they are by the client and the CLI.
Sizes in bytes."""

from __future__ import annotations

from pydantic import Field

from hostler.model.base import Input


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
