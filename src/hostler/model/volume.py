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
from hostler.model.disk import ImageFormat, SourceKind


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

    `backing` is the path of the image it builds on, if any. `pool` is the pool it is in ("" for one at a path of its
    own). `owner` is the id of the VM it was made for and goes with (layers of checkpoints); None for one that stands
    alone. `generation` grows with each change of its content or size by a job: a job that comes late, or twice, is
    refused. `node` is the layer's token in its disk (see DiskSource); `kind` where it is; `identity` what a LUN calls
    itself.
    """

    name: str
    path: str
    format: ImageFormat
    size: int = Field(ge=0)
    allocated: int = Field(default=0, ge=0)
    backing: str | None = None
    kind: SourceKind = SourceKind.VOLUME
    pool: str = ""
    owner: str | None = None
    generation: int = 0
    node: str = ""
    identity: str = ""
    notes: str = ""
    made_by: str = ""
    """Id of the job that made it, "" where that is nobody's business: a job that is undone removes what it made itself,
    and nothing else of the same name."""
    job: str = ""
    """While it is being made: the job that goes on with that after a restart of the daemon; "" where nobody would."""
    state: VolumeState = VolumeState.READY
    created: datetime | None = None


class Claim(Record):
    """Who may open a volume or device, kept by real path so that two names of one file are one claim.

    Any number of readers, or exactly one writer; or any number of VMs that are `shared` on it: their guests agree among
    themselves who writes, by the LUN's persistent reservations. `generation` is the owner VM's generation when the
    claim was made: a later owner replaces an earlier one, never the other way round.
    """

    path: str
    vm: str
    disk: str
    write: bool
    generation: int
    shared: bool = False
