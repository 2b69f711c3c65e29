"""The operations on volumes, one for each kind of job."""

from __future__ import annotations

from hostler.host.volume_operations.base import VolumeOperation
from hostler.host.volume_operations.looking import CHECKSUM, REPAIR, VALIDATE
from hostler.host.volume_operations.making import CLONE, CONVERT
from hostler.host.volume_operations.resizing import GROW, SHRINK
from hostler.host.volume_operations.rewriting import COMPACT, REPLACE

VOLUME_OPERATIONS: dict[str, VolumeOperation] = {
    o.kind: o for o in (CHECKSUM, VALIDATE, REPAIR, GROW, SHRINK, REPLACE, COMPACT, CONVERT, CLONE)
}
