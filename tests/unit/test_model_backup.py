"""What a backup builds on, what it is made of, and what may go: pure functions of manifests."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.backup import (
    BackedDisk,
    Backup,
    BackupMode,
    Tracking,
    backup_of_bitmap,
    bitmap_name,
    chain,
    choose,
    needed_by,
    plan_prune,
    require_unneeded,
    restorable,
)
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import BadImage, InUse, NotFound, WrongState
from hostler.testing.vm_variants import config

pytestmark = pytest.mark.unit

MIB = 1024**2
DISK = Disk(id="disk0", source=DiskSource(path="/a", format=ImageFormat.QCOW2, size=8 * MIB))


def ident(number: int) -> str:
    return f"20260101T000000Z-{number:08x}"


def backup(number: int, since: int | None = None, size: int = 8 * MIB, vm: str = "v") -> Backup:
    below = None if since is None else ident(since)
    disk = BackedDisk(id="disk0", size=size, format=ImageFormat.QCOW2, since=below, tracking=Tracking.PERSISTENT)
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return Backup(id=ident(number), vm=vm, vm_name="web", created=when, config=config(), disks=(disk,))


def by_id(*backups: Backup) -> dict[str, Backup]:
    return {b.id: b for b in backups}


def test_the_newest_backup_whose_changes_are_known_is_built_on() -> None:
    backups = [backup(1), backup(2, 1), backup(3)]
    known = [bitmap_name(ident(1)), bitmap_name(ident(2))]
    assert choose(DISK, BackupMode.AUTO, known, backups) == (ident(2), "")
    assert choose(DISK, BackupMode.FULL, known, backups) == (None, "asked for")


@pytest.mark.parametrize(
    ("backups", "reason"),
    [
        ([], "no backup of it"),
        ([backup(1)], "not known"),
        ([backup(1, size=16 * MIB)], "made smaller"),
        ([backup(2, 1)], "no backup of it"),
    ],
)
def test_what_is_not_known_is_copied_whole_and_says_why(backups: list[Backup], reason: str) -> None:
    below, why = choose(DISK, BackupMode.AUTO, [bitmap_name(ident(9))], backups)
    assert below is None
    assert reason in why
    with pytest.raises(WrongState, match=reason):
        choose(DISK, BackupMode.INCREMENTAL, [bitmap_name(ident(9))], backups)


def test_a_disk_that_has_grown_goes_on() -> None:
    larger = DISK.but(source=DISK.source.but(size=16 * MIB))
    assert choose(larger, BackupMode.AUTO, [bitmap_name(ident(1))], [backup(1)]) == (ident(1), "")


def test_a_chain_goes_down_to_the_whole_one() -> None:
    first, second, third = backup(1), backup(2, 1), backup(3, 2)
    found = chain(third, "disk0", by_id(first, second, third))
    assert [b.id for b, _ in found] == [ident(3), ident(2), ident(1)]


def test_a_missing_link_a_circle_and_another_vm_are_refused() -> None:
    third = backup(3, 2)
    with pytest.raises(NotFound, match=ident(2)):
        chain(third, "disk0", by_id(third))
    with pytest.raises(NotFound, match=ident(2)):
        chain(third, "disk0", by_id(third, backup(2, vm="other")))
    with pytest.raises(BadImage):
        chain(third, "disk0", by_id(third, backup(2, 3)))
    assert not restorable(third, by_id(third))
    with pytest.raises(NotFound):
        chain(third, "disk7", by_id(third))


def test_pruning_keeps_what_the_kept_ones_build_on() -> None:
    every = [backup(1), backup(2, 1), backup(3), backup(4, 3), backup(5, 4)]
    plan = plan_prune(every, 1)
    assert plan.remove == (ident(1), ident(2))
    assert plan.needed == {ident(4): ident(5), ident(3): ident(4)}
    assert plan_prune(every, 9).remove == ()


@given(st.lists(st.none() | st.integers(0, 30), max_size=30), st.integers(1, 31))
def test_pruning_never_breaks_a_chain(below: list[int | None], keep: int) -> None:
    every = [backup(n, b if b is not None and b < n else None) for n, b in enumerate(below)]
    gone = set(plan_prune(every, keep).remove)
    left = by_id(*(b for b in every if b.id not in gone))
    assert all(restorable(b, left) for b in left.values())
    assert len(left) >= min(keep, len(every))


def test_deleting_what_others_build_on_is_refused() -> None:
    every = [backup(1), backup(2, 1)]
    assert needed_by(ident(1), every) == (ident(2),)
    with pytest.raises(InUse, match=ident(2)):
        require_unneeded(ident(1), every)
    require_unneeded(ident(2), every)


def test_a_bitmap_names_its_backup() -> None:
    assert backup_of_bitmap(bitmap_name(ident(1))) == ident(1)
    assert backup_of_bitmap("somebody-else") is None
    assert backup_of_bitmap("hostler-since") is None
