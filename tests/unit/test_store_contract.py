"""What every store keeps. Add an implementation to `OPENERS` and it is held to the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from hostler.store.contract import ABSENT, Change, Check, CheckFailed, Delete, Put, Store, Transaction
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.unit

OPENERS: dict[str, Callable[[Path], Awaitable[Store]]] = {
    "sqlite": lambda directory: SqliteStore.open(directory / "state" / "hostler.db"),
}


@pytest.fixture(params=sorted(OPENERS))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened = await OPENERS[request.param](tmp_path)
    yield opened
    await opened.close()


async def put(store: Store, key: str, durable: bool = False, **value: Any) -> int:
    return await store.commit(Transaction([Put(key, value)], durable=durable))


async def take(watch: AsyncIterator[Change], count: int) -> list[Change]:
    async with asyncio.timeout(60):
        return [await anext(watch) for _ in range(count)]


async def test_what_was_put_is_read_back_with_the_revision_of_its_commit(store: Store) -> None:
    first = await put(store, "vm/a", name="ä", size=2**60, none=None, deep={"list": [1, {"x": True}]})
    second = await put(store, "vm/b", durable=True)
    assert second > first > 0
    entry = await store.get("vm/a")
    assert entry is not None
    assert (entry.key, entry.revision) == ("vm/a", first)
    assert entry.value == {"name": "ä", "size": 2**60, "none": None, "deep": {"list": [1, {"x": True}]}}
    assert await store.get("vm") is None
    assert await store.get("vm/") is None


async def test_list_takes_the_prefix_and_orders_by_key(store: Store) -> None:
    for key in ("vm/ä", "vm/b", "vm/a/x", "vn/a", "v", "vm/a", "vm", "vm/\U0001f600"):
        await put(store, key)
    assert [e.key for e in await store.list("vm/")] == ["vm/a", "vm/a/x", "vm/b", "vm/ä", "vm/\U0001f600"]
    assert len(await store.list("")) == 8
    assert await store.list("nothing") == []


async def test_a_wildcard_in_a_key_is_only_a_character(store: Store) -> None:
    await put(store, "a%/x")
    await put(store, "ab/x")
    assert [e.key for e in await store.list("a%")] == ["a%/x"]
    assert await store.list("a_") == []


async def test_a_failed_check_writes_nothing_and_names_the_key(store: Store) -> None:
    revision = await put(store, "a", n=1)
    with pytest.raises(CheckFailed) as failed:
        await store.commit(
            Transaction([Put("b", {}), Delete("a")], [Check("a", revision), Check("a", ABSENT), Check("c", 7)])
        )
    assert failed.value.key == "a"
    with pytest.raises(CheckFailed) as failed:
        await store.commit(Transaction([Put("b", {})], [Check("a", revision), Check("c", 7)]))
    assert failed.value.key == "c"
    assert [e.key for e in await store.list("")] == ["a"]
    assert await store.commit(Transaction([Put("b", {})], [Check("a", revision), Check("b", ABSENT)])) == revision + 1


async def test_deleting_is_a_revision_of_its_own_and_never_reuses_one(store: Store) -> None:
    first = await put(store, "a")
    deleted = await store.commit(Transaction([Delete("a"), Delete("never-there")], [Check("a", first)]))
    again = await put(store, "a")
    assert first < deleted < again
    with pytest.raises(CheckFailed):
        await store.commit(Transaction([Delete("a")], [Check("a", first)]))


async def test_checks_without_writes_only_test(store: Store) -> None:
    revision = await put(store, "a")
    assert await store.commit(Transaction([], [Check("a", revision)])) == revision
    with pytest.raises(CheckFailed):
        await store.commit(Transaction([], [Check("a", ABSENT)]))


async def test_concurrent_compare_and_swap_loses_no_increment(store: Store) -> None:
    await put(store, "n", n=0)

    async def increment() -> None:
        while True:
            entry = await store.get("n")
            assert entry is not None and isinstance(entry.value["n"], int)
            change = Transaction([Put("n", {"n": entry.value["n"] + 1})], [Check("n", entry.revision)])
            try:
                await store.commit(change)
            except CheckFailed:
                continue
            return

    await asyncio.gather(*(increment() for _ in range(40)))
    entry = await store.get("n")
    assert entry is not None and entry.value == {"n": 40}


async def test_of_many_inserts_exactly_one_wins(store: Store) -> None:
    async def insert(n: int) -> bool:
        try:
            await store.commit(Transaction([Put("lock", {"n": n})], [Check("lock", ABSENT)]))
        except CheckFailed:
            return False
        return True

    assert sum(await asyncio.gather(*(insert(n) for n in range(30)))) == 1


async def test_a_watch_misses_nothing_and_keeps_the_order(store: Store) -> None:
    await put(store, "vm/before")
    async with aclosing(store.watch("vm/")) as watch:  # type: ignore[type-var]
        writes = [put(store, f"{'vm' if n % 2 else 'other'}/{n}", n=n) for n in range(100)]
        await asyncio.gather(*writes)
        gone = await store.commit(Transaction([Delete("vm/1"), Put("vm/z", {"z": 1})]))
        changes = await take(watch, 52)
    revisions = [c.revision for c in changes]
    assert revisions == sorted(revisions)
    assert {c.key for c in changes[:50]} == {f"vm/{n}" for n in range(1, 100, 2)}
    assert changes[50:] == [Change("vm/1", None, gone), Change("vm/z", {"z": 1}, gone)]


async def test_a_watch_begins_with_the_call_and_not_with_the_first_look(store: Store) -> None:
    watch = store.watch("")
    revision = await put(store, "a", n=1)
    assert await take(watch, 1) == [Change("a", {"n": 1}, revision)]


async def test_a_cancelled_writer_does_not_cost_the_watchers_a_change(store: Store) -> None:
    watch = store.watch("k/")
    tasks = [asyncio.create_task(put(store, f"k/{n}")) for n in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await put(store, "k/last")
    stored = {e.key for e in await store.list("k/")}
    assert {c.key for c in await take(watch, len(stored))} == stored


async def test_a_watcher_cannot_change_what_another_sees(store: Store) -> None:
    one, two = store.watch(""), store.watch("")
    await put(store, "a", n=1)
    (first,) = await take(one, 1)
    assert first.value == {"n": 1}
    (second,) = await take(two, 1)
    entry = await store.get("a")
    assert entry is not None
    assert second.value == entry.value == {"n": 1}


async def test_a_watcher_that_falls_too_far_behind_is_told(store: Store) -> None:
    slow, quick = store.watch("k/"), store.watch("other/")
    for start in range(0, 10_500, 500):
        await store.commit(Transaction([Put(f"k/{n}", {}) for n in range(start, start + 500)]))
    await put(store, "other/1")
    assert len(await take(quick, 1)) == 1
    with pytest.raises(CheckFailed) as failed:
        await take(slow, 1)
    assert failed.value.key == "k/"
    with pytest.raises(StopAsyncIteration):
        await anext(slow)


async def test_a_watcher_ten_thousand_behind_is_still_served(store: Store) -> None:
    slow = store.watch("k/")
    await store.commit(Transaction([Put(f"k/{n:05}", {}) for n in range(10_000)]))
    assert [c.key for c in await take(slow, 10_000)] == [f"k/{n:05}" for n in range(10_000)]


async def test_closing_ends_the_watches(store: Store) -> None:
    watch = store.watch("")
    waiting = asyncio.create_task(anext(watch, None))
    await asyncio.sleep(0)
    await store.close()
    async with asyncio.timeout(30):
        assert await waiting is None
    await store.close()


@pytest.mark.parametrize("opener", sorted(OPENERS))
async def test_entries_and_revisions_survive_a_restart(opener: str, tmp_path: Path) -> None:
    store = await OPENERS[opener](tmp_path)
    await put(store, "a", n=1)
    last = await put(store, "b")
    await store.close()
    store = await OPENERS[opener](tmp_path)
    assert [e.key for e in await store.list("")] == ["a", "b"]
    assert await put(store, "c") == last + 1
    await store.close()
