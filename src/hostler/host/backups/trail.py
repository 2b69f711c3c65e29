"""What a host remembers of a VM's backups: in which directory the newest one is, and which bitmaps were begun for it.

A bitmap is of use as long as the newest backup of some directory is the one it began with; others are dropped at the
end of the next backup. Manifests, not this, say what there is: what stands here may be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostler.model.backup import bitmap_name
from hostler.model.base import Record
from hostler.store.contract import ABSENT, Check, CheckFailed, Put, Store, Transaction

SETS = 8
"""Directories of one VM whose newest backups are followed by a bitmap; the one not used for longest is given up."""
_TRIES = 20


class Trail(Record):
    """`newest`: backup id by directory, the last used one last. `bitmaps`: names begun and not dropped yet."""

    newest: dict[str, str] = {}
    bitmaps: tuple[str, ...] = ()


def _key(vm: str) -> str:
    return f"backup-trail/{vm}"


async def trail(store: Store, vm: str) -> Trail:
    """What is remembered of that VM."""
    entry = await store.get(_key(vm))
    return Trail.model_validate(entry.value) if entry else Trail()


async def directories(store: Store) -> Sequence[str]:
    """Every directory that some VM was backed up to."""
    found = {d for entry in await store.list("backup-trail/") for d in Trail.model_validate(entry.value).newest}
    return sorted(found)


async def note_bitmap(store: Store, vm: str, name: str) -> None:
    """It is about to begin."""
    await _change(store, vm, lambda t: t if name in t.bitmaps else t.but(bitmaps=(*t.bitmaps, name)))


async def forget_bitmap(store: Store, vm: str, name: str) -> None:
    """It is dropped."""
    await _change(store, vm, lambda t: t.but(bitmaps=tuple(b for b in t.bitmaps if b != name)))


async def note_backup(store: Store, vm: str, directory: str, backup_id: str) -> None:
    """This is the newest backup there."""

    def newest(found: Trail) -> Trail:
        others = {d: b for d, b in found.newest.items() if d != directory}
        while len(others) >= SETS:
            del others[next(iter(others))]
        return found.but(newest={**others, directory: backup_id})

    await _change(store, vm, newest)


async def stale_bitmaps(store: Store, vm: str) -> Sequence[str]:
    """Those that no backup will ask for."""
    found = await trail(store, vm)
    wanted = {bitmap_name(backup) for backup in found.newest.values()}
    return [name for name in found.bitmaps if name not in wanted]


async def _change(store: Store, vm: str, edit: Callable[[Trail], Trail]) -> None:
    for left in reversed(range(_TRIES)):
        entry = await store.get(_key(vm))
        before = Trail.model_validate(entry.value) if entry else Trail()
        after = edit(before)
        if after == before:
            return
        check = Check(_key(vm), entry.revision if entry else ABSENT)
        try:
            await store.commit(Transaction([Put(_key(vm), after.to_json())], [check]))
            return
        except CheckFailed:
            if not left:
                raise
