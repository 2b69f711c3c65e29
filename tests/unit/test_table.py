"""Tables: records of one kind in a store, with errors that name what happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.model.base import Record
from hostler.model.errors import AlreadyExists, Busy, InternalError, NotFound
from hostler.store.contract import CheckFailed, Put, Transaction
from hostler.store.sqlite import SqliteStore
from hostler.store.table import Table

pytestmark = pytest.mark.unit


class Thing(Record):
    name: str
    size: int = 0


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Table[Thing]]:
    store = await SqliteStore.open(tmp_path / "state.db")
    yield Table(store, "thing", Thing)
    await store.close()


async def test_insert_get_replace_delete(things: Table[Thing]) -> None:
    first = await things.insert("a", Thing(name="a"))
    row = await things.get("a")
    assert (row.id, row.value, row.revision) == ("a", Thing(name="a"), first)
    second = await things.replace("a", Thing(name="a", size=1), first)
    assert (await things.get("a")).value.size == 1
    await things.delete("a", second)
    assert await things.find("a") is None
    assert await things.list() == []


async def test_what_cannot_be_done_is_said(things: Table[Thing]) -> None:
    revision = await things.insert("a", Thing(name="a"))
    with pytest.raises(AlreadyExists, match="thing a"):
        await things.insert("a", Thing(name="other"))
    await things.replace("a", Thing(name="b"), revision)
    with pytest.raises(Busy):
        await things.replace("a", Thing(name="c"), revision)
    with pytest.raises(Busy):
        await things.delete("a", revision)
    await things.delete("a")
    await things.delete("a")
    for attempt in (things.get("a"), things.replace("a", Thing(name="c"), revision), things.delete("a", revision)):
        with pytest.raises(NotFound):
            await attempt


async def test_only_its_own_records_are_listed(things: Table[Thing]) -> None:
    for name in ("b", "a", "a/b"):
        await things.insert(name, Thing(name=name))
    await things.store.commit(Transaction([Put("things/x", {}), Put("thing", {})]))
    assert [row.id for row in await things.list()] == ["a", "a/b", "b"]


async def test_pieces_make_one_transaction(things: Table[Thing]) -> None:
    revision = await things.insert("a", Thing(name="a"))
    move = [things.remove("a"), things.put("b", Thing(name="a"))]
    await things.store.commit(Transaction(move, [things.at("a", revision), things.absent("b")]))
    assert [row.id for row in await things.list()] == ["b"]
    with pytest.raises(CheckFailed):
        await things.store.commit(Transaction(move, [things.at("a", revision), things.absent("b")]))


async def test_a_record_of_a_newer_daemon_is_read_and_a_broken_one_is_named(things: Table[Thing]) -> None:
    await things.store.commit(
        Transaction([Put("thing/new", {"name": "x", "colour": "red"}), Put("thing/bad", {"size": 1})])
    )
    assert (await things.get("new")).value == Thing(name="x")
    with pytest.raises(InternalError, match="record thing/bad: cannot be read \\(name"):
        await things.get("bad")
