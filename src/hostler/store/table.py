"""One kind of record in a store: its keys, its type, and the pieces of transactions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError

from hostler.model.base import Record
from hostler.model.errors import AlreadyExists, Busy, InternalError, NotFound
from hostler.store.contract import ABSENT, Check, CheckFailed, Delete, Entry, Put, Store, Transaction

T = TypeVar("T", bound=Record)


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """A record and the revision of its last change."""

    id: str
    value: T
    revision: int


class Table(Generic[T]):
    """Records of type `record` under "`noun`/"; `noun` ("vm") also names the object in errors."""

    def __init__(self, store: Store, noun: str, record: type[T]) -> None:
        self.store = store
        self.noun = noun
        self._record = record

    def key(self, id: str) -> str:
        """The store's key of that record."""
        return f"{self.noun}/{id}"

    async def find(self, id: str) -> Row[T] | None:
        """The record, None if there is none."""
        entry = await self.store.get(self.key(id))
        return self.row(entry) if entry else None

    async def get(self, id: str) -> Row[T]:
        """The record; NotFound if there is none."""
        row = await self.find(id)
        if row is None:
            raise self._not_found(id)
        return row

    async def list(self) -> Sequence[Row[T]]:
        """Every record, ordered by id."""
        return [self.row(entry) for entry in await self.store.list(self.key(""))]

    async def insert(self, id: str, value: T, durable: bool = False) -> int:
        """Store a new record; its revision. AlreadyExists if the id is taken."""
        try:
            return await self.store.commit(Transaction([self.put(id, value)], [self.absent(id)], durable))
        except CheckFailed as error:
            raise AlreadyExists(f"{self.noun} {id}", "exists already", "choose another one") from error

    async def replace(self, id: str, value: T, expected: int, durable: bool = False) -> int:
        """Store a changed record if it still has the revision `expected`; its new revision. Busy if somebody else was
        faster, NotFound if it is gone."""
        try:
            return await self.store.commit(Transaction([self.put(id, value)], [self.at(id, expected)], durable))
        except CheckFailed as error:
            raise await self._lost(id) from error

    async def delete(self, id: str, expected: int | None = None, durable: bool = False) -> None:
        """Delete it; with `expected` only if it still has that revision (Busy, NotFound otherwise)."""
        checks = [] if expected is None else [self.at(id, expected)]
        try:
            await self.store.commit(Transaction([self.remove(id)], checks, durable))
        except CheckFailed as error:
            raise await self._lost(id) from error

    def put(self, id: str, value: T) -> Put:
        """A write, for a transaction over several keys."""
        return Put(self.key(id), value.to_json())

    def remove(self, id: str) -> Delete:
        """A deletion, for a transaction over several keys."""
        return Delete(self.key(id))

    def absent(self, id: str) -> Check:
        """The check that there is no such record."""
        return Check(self.key(id), ABSENT)

    def at(self, id: str, revision: int) -> Check:
        """The check that the record still has that revision."""
        return Check(self.key(id), revision)

    def row(self, entry: Entry) -> Row[T]:
        """A store's entry as a record. InternalError when it is not one."""
        try:
            value = self._record.model_validate(entry.value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InternalError(
                f"record {entry.key}", f"cannot be read ({where}: {first['msg']})", "restore the state from a backup"
            ) from error
        return Row(entry.key.removeprefix(self.key("")), value, entry.revision)

    async def _lost(self, id: str) -> Busy | NotFound:
        if await self.store.get(self.key(id)) is None:
            return self._not_found(id)
        return Busy(f"{self.noun} {id}", "was changed by somebody else at the same moment", "look at it and try again")

    def _not_found(self, id: str) -> NotFound:
        return NotFound(f"{self.noun} {id}", "does not exist")
