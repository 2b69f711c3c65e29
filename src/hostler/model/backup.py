"""Backups: copies of a VM's disks at one moment, in a directory of their own; and what follows from another.

    (nothing) --copied, then its manifest is written--> backup;  without a manifest there is no backup

Each disk of a backup is either whole or holds what changed since an older backup of the same VM (`since`): a chain,
which stands in the manifests and nowhere else. Pure: choosing, following and pruning chains are functions of manifests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from hostler.model.base import Record
from hostler.model.disk import DeviceId, Disk, ImageFormat, SourceKind
from hostler.model.errors import BadImage, InUse, NotFound, WrongState
from hostler.model.vm import VmConfig

BLOCK = 64 * 1024
"""Bytes of one block: what is copied or not, has one checksum, and is one cluster of the qcow2 file. It is also the
granularity of the bitmaps, QEMU's own default."""

MAX_CHAIN = 1000
"""Backups that may build on each other; a chain that is longer is taken for a circle."""

BackupId = Annotated[str, StringConstraints(pattern=r"^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}$")]
"""When it was made (UTC), down to the microsecond (five hexadecimal digits), and three random digits: names sort by
age."""

BITMAP = "hostler-"


class BackupMode(StrEnum):
    """auto: what changed where that is known, else the whole disk. incremental: refuse where it is not known."""

    AUTO = "auto"
    FULL = "full"
    INCREMENTAL = "incremental"


class Consistency(StrEnum):
    """crash: as after a power cut. application: the guest's file systems were frozen by its agent."""

    CRASH = "crash"
    APPLICATION = "application"


class Tracking(StrEnum):
    """How long what changes on a disk is noted. persistent: in the image (qcow2), unless a QEMU is killed.
    while-running: in QEMU's memory, until it ends. none: not at all."""

    PERSISTENT = "persistent"
    WHILE_RUNNING = "while-running"
    NONE = "none"


class BackedDisk(Record):
    """One disk of a backup. `since`: the backup it builds on (None: it is whole, `why` says why). `blocks`: how many
    blocks its file holds, `sums` the SHA-256 of the file of their checksums. `size` is what the guest sees, bytes."""

    id: DeviceId
    size: int = Field(ge=0)
    format: ImageFormat
    since: BackupId | None = None
    why: str = ""
    tracking: Tracking = Tracking.NONE
    blocks: int = Field(default=0, ge=0)
    stored: int = Field(default=0, ge=0)
    """Bytes its file has."""
    sums: str = ""


class Backup(Record):
    """A manifest. `config` is the VM as it was; `took` the seconds it took to copy."""

    version: int = 1
    id: BackupId
    vm: str
    vm_name: str
    host: str = ""
    name: str = ""
    created: datetime
    took: float = 0.0
    consistency: Consistency = Consistency.CRASH
    config: VmConfig
    disks: tuple[BackedDisk, ...]
    uefi_vars: str = ""
    """SHA-256 of its firmware's variables, which are beside the disks; "" where it has none."""
    left_out: tuple[str, ...] = ()
    """Disks of the VM that are not in it: read-only ones."""

    @property
    def full(self) -> bool:
        """Whether it needs no other backup."""
        return all(disk.since is None for disk in self.disks)

    @property
    def needs(self) -> frozenset[str]:
        """Ids of the backups it builds on directly."""
        return frozenset(disk.since for disk in self.disks if disk.since is not None)

    def disk(self, disk_id: str) -> BackedDisk | None:
        """The disk with that id."""
        return next((d for d in self.disks if d.id == disk_id), None)


class BackupView(Record):
    """A backup as people see it. `stored` in bytes; `restores`: whether everything it builds on is there."""

    id: str
    vm: str
    vm_name: str
    name: str = ""
    host: str = ""
    created: datetime
    took: float = 0.0
    full: bool
    consistency: Consistency
    directory: str
    stored: int
    size: int
    needs: tuple[str, ...] = ()
    needed_by: tuple[str, ...] = ()
    restores: bool = True
    disks: tuple[BackedDisk, ...] = ()


class PrunePlan(Record):
    """What goes, and what stays although it is old: backup id to the one that builds on it."""

    remove: tuple[str, ...]
    needed: dict[str, str] = {}


class Pruned(Record):
    """What was removed, or would be."""

    directory: str
    removed: tuple[str, ...] = ()
    needed: dict[str, str] = {}


def bitmap_name(backup_id: str) -> str:
    """The bitmap that notes what changes after this backup."""
    return BITMAP + backup_id


def backup_of_bitmap(name: str) -> str | None:
    """The backup after which that bitmap notes; None for one that is not ours."""
    found = name.removeprefix(BITMAP)
    return found if found != name and re.fullmatch(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}", found) else None


def to_back_up(config: VmConfig) -> tuple[Disk, ...]:
    """The disks whose content only this VM changes."""
    return tuple(d for d in config.disks if d.writes and d.source.kind is not SourceKind.EMPTY)


def choose(disk: Disk, mode: BackupMode, bitmaps: Iterable[str], backups: Sequence[Backup]) -> tuple[str | None, str]:
    """The backup this disk's copy builds on (the newest that its bitmaps know and the directory has), or None and why
    the whole disk is copied. `backups`: those of this VM in the directory. WrongState when that must not be."""
    if mode is BackupMode.FULL:
        return None, "asked for"
    known = frozenset(bitmaps)
    whole = {b.id: b for b in backups if restorable(b, {x.id: x for x in backups})}
    why = "no backup of it is in this directory"
    for backup in sorted(whole.values(), key=lambda b: b.id, reverse=True):
        former = backup.disk(disk.id)
        if former is None:
            continue
        if former.size > disk.source.size:
            why = "it was made smaller since its last backup"
            break
        if bitmap_name(backup.id) in known:
            return backup.id, ""
        why = "what changed since its last backup is not known" + _lost(former.tracking)
    if mode is BackupMode.INCREMENTAL:
        raise WrongState(f"disk {disk.id}", f"cannot be backed up by its changes: {why}", "back it up with --full")
    return None, why


def _lost(tracking: Tracking) -> str:
    if tracking is Tracking.WHILE_RUNNING:
        return ": for its format that is noted in memory only, and its QEMU has ended since"
    if tracking is Tracking.PERSISTENT:
        return ": its QEMU was killed, or the image was replaced, copied or changed by something else"
    return ""


def restorable(backup: Backup, backups: Mapping[str, Backup]) -> bool:
    """Whether everything that it builds on is there."""
    try:
        for disk in backup.disks:
            chain(backup, disk.id, backups)
    except (NotFound, BadImage):
        return False
    return True


def chain(backup: Backup, disk_id: str, backups: Mapping[str, Backup]) -> list[tuple[Backup, BackedDisk]]:
    """What that disk of the backup is made of, newest first; the last one is whole. NotFound for a missing link,
    BadImage for a circle."""
    found: list[tuple[Backup, BackedDisk]] = []
    at: Backup | None = backup
    while at is not None:
        disk = at.disk(disk_id)
        if disk is None:
            raise NotFound(f"disk {disk_id} of backup {at.id}", "is not in it", "see 'hostler backup show'")
        found.append((at, disk))
        if disk.since is None:
            return found
        if len(found) > MAX_CHAIN or disk.since in (b.id for b, _ in found):
            raise BadImage(f"backup {backup.id}", "builds on itself by its manifests", "use another backup")
        older = backups.get(disk.since)
        if older is None or older.vm != backup.vm:
            raise NotFound(
                f"backup {disk.since}", f"is missing, on which {at.id} builds", "bring it back, or use another backup"
            )
        at = older
    raise AssertionError("unreachable")


def needed_by(backup_id: str, backups: Iterable[Backup]) -> tuple[str, ...]:
    """The backups that build on this one directly."""
    return tuple(sorted(b.id for b in backups if backup_id in b.needs))


def plan_prune(backups: Sequence[Backup], keep: int) -> PrunePlan:
    """Keep the newest `keep` backups of one VM and whatever they build on."""
    by_id = {b.id: b for b in backups}
    newest = sorted(by_id, reverse=True)[:keep]
    stay: dict[str, str] = {}
    todo = list(newest)
    while todo:
        current = todo.pop()
        for below in by_id[current].needs:
            if below in by_id and below not in stay and below not in newest:
                stay[below] = current
                todo.append(below)
    gone = tuple(i for i in sorted(by_id) if i not in newest and i not in stay)
    return PrunePlan(remove=gone, needed=stay)


def require_unneeded(backup_id: str, backups: Iterable[Backup]) -> None:
    """InUse when another backup builds on this one."""
    users = needed_by(backup_id, backups)
    if users:
        raise InUse(
            f"backup {backup_id}",
            f"is what {', '.join(users[:3])}{' and others' if len(users) > 3 else ''} builds on",
            "delete those first, or everything old with 'hostler backup prune'",
            needed_by=list(users),
        )
