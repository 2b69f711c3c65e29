"""Volumes: storage objects that can become disks.

creating --> ready --> deleting --> (gone)
creating --fails, is cancelled--> (gone, no half-made file left)
ready --file is missing or damaged--> missing | damaged --is back, is repaired--> ready
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from hostler.model.base import Record
from hostler.model.disk import ImageFormat


class VolumeState(StrEnum):
    CREATING = "creating"
    READY = "ready"
    MISSING = "missing"
    DAMAGED = "damaged"
    DELETING = "deleting"


V = VolumeState
VOLUME_TRANSITIONS: dict[VolumeState, frozenset[VolumeState]] = {
    V.CREATING: frozenset({V.READY}),
    V.READY: frozenset({V.DELETING, V.MISSING, V.DAMAGED}),
    V.MISSING: frozenset({V.READY, V.DELETING}),
    V.DAMAGED: frozenset({V.READY, V.DELETING}),
    V.DELETING: frozenset({V.READY}),
}


class Volume(Record):
    """A named disk image known to this host. `size` is what a guest sees, `allocated` what the file takes now (bytes).
    `backing` is the path of the image it builds on, if any."""

    name: str
    path: str
    format: ImageFormat
    size: int = Field(ge=0)
    allocated: int = Field(default=0, ge=0)
    backing: str | None = None
    state: VolumeState = VolumeState.READY
    created: datetime | None = None


class Claim(Record):
    """Who may open a volume or device, kept by real path so that two names of one file are one claim.

    Any number of readers, or exactly one writer. `generation` is the owner VM's generation when the claim was made:
    a later owner replaces an earlier one, never the other way round.
    """

    path: str
    vm: str
    disk: str
    write: bool
    generation: int
