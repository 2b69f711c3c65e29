"""Pools on a whole host: the one every host has, others, what goes into them, what is found in them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hostler.host.pools.views import warnings
from hostler.model.disk import ImageFormat, SourceKind
from hostler.model.errors import (
    AlreadyExists,
    HostLacks,
    HostlerError,
    InUse,
    InvalidInput,
    NotFound,
    WrongState,
)
from hostler.model.pool import (
    DEFAULT_POOL,
    Health,
    Pool,
    PoolChange,
    PoolCreate,
    PoolKind,
    PoolScan,
    PoolState,
    Usage,
    reserve,
    source_of,
    state_of,
)
from hostler.model.requests import DiskAdd, VmCreate, VolumeCreate, VolumeRegister
from hostler.model.units import GiB, MiB
from hostler.model.volume import Volume
from hostler.storage.pools import filesystem
from hostler.storage.pools.directory import ABANDONED
from hostler.storage.qemu_img import PART
from hostler.store.contract import Delete, Put, Transaction
from hostler.testing.inprocess import Node, Site

pytestmark = pytest.mark.unit

PEM = "-----BEGIN X-----"
TLS = {"ca": PEM, "certificate": PEM, "key": PEM + "SECRET"}
ISO = b"\0" * 32_769 + b"CD001" + b"\0" * 4096


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


def directory(site: Site, name: str) -> str:
    path = site.directory / name
    path.mkdir()
    return str(path)


async def pool(node: Node, site: Site, name: str = "p", **fields: Any) -> str:
    path = directory(site, name)
    await node.application.pools.create(PoolCreate(name=name, path=path, **fields), "me")
    return path


async def make(node: Node, **fields: Any) -> Volume:
    request = VolumeCreate(**{"size": MiB, "format": ImageFormat.RAW, **fields})
    job = await node.finish(await node.application.volumes.create(request, "me"))
    if job.error is not None:
        raise job.error.to_error()
    return await node.application.volumes.get(request.name)


# requests


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "directory"}, "'path'"),
        ({"kind": "iscsi", "path": "/p"}, "'path'"),
        ({"kind": "iscsi", "portals": ["h:3260"]}, "'target'"),
        ({"kind": "iscsi", "target": "iqn.x:y"}, "'portals'"),
        ({"kind": "nbd", "portals": ["h:1"]}, "'tls'"),
        ({"kind": "nbd", "portals": ["h:1", "i:1"], "insecure": True}, "one portal"),
        ({"kind": "nbd", "portals": ["h:1"], "insecure": True, "tls": TLS}, "'tls'"),
        ({"path": "/p", "insecure": True}, "for nbd"),
        ({"path": "/p", "initiator": "iqn.x:y"}, "for iscsi"),
        ({"kind": "iscsi", "portals": ["h:1"], "target": "iqn.x:y", "chap_user": "u"}, "together"),
        ({"kind": "iscsi", "portals": ["h,password=x:1"], "target": "iqn.x:y"}, "HOST:PORT"),
        ({"kind": "iscsi", "portals": ["h:0"], "target": "iqn.x:y"}, "port"),
        ({"kind": "iscsi", "portals": ["::1:3260"], "target": "iqn.x:y"}, "HOST:PORT"),
        ({"path": "/p", "name": "a/b"}, "pattern"),
        ({"path": "/p", "name": "a,b"}, "pattern"),
        ({"path": "relative"}, "absolute"),
    ],
)
def test_what_is_no_pool(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PoolCreate.model_validate({"name": "p", **fields})


def test_what_is_a_pool() -> None:
    ways = ("10.0.0.5:3260", "[fd00::5]:3260", "san-2.example.com:3260")
    access = {"chap_user": "u", "chap_secret": "hush hush"}
    made = PoolCreate(name="san", kind=PoolKind.ISCSI, target="iqn.2020-01.com.example:vms", portals=ways, **access)
    assert made.portals == ways
    assert PoolCreate.model_validate({"name": "n", "kind": "nbd", "portals": ["h:1"], "tls": TLS}).tls is not None


def test_secrets_stand_in_no_text() -> None:
    nbd = PoolCreate.model_validate({"name": "n", "kind": "nbd", "portals": ["h:1"], "tls": TLS})
    san = PoolChange(chap_user="u", chap_secret="hush")
    assert "SECRET" not in f"{nbd!r} {nbd}"
    assert "hush" not in f"{san!r} {san}"
    with pytest.raises(ValidationError) as refused:
        PoolChange(chap_user="u", chap_secret="hush\n")
    assert "hush" not in str(refused.value)


# pure


@given(st.integers(1, 2**50), st.integers(0, 2**50), st.integers(1, 100))
def test_a_pool_is_full_only_when_it_is_low(capacity: int, free: int, warn_at: int) -> None:
    usage = Usage(capacity=capacity, free=min(free, capacity))
    state = state_of(usage, warn_at)
    assert reserve(usage) <= 256 * MiB
    if state is PoolState.FULL:
        assert usage.free is not None and usage.free <= max(capacity // 50, 0)
    if state is PoolState.READY:
        assert usage.free is not None and (capacity - usage.free) * 100 < capacity * warn_at


@pytest.mark.parametrize(("free", "state"), [(16, "ready"), (15, "low"), (2, "full"), (0, "full")])
def test_the_threshold(free: int, state: str) -> None:
    assert state_of(Usage(capacity=100, free=free), 85) == state


def test_a_pool_that_does_not_tell_its_size_is_ready() -> None:
    assert state_of(Usage(), 85) is PoolState.READY


def test_promising_too_much_is_a_warning() -> None:
    thin = Pool(name="p", kind=PoolKind.DIRECTORY, path="/p")
    healthy = Health(state=PoolState.READY, usage=Usage(capacity=10 * GiB, free=5 * GiB))
    assert warnings(thin, healthy, promised=6 * GiB, allocated=1 * GiB) == []
    [said] = warnings(thin, healthy, promised=7 * GiB, allocated=1 * GiB)
    assert "6 GiB" in said and "5 GiB" in said


# the pool every host has


async def test_every_host_has_one_pool(node: Node) -> None:
    [only] = await node.application.pools.list()
    assert (only.name, only.path) == (DEFAULT_POOL, str(node.paths.volumes))
    assert only.state in (PoolState.READY, PoolState.LOW) and only.capacity and only.features is not None
    made = await make(node, name="v")
    assert (made.pool, made.path) == (DEFAULT_POOL, str(node.paths.volumes / "v.raw"))
    seen = await node.application.pools.get(DEFAULT_POOL)
    assert (seen.volumes, seen.promised) == (1, MiB)
    with pytest.raises(WrongState):
        await node.application.pools.delete(DEFAULT_POOL, "me")


async def test_the_state_of_a_host_without_pools_is_taken_over(site: Site, node: Node) -> None:
    """As the first version left it: volumes that name no pool, in the volume directory and elsewhere, and no pool."""
    await node.store.commit(Transaction([Delete(f"pool/{DEFAULT_POOL}"), *_of_version_1(node, site)]))
    await node.die()
    await node.start()
    assert [p.name for p in await node.application.pools.list()] == [DEFAULT_POOL]
    pools = {v.name: v.pool for v in await node.application.volumes.list()}
    assert pools == {"in": DEFAULT_POOL, "out": ""}
    assert {v.state for v in await node.application.volumes.list()} == {"ready"}
    assert (await node.application.volumes.resolve(DiskAdd(volume="in"))).path == str(node.paths.volumes / "in.raw")


def _of_version_1(node: Node, site: Site) -> list[Put]:
    puts = []
    for name, path in (("in", node.paths.volumes / "in.raw"), ("out", site.directory / "out.raw")):
        path.write_bytes(b"\0" * 4096)
        old = {"name": name, "path": str(path), "format": "raw", "size": 4096, "allocated": 0, "backing": None}
        puts.append(Put(f"volume/{name}", {**old, "state": "ready", "created": None}))
        puts.append(Put(f"volume-path/{path}", {"name": name}))
    return puts


# others


async def test_a_volume_is_made_in_the_pool_that_was_asked_for(site: Site, node: Node) -> None:
    path = await pool(node, site)
    assert (await make(node, name="v", pool="p")).path == f"{path}/v.raw"
    assert [v.name for v in await node.application.volumes.list("p")] == ["v"]
    assert await node.application.volumes.list(DEFAULT_POOL) == []
    assert (await make(node, name="by-path", path=f"{path}/x.raw")).pool == "p"
    with pytest.raises(NotFound, match="no such pool"):
        await make(node, name="w", pool="q")
    with pytest.raises(NotFound):
        await node.application.volumes.list("q")
    Path(path, "r.raw").write_bytes(b"\0" * 4096)
    request = VolumeRegister(name="r", path=f"{path}/r.raw", format=ImageFormat.RAW)
    assert (await node.application.volumes.register(request, "me")).pool == "p"


async def test_a_pool_and_the_place_of_it_exist_once(site: Site, node: Node) -> None:
    path = await pool(node, site)
    with pytest.raises(AlreadyExists):
        await node.application.pools.create(PoolCreate(name="p", path=directory(site, "other")), "me")
    link = site.directory / "link"
    link.symlink_to(path)
    with pytest.raises(InUse, match="'p'"):
        await node.application.pools.create(PoolCreate(name="q", path=str(link)), "me")


async def test_a_pool_that_is_not_there_is_made_only_when_asked(site: Site, node: Node) -> None:
    gone = str(site.directory / "gone")
    with pytest.raises(HostLacks, match="does not exist"):
        await node.application.pools.create(PoolCreate(name="p", path=gone), "me")
    view = await node.application.pools.create(PoolCreate(name="p", path=gone, unchecked=True), "me")
    assert view.state is PoolState.UNREACHABLE
    with pytest.raises(HostLacks, match="unreachable"):
        await make(node, name="v", pool="p")
    Path(gone).mkdir()
    assert (await node.application.pools.get("p")).state is not PoolState.UNREACHABLE


async def test_a_pool_with_volumes_stays(site: Site, node: Node) -> None:
    await pool(node, site)
    await make(node, name="v", pool="p")
    with pytest.raises(InUse, match="1 volumes"):
        await node.application.pools.delete("p", "me")
    await node.application.volumes.delete("v", "me")
    await node.application.pools.delete("p", "me", dry_run=True)
    await node.application.pools.delete("p", "me")
    assert len(await node.application.pools.list()) == 1
    with pytest.raises(NotFound):
        await node.application.pools.get("p")


async def test_a_pool_is_changed(site: Site, node: Node) -> None:
    await pool(node, site)
    changed = await node.application.pools.change("p", PoolChange(warn_at=1, notes="n"), "me")
    assert (changed.warn_at, changed.notes) == (1, "n")
    with pytest.raises(InvalidInput, match="directory"):
        await node.application.pools.change("p", PoolChange(chap_user="u", chap_secret="s"), "me")


async def test_whoever_listens_is_told_when_a_pool_gets_low(
    site: Site, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pool(node, site)
    told: list[Any] = []
    monkeypatch.setattr(node.application.events, "publish", lambda kind, key, value: told.append((kind, key, value)))
    for free, state in ((50, None), (16, None), (14, "low"), (13, None), (1, "full"), (50, "ready")):
        monkeypatch.setattr(filesystem, "usage", lambda _, free=free: Usage(capacity=100, free=free))
        await node.application.pool_watch.look()
        heard = [value.state for kind, key, value in told if (kind, key) == ("pool", "p")]
        assert heard == ([state] if state else [])
        told.clear()


# scanning


async def test_a_scan_finds_what_is_not_on_record_and_what_is_gone(site: Site, node: Node) -> None:
    path = Path(await pool(node, site))
    for name in ("known", "gone"):
        await make(node, name=name, pool="p")
    (path / "gone.raw").unlink()
    (path / "stray.raw").write_bytes(b"\0" * 4096)
    (path / "note.txt").write_text("no image")
    (path / "cut.qcow2").write_bytes(b"\0" * 512)
    (path / ".hidden").write_bytes(b"\0" * 512)
    (path / "link.raw").symlink_to("/etc/passwd")
    (path / "below").mkdir()
    old, new = path / f".{'a' * 16}.00000000{PART}", path / f".{'b' * 16}.00000000{PART}"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - ABANDONED - 1,) * 2)
    report = await node.application.pools.scan("p", PoolScan(), "me")
    assert [f.path for f in report.unknown] == [str(path / "stray.raw")]
    assert report.missing == ("gone",)
    assert [f.path for f in report.leftovers] == [str(old)]
    assert {r.path for r in report.refused} == {str(path / "note.txt"), str(path / "cut.qcow2")}
    assert report.adopted == report.deleted == ()

    every = PoolScan(adopt=True, delete_leftovers=True, dry_run=True)
    would = await node.application.pools.scan("p", every, "me")
    assert ([v.name for v in would.adopted], would.deleted) == (["stray"], (str(old),))
    assert old.exists()
    with pytest.raises(NotFound):
        await node.application.volumes.get("stray")

    await node.application.pools.scan("p", every.model_copy(update={"dry_run": False}), "me")
    assert (await node.application.volumes.get("stray")).pool == "p"
    assert new.exists() and not old.exists() and (path / "note.txt").exists()
    again = await node.application.pools.scan("p", every, "me")
    assert (again.unknown, again.leftovers, again.missing) == ((), (), ("gone",))


async def test_a_disk_that_is_no_volume_is_known_all_the_same(site: Site, node: Node) -> None:
    path = Path(await pool(node, site))
    (path / "d.raw").write_bytes(b"\0" * 4096)
    add = DiskAdd(volume=str(path / "d.raw"), format=ImageFormat.RAW)
    await node.application.vms.create(VmCreate(name="vm", disks=(add,)), "me")
    assert (await node.application.pools.scan("p", PoolScan(adopt=True), "me")).adopted == ()


async def test_names_that_are_taken_are_told_apart(site: Site, node: Node) -> None:
    path = Path(await pool(node, site))
    await make(node, name="v")
    (path / "v.raw").write_bytes(b"\0" * 4096)
    (path / "-odd\nname.raw").write_bytes(b"\0" * 4096)
    report = await node.application.pools.scan("p", PoolScan(adopt=True), "me")
    assert {v.name for v in report.adopted} == {"v (p)", "oddname"}


# libraries


async def test_a_library_shows_what_lies_in_it(site: Site, node: Node) -> None:
    path = Path(await pool(node, site, "media", kind=PoolKind.LIBRARY))
    (path / "debian.iso").write_bytes(ISO)
    (path / "text.iso").write_text("no image")
    await node.application.pool_watch.look()
    [medium] = await node.application.volumes.list("media")
    assert (medium.name, medium.format, medium.size) == ("debian.iso", ImageFormat.RAW, len(ISO))
    with pytest.raises(InvalidInput, match="only read"):
        await node.application.volumes.resolve(DiskAdd(volume="debian.iso"))
    for allowed in (DiskAdd(volume="debian.iso", media="cdrom"), DiskAdd(volume="debian.iso", read_only=True)):
        assert (await node.application.volumes.resolve(allowed)).path == medium.path
    with pytest.raises(InvalidInput, match="nothing is made"):
        await make(node, name="v", pool="media")

    (path / "debian.iso").unlink()
    await node.application.pool_watch.look()
    assert await node.application.volumes.list("media") == []


async def test_nothing_is_deleted_in_a_library(site: Site, node: Node) -> None:
    path = Path(await pool(node, site, "media", kind=PoolKind.LIBRARY))
    (path / "debian.iso").write_bytes(ISO)
    await node.application.pool_watch.look()
    with pytest.raises(HostlerError, match="only read"):
        await node.application.volumes.delete("debian.iso", "me")
    assert (path / "debian.iso").exists()
    await node.application.pools.delete("media", "me")
    assert (path / "debian.iso").exists()
    assert await node.application.volumes.list() == []


# as disks


def test_a_volume_as_a_source() -> None:
    lun = Volume(
        name="l",
        path="iscsi://h:1/iqn.x:y/1",
        format=ImageFormat.RAW,
        size=MiB,
        kind=SourceKind.ISCSI,
        pool="san",
        identity="naa.6001",
    )
    source = source_of(lun)
    assert (source.kind, source.pool, source.identity, source.networked) == (SourceKind.ISCSI, "san", "naa.6001", True)
    file = source_of(Volume(name="f", path="/p/f", format=ImageFormat.QCOW2, size=MiB, pool="p"))
    assert (file.pool, file.local) == ("", True)


async def test_a_volume_that_lies_elsewhere_by_now_is_in_the_pool_of_that_place(site: Site, node: Node) -> None:
    path = await pool(node, site)
    await make(node, name="v")
    service = node.application.volume_service
    await service.amend("v", pool="p")  # as after a move by somebody who knows nothing of pools
    await node.application.pool_watch.look()
    assert (await node.application.volumes.get("v")).pool == DEFAULT_POOL
    await make(node, name="w", path=f"{path}/w.raw")
    await service.amend("w", pool="")
    await node.application.pool_watch.look()
    assert (await node.application.volumes.get("w")).pool == "p"
    await make(node, name="x", path=str(site.directory / "x.raw"))
    await node.application.pool_watch.look()
    assert (await node.application.volumes.get("x")).pool == ""
