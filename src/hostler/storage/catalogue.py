"""The records of volumes: by name, and by path, so that one file never is two volumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hostler.model.errors import AlreadyExists, Busy, NotFound
from hostler.model.names import nearest
from hostler.model.volume import Volume
from hostler.store.contract import ABSENT, Check, CheckFailed, Delete, Put, Store, Transaction
from hostler.store.table import Row, Table


class Catalogue:
    """Volume records in a store. Paths in it are free of symbolic links (the last component may not exist yet)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._table = Table(store, "volume", Volume)

    async def rows(self) -> Sequence[Row[Volume]]:
        """Every record, ordered by name."""
        return await self._table.list()

    async def find(self, ref: str) -> Row[Volume] | None:
        """The record with that name or (absolute) path."""
        if not ref.startswith("/"):
            return await self._table.find(ref)
        entry = await self._store.get(_path_key(os.path.realpath(ref)))
        return await self._table.find(str(entry.value["name"])) if entry else None

    async def get(self, ref: str) -> Row[Volume]:
        """The same, NotFound with the nearest name if there is none."""
        row = await self.find(ref)
        if row is None:
            near = nearest(ref, [r.id for r in await self._table.list()])
            advice = f"did you mean {near!r}?" if near else "list the known ones with 'hostler volume list'"
            raise NotFound(f"volume {ref}", "there is no such volume on this host", advice)
        return row

    async def add(self, volume: Volume) -> Row[Volume]:
        """A new record. AlreadyExists when its name or path is taken."""
        try:
            revision = await self._store.commit(self.plan_add(volume))
        except CheckFailed as error:
            raise await self._taken(volume, by_path=error.key == _path_key(volume.path)) from error
        return Row(volume.name, volume, revision)

    async def change(self, row: Row[Volume], volume: Volume) -> Row[Volume]:
        """Write a changed record; its name and path stay. Busy when somebody else changed it."""
        return Row(row.id, volume, await self._table.replace(row.id, volume, row.revision))

    async def rename(self, row: Row[Volume], name: str) -> Row[Volume]:
        """Give a record another name; everything else of it stays. AlreadyExists when the name is taken, Busy when
        somebody else changed the record."""
        volume = row.value.but(name=name)
        checks = [self._table.absent(name), self._table.at(row.id, row.revision)]
        writes: list[Put | Delete] = [
            self._table.remove(row.id),
            self._table.put(name, volume),
            Put(_path_key(volume.path), {"name": name}),
        ]
        try:
            return Row(name, volume, await self._store.commit(Transaction(writes, checks)))
        except CheckFailed as error:
            if await self._table.find(name) is not None:
                raise AlreadyExists(f"volume {name}", "there is a volume with that name", "choose another") from error
            raise Busy(f"volume {row.id}", "was changed by somebody else", "try again") from error

    def plan_add(self, volume: Volume) -> Transaction:
        """The transaction that adds it; CheckFailed when its name or path is taken."""
        checks = [self._table.absent(volume.name), Check(_path_key(volume.path), ABSENT)]
        return Transaction(
            [self._table.put(volume.name, volume), Put(_path_key(volume.path), {"name": volume.name})], checks
        )

    def plan_change(self, row: Row[Volume], volume: Volume) -> Transaction:
        """The transaction that changes it."""
        return Transaction([self._table.put(row.id, volume)], [self._table.at(row.id, row.revision)])

    def plan_move(self, row: Row[Volume], volume: Volume) -> Transaction:
        """The transaction that changes it and gives it another path. CheckFailed at its commit also when that is taken
        meanwhile."""
        leave, enter = Delete(_path_key(row.value.path)), Put(_path_key(volume.path), {"name": row.id})
        checks = [self._table.at(row.id, row.revision), Check(_path_key(volume.path), ABSENT)]
        return Transaction([self._table.put(row.id, volume), leave, enter], checks)

    def plan_remove(self, row: Row[Volume]) -> Transaction:
        """The transaction that forgets it."""
        writes = [self._table.remove(row.id), Delete(_path_key(row.value.path))]
        return Transaction(writes, [self._table.at(row.id, row.revision)])

    async def _taken(self, volume: Volume, by_path: bool) -> AlreadyExists:
        if not by_path:
            return AlreadyExists(f"volume {volume.name}", "there is a volume with that name", "choose another name")
        entry = await self._store.get(_path_key(volume.path))
        name = str(entry.value["name"]) if entry else "another one"
        return AlreadyExists(f"file {volume.path}", f"is volume {name!r} already", f"use {name!r}", volume=name)


def real_target(path: str) -> str:
    """`path` with its directory free of symbolic links; the last component is kept, it may be new."""
    return str(Path(os.path.realpath(os.path.dirname(path))) / os.path.basename(path))


def _path_key(path: str) -> str:
    return f"volume-path/{path}"
