"""What every kind of pool promises, on real file systems and storage systems."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import InvalidInput, NotFound, TimedOut
from hostler.model.limits import PROFILES, Profile
from hostler.model.pool import Pool, PoolKind, PoolSecrets, PoolState
from hostler.model.units import MiB
from hostler.model.volume import Volume
from hostler.storage import observing, volumes
from hostler.storage.pools import directory as directory_pool
from hostler.storage.pools import filesystem, lane
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.pools.drivers import driver_of
from hostler.store.sqlite import SqliteStore
from hostler.testing.dead_mount import available, dead_mount
from hostler.testing.targets import Authority, IscsiTarget, NbdServer

pytestmark = pytest.mark.component

SIZE = 16 * MiB
CHAP = ("vms", "hush-hush-hush")
ME = "iqn.2020-01.com.example:me"
TLS_FILES = {"ca": "ca-cert.pem", "certificate": "client-cert.pem", "key": "client-key.pem"}


def system(*words: object) -> tuple[int, str]:
    """Exit status and output of a program."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout


@dataclass
class Subject:
    """A pool with two things of SIZE in it that can be volumes, and the path of one that is not there. `lose`: its
    storage goes away."""

    driver: PoolDriver
    paths: tuple[str, str]
    absent: str
    lose: Callable[[], None]


def directory_subject(_stack: ExitStack, base: Path) -> Subject:
    place = base / "pool"
    place.mkdir()
    files = (place / "a.raw", place / "b.raw")
    for file in files:
        file.touch()
        os.truncate(file, SIZE)
    pool = Pool(name="p", kind=PoolKind.DIRECTORY, path=str(place))
    return file_subject(pool, place, files)


def library_subject(_stack: ExitStack, base: Path) -> Subject:
    place = base / "media"
    place.mkdir()
    files = (place / "a.iso", place / "b.iso")
    for file in files:
        file.write_bytes(b"\0" * 32_769 + b"CD001")
        os.truncate(file, SIZE)
    pool = Pool(name="p", kind=PoolKind.LIBRARY, path=str(place))
    return file_subject(pool, place, files)


def file_subject(pool: Pool, place: Path, files: tuple[Path, Path]) -> Subject:
    def lose() -> None:
        place.rename(place.with_name("away"))

    paths = (str(files[0]), str(files[1]))
    return Subject(driver_of(pool, PoolSecrets()), paths, str(place / f"none{files[0].suffix}"), lose)


def iscsi_subject(stack: ExitStack, base: Path) -> Subject:
    target = stack.enter_context(IscsiTarget(base / "t", CHAP))
    first, second = target.add(SIZE), target.add(SIZE)
    pool = Pool(
        name="p", kind=PoolKind.ISCSI, portals=target.portals, target=target.name, initiator=ME, chap_user=CHAP[0]
    )
    driver = driver_of(pool, PoolSecrets(chap_secret=CHAP[1]))
    return Subject(driver, (target.url(first), target.url(second)), target.url(99), target.kill)


def nbd_subject(stack: ExitStack, base: Path) -> Subject:
    authority = Authority(base / "ca")
    server = stack.enter_context(NbdServer(base / "n", authority))
    server.add("a", SIZE)
    server.add("b", SIZE)
    server.start()
    pool = Pool(name="p", kind=PoolKind.NBD, portals=(server.portal,), tls=True)
    driver = driver_of(pool, secrets_in(authority.client()))
    urls = [f"nbd://{server.portal}/{name}" for name in ("a", "b", "none")]
    return Subject(driver, (urls[0], urls[1]), urls[2], server.kill)


def secrets_in(directory: Path) -> PoolSecrets:
    texts = {field: (directory / name).read_text() for field, name in TLS_FILES.items()}
    return PoolSecrets.model_validate(texts)


KINDS = {"directory": directory_subject, "library": library_subject, "iscsi": iscsi_subject, "nbd": nbd_subject}


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    with ExitStack() as stack:
        yield KINDS[request.param](stack, tmp_path)


def volume(subject: Subject, path: str) -> Volume:
    return Volume(name="v", path=path, format=ImageFormat.RAW, size=SIZE, pool="p")


async def test_a_pool_that_is_there_answers(subject: Subject) -> None:
    health = await subject.driver.check()
    assert health.state in (PoolState.READY, PoolState.LOW), health


async def test_what_is_in_it_is_found_with_its_size(subject: Subject) -> None:
    contents = await subject.driver.scan(frozenset())
    assert sorted((f.path, f.size) for f in contents.found) == sorted((path, SIZE) for path in subject.paths)
    assert not contents.truncated and not contents.refused and not contents.leftovers
    known = await subject.driver.scan(frozenset(subject.paths[:1]))
    assert subject.paths[1] in {f.path for f in known.found}


async def test_one_thing_is_found_by_its_path(subject: Subject) -> None:
    found = await subject.driver.find(subject.paths[0])
    assert (found.path, found.size) == (subject.paths[0], SIZE)
    [same] = [f for f in (await subject.driver.scan(frozenset())).found if f.path == subject.paths[0]]
    assert (found.identity, found.kind) == (same.identity, same.kind)
    with pytest.raises(NotFound):
        await subject.driver.find(subject.absent)


async def test_which_volumes_are_there(subject: Subject) -> None:
    here, gone = volume(subject, subject.paths[0]), volume(subject, subject.absent)
    there = await subject.driver.present([here, gone])
    assert set(there) == {here.path}
    assert there[here.path].size == SIZE
    assert await subject.driver.allocated([here]) <= SIZE


async def test_looking_changes_nothing(subject: Subject) -> None:
    before = await subject.driver.scan(frozenset())
    await subject.driver.check()
    await subject.driver.features()
    await subject.driver.usage()
    assert await subject.driver.scan(frozenset()) == before


async def test_a_new_volume_has_a_place_only_where_volumes_are_made(subject: Subject) -> None:
    if subject.driver.pool.makes:
        assert subject.driver.place("new", ImageFormat.VHDX).endswith("/new.vhdx")
    else:
        with pytest.raises(InvalidInput):
            subject.driver.place("new", ImageFormat.RAW)


async def test_a_pool_that_is_gone_says_so_and_comes_back(subject: Subject) -> None:
    subject.lose()
    health = await subject.driver.check()
    assert health.state is PoolState.UNREACHABLE and health.text
    with pytest.raises((NotFound, TimedOut, OSError)):
        await subject.driver.scan(frozenset())
    with pytest.raises((NotFound, TimedOut, OSError)):
        await subject.driver.present([volume(subject, subject.paths[0])])


# directories in particular


async def test_what_a_file_system_can_do_is_found_by_trying(tmp_path: Path) -> None:
    found = await driver_of(Pool(name="p", kind=PoolKind.DIRECTORY, path=str(tmp_path)), PoolSecrets()).features()
    assert found is not None
    assert found.kind and found.kind[:3] in system("stat", "-f", "-c", "%T", tmp_path)[1]
    probe = tmp_path / "probe"
    probe.write_bytes(b"x" * 65_536)
    assert found.reflink == (system("cp", "--reflink=always", probe, tmp_path / "copy")[0] == 0)
    assert found.punch_hole == (system("fallocate", "-p", "-l", "4096", probe)[0] == 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@needs_root
async def test_a_share_that_is_not_mounted_is_not_mistaken_for_its_empty_directory(tmp_path: Path) -> None:
    place = tmp_path / "share"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=4m", "none", place)
    assert system(*mount)[0] == 0
    try:
        driver = driver_of(
            Pool(name="p", kind=PoolKind.DIRECTORY, path=str(place), mount=filesystem.mount_point(str(place))),
            PoolSecrets(),
        )
        assert driver.pool.mount == str(place)
        assert (await driver.check()).state is PoolState.READY
        assert system("umount", place)[0] == 0
        health = await driver.check()
        assert (health.state, "mounted" in health.text) == (PoolState.UNREACHABLE, True)
        assert system(*mount)[0] == 0
        assert (await driver.check()).state is PoolState.READY
        assert system("mount", "-o", "remount,ro", place)[0] == 0
        assert (await driver.check()).state is PoolState.READ_ONLY
        assert system("mount", "-o", "remount,rw", place)[0] == 0
        (place / "ballast").write_bytes(b"\0" * int(3.4 * MiB))
        assert (await driver.check()).state is PoolState.LOW
        with pytest.raises(OSError, match="No space"):
            (place / "more").write_bytes(b"\0" * 4 * MiB)
        assert (await driver.check()).state is PoolState.FULL
    finally:
        system("umount", place)


@pytest.mark.skipif(not available(), reason="needs root and FUSE")
async def test_a_share_that_hangs_costs_one_thread_and_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_pool, "DEADLINE", 0.5)
    monkeypatch.setattr(directory_pool, "SCAN_DEADLINE", 0.5)
    place = tmp_path / "share"
    place.mkdir()
    driver = driver_of(Pool(name="p", kind=PoolKind.DIRECTORY, path=str(place)), PoolSecrets())
    assert (await driver.check()).state is not PoolState.UNREACHABLE
    before = threading.active_count()
    with dead_mount(place):
        answers = await asyncio.gather(*(driver.check() for _ in range(20)))
        assert {a.state for a in answers} == {PoolState.UNREACHABLE}
        with pytest.raises(TimedOut):
            await driver.scan(frozenset())
        assert threading.active_count() <= before + 1
        again = [await driver.check() for _ in range(20)]
        assert all("has not answered for" in a.text for a in again), "whoever asks while it hangs is told at once"
        assert threading.active_count() <= before + 1
    for _ in range(100):
        if (await driver.check()).state is not PoolState.UNREACHABLE:
            break
        await asyncio.sleep(0.05)
    assert (await driver.check()).state is not PoolState.UNREACHABLE


async def test_a_fault_in_a_file_call_reaches_who_asked() -> None:
    with pytest.raises(Exception, match="a file call of ours failed"):
        await lane.Lane("pool p").run(lambda: 1 // 0, 5)
    assert await lane.Lane("pool p").run(lambda: 7, 5) == 7


@pytest.mark.skipif(not available(), reason="needs root and FUSE")
async def test_volumes_on_a_share_that_hangs_are_missing_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "LOOK", 0.3)
    store = await SqliteStore.open(tmp_path / "state" / "hostler.db")
    service = volumes.VolumeService(store, tmp_path / "here", PROFILES[Profile.HOSTLER])
    (tmp_path / "share").mkdir()
    await service.create("near", MiB, ImageFormat.RAW)
    await service.create("far", MiB, ImageFormat.RAW, str(tmp_path / "share" / "far.raw"))
    with dead_mount(tmp_path / "share"):
        for _ in range(30):  # more than there are threads for everybody's file calls
            assert {v.name: str(v.state) for v in await service.list()} == {"near": "ready", "far": "missing"}
        with pytest.raises(TimedOut):
            await service.get("far")
        assert (await service.get("near")).state == "ready"
        assert await asyncio.wait_for(asyncio.to_thread(os.getpid), 5) == os.getpid()
    await store.close()
