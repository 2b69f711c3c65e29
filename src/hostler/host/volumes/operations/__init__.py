"""The operations on volumes, one for each kind of job."""

from __future__ import annotations

from hostler.host.volumes.operations.base import VolumeOperation
from hostler.host.volumes.operations.looking import CHECKSUM, REPAIR, VALIDATE
from hostler.host.volumes.operations.making import CLONE, CONVERT
from hostler.host.volumes.operations.resizing import GROW, SHRINK
from hostler.host.volumes.operations.rewriting import COMPACT, REPLACE

VOLUME_OPERATIONS: dict[str, VolumeOperation] = {
    o.kind: o for o in (CHECKSUM, VALIDATE, REPAIR, GROW, SHRINK, REPLACE, COMPACT, CONVERT, CLONE)
}
