"""Claims: one writer or many readers, whatever the names, whoever races."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import InUse, NotFound, WrongState
from hostler.storage.claims import ClaimBook, real_path
from hostler.store.contract import CheckFailed, Put, Transaction
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.unit


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
def book(store: SqliteStore) -> ClaimBook:
    return ClaimBook(store, {"a": "web", "b": "db"}.get)  # type: ignore[arg-type]


def disk(path: str | Path, id: str = "d0", read_only: bool = False) -> Disk:
    return Disk(id=id, source=DiskSource(path=str(path)), read_only=read_only)


async def test_one_writer_and_its_name_in_the_refusal(book: ClaimBook) -> None:
    await book.claim("a", [disk("/srv/x", "d7")], 1)
    for other in (disk("/srv/x"), disk("/srv/x", read_only=True)):
        with pytest.raises(InUse, match="disk d7 of VM web") as refused:
            await book.claim("b", [other], 1)
        assert refused.value.details == {"holder": "a", "disk": "d7"}
    await book.release("a")
    await book.claim("b", [disk("/srv/x")], 1)


async def test_many_readers_but_no_writer_beside_them(book: ClaimBook) -> None:
    for vm in "abc":
        await book.claim(vm, [disk("/srv/x", read_only=True)], 1)
    with pytest.raises(InUse):
        await book.claim("d", [disk("/srv/x")], 1)
    assert [c.vm for c in await book.on("/srv/x")] == ["a", "b", "c"]
    await book.release("b")
    assert [c.vm for c in await book.on("/srv/x")] == ["a", "c"]


async def test_all_or_nothing(book: ClaimBook, store: SqliteStore) -> None:
    await book.claim("a", [disk("/srv/y")], 1)
    before = await store.list("")
    with pytest.raises(InUse):
        await book.claim("b", [disk("/srv/x", "d0"), disk("/srv/y", "d1"), disk("/srv/z", "d2")], 1)
    assert await store.list("") == before


async def test_claiming_again_changes_nothing_and_adds_what_is_new(book: ClaimBook) -> None:
    await book.claim("a", [disk("/srv/x")], 1)
    assert (await book.plan_claim("a", [disk("/srv/x")], 1)).writes == []
    await book.claim("a", [disk("/srv/x")], 1)
    await book.claim("a", [disk("/srv/y", "d1")], 1)
    assert [(c.path, c.disk) for c in await book.of("a")] == [("/srv/x", "d0"), ("/srv/y", "d1")]
    await book.release("a", ["d0"])
    assert [c.disk for c in await book.of("a")] == ["d1"]
    assert await book.on("/srv/x") == ()


async def test_one_vm_cannot_write_one_file_through_two_disks(book: ClaimBook) -> None:
    with pytest.raises(InUse):
        await book.claim("a", [disk("/srv/x", "d0"), disk("/srv/x", "d1")], 1)
    await book.claim("a", [disk("/srv/x", "d0", read_only=True), disk("/srv/x", "d1", read_only=True)], 1)
    await book.release("a", ["d0"])
    assert [c.disk for c in await book.of("a")] == ["d1"]


async def test_a_later_owner_replaces_an_earlier_one_and_never_the_other_way(book: ClaimBook) -> None:
    await book.claim("a", [disk("/srv/x")], 1)
    await book.claim("a", [disk("/srv/x")], 3)
    assert [c.generation for c in await book.on("/srv/x")] == [3]
    with pytest.raises(WrongState):
        await book.claim("a", [disk("/srv/x")], 2)
    with pytest.raises(InUse):
        await book.claim("b", [disk("/srv/x")], 9)


async def test_two_names_of_one_file_are_one_claim(book: ClaimBook, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/y").symlink_to("x")
    await book.claim("a", [disk(tmp_path / "real/x")], 1)
    for name in ("link/x", "real/y", "link/../real/./x", "link/y"):
        with pytest.raises(InUse):
            await book.claim("b", [disk(tmp_path / name)], 1)
    await book.release("a")
    (tmp_path / "real/x").unlink()
    await book.claim("b", [disk(tmp_path / "link/x")], 1)


@pytest.mark.skipif(not Path("/dev/loop0").is_block_device(), reason="no block device to look at")
async def test_a_device_is_claimed_by_its_number(book: ClaimBook, tmp_path: Path) -> None:
    number = os.stat("/dev/loop0").st_rdev
    assert real_path("/dev/loop0") == f"device:{os.major(number)}:{os.minor(number)}"
    (tmp_path / "by-name").symlink_to("/dev/loop0")
    await book.claim("a", [disk("/dev/loop0")], 1)
    with pytest.raises(InUse) as refused:
        await book.claim("b", [disk(tmp_path / "by-name")], 1)
    assert refused.value.object == f"volume {tmp_path}/by-name", "as its asker called it, not by a number"


async def test_a_plan_is_committed_together_with_other_records(book: ClaimBook, store: SqliteStore) -> None:
    plan = await book.plan_claim("a", [disk("/srv/x")], 1)
    rival = await book.plan_claim("b", [disk("/srv/x")], 1)
    await store.commit(Transaction([*plan.writes, Put("vm/a", {})], plan.checks, plan.durable))
    with pytest.raises(CheckFailed):
        await store.commit(Transaction([*rival.writes, Put("vm/b", {})], rival.checks))
    assert await store.get("vm/b") is None
    with pytest.raises(InUse):
        await book.plan_claim("b", [disk("/srv/x")], 1)


async def test_of_many_rivals_one_wins_and_readers_all_do(book: ClaimBook) -> None:
    async def attempt(vm: str, path: str, read_only: bool) -> bool:
        try:
            await book.claim(vm, [disk(path, read_only=read_only)], 1)
        except InUse:
            return False
        return True

    assert sum(await asyncio.gather(*(attempt(f"w{n}", "/srv/x", False) for n in range(12)))) == 1
    assert all(await asyncio.gather(*(attempt(f"r{n}", "/srv/y", True) for n in range(12))))
    assert len(await book.on("/srv/y")) == 12


async def test_what_is_kept_for_deletion_is_open_to_nobody(book: ClaimBook, store: SqliteStore) -> None:
    await book.claim("a", [disk("/srv/x", read_only=True)], 1)
    with pytest.raises(InUse):
        await book.plan_keep("/srv/x")
    await book.release("a")
    await store.commit(await book.plan_keep("/srv/x"))
    for read_only in (True, False):
        with pytest.raises(NotFound, match="being deleted"):
            await book.claim("a", [disk("/srv/x", read_only=read_only)], 1)
    await store.commit(await book.plan_keep("/srv/x"))
    await store.commit(Transaction([book.drop_keep("/srv/x")]))
    await book.claim("a", [disk("/srv/x")], 1)


async def test_releasing_leaves_no_trace(book: ClaimBook, store: SqliteStore) -> None:
    await book.claim("a", [disk("/srv/x"), disk("/srv/y", "d1")], 1)
    await book.release("a")
    await book.release("a")
    await book.release("never-seen")
    assert await store.list("") == []


Step = tuple[str, int, bool, bool]


@settings(max_examples=40)
@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.booleans(), st.booleans()), max_size=15))
def test_never_a_writer_beside_anybody(tmp_path_factory: pytest.TempPathFactory, steps: list[Step]) -> None:
    async def play() -> None:
        store = await SqliteStore.open(tmp_path_factory.mktemp("claims") / "state.db")
        try:
            await follow(ClaimBook(store), steps)
        finally:
            await store.close()

    asyncio.run(play())


async def follow(book: ClaimBook, steps: list[Step]) -> None:
    """Against a plain model: per path the set of (vm, disk, write)."""
    model: dict[str, set[tuple[str, str, bool]]] = {}
    for vm, number, claim, read_only in steps:
        path, id = f"/srv/{number}", f"d{number}"
        held = model.setdefault(path, set())
        others = {h for h in held if h[:2] != (vm, id)}
        if not claim:
            await book.release(vm, [id])
            model[path] = others
            continue
        allowed = not any(h[2] or not read_only for h in others)
        try:
            await book.claim(vm, [disk(path, id, read_only)], 1)
        except InUse:
            assert not allowed
        else:
            assert allowed
            model[path] = others | {(vm, id, not read_only)}
    for path, held in model.items():
        assert {(c.vm, c.disk, c.write) for c in await book.on(path)} == held


def lun(
    portal: str = "10.0.0.5:3260", identity: str = "naa.6001405", number: int = 1, reservations: bool = False
) -> Disk:
    path = f"iscsi://{portal}/iqn.x:t/{number}"
    source = DiskSource(kind=SourceKind.ISCSI, path=path, identity=identity, pool="san")
    return Disk(id="d0", source=source, reservations=reservations)


async def test_a_lun_is_one_thing_by_whichever_way_and_number(book: ClaimBook) -> None:
    await book.claim("a", [lun()], 1)
    for same in (lun("10.0.1.5:3260"), lun(number=7)):
        with pytest.raises(InUse, match="VM web"):
            await book.claim("b", [same], 1)
    await book.claim("b", [lun(identity="naa.6001406")], 1)
    nameless = lun(identity="")
    await book.claim("c", [nameless], 1)
    with pytest.raises(InUse):
        await book.claim("d", [lun("10.0.1.5:3260", identity="")], 1)
    assert [c.vm for c in await book.on(nameless.source.path)] == ["c"]


async def test_guests_that_reserve_a_lun_may_share_it_with_each_other_only(book: ClaimBook) -> None:
    for vm in ("a", "b"):
        await book.claim(vm, [lun(reservations=True)], 1)
    with pytest.raises(InUse):
        await book.claim("c", [lun()], 1)
    await book.release("a")
    await book.release("b")
    await book.claim("c", [lun()], 1)
    with pytest.raises(InUse):
        await book.claim("a", [lun(reservations=True)], 1)
