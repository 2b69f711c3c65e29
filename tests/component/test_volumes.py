"""Volumes: the whole service on real files, with what people get wrong and what hostile images try."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import images
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import (
    AlreadyExists,
    BadImage,
    Busy,
    HostlerError,
    InUse,
    InvalidInput,
    LimitExceeded,
    NoSpace,
    NotFound,
)
from hostler.model.limits import PROFILES, Profile
from hostler.model.units import GiB, MiB
from hostler.model.volume import Volume, VolumeState
from hostler.storage import qemu_img
from hostler.storage.claims import ClaimBook
from hostler.storage.qemu_img import QemuImg
from hostler.storage.volumes import VolumeService
from hostler.store.contract import Put, Transaction
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.component

LIMITS = PROFILES[Profile.HOSTLER]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "state/hostler.db")
    yield opened
    await opened.close()


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "volumes"


@pytest.fixture
def volumes(store: SqliteStore, where: Path) -> VolumeService:
    return VolumeService(store, where, LIMITS)


def disk(path: str, read_only: bool = False) -> Disk:
    return Disk(id="d0", source=DiskSource(path=path), read_only=read_only)


async def left(volumes: VolumeService, where: Path) -> tuple[list[str], list[str]]:
    """Names of records and of files."""
    return [v.name for v in await volumes.list()], images.names(where) if where.exists() else []


# making


@pytest.mark.parametrize("format", ImageFormat)
async def test_create_list_get_inspect_delete(volumes: VolumeService, where: Path, format: ImageFormat) -> None:
    made = await volumes.create("größe 1", 10 * MiB, format)
    assert (made.name, made.format, made.size, made.state) == ("größe 1", format, 10 * MiB, VolumeState.READY)
    assert made.created is not None
    assert Path(made.path).parent == where
    assert await volumes.list() == [made]
    assert await volumes.get("größe 1") == await volumes.get(made.path) == await volumes.inspect(made.path) == made
    await volumes.delete("größe 1")
    assert await left(volumes, where) == ([], [])
    with pytest.raises(NotFound):
        await volumes.delete("größe 1")


NONSENSE: dict[str, tuple[str, int, str | None]] = {
    "no name": ("", MiB, None),
    "slash in name": ("../../etc/cron.d/x", MiB, None),
    "control character": ("a\nb", MiB, None),
    "option as name": ("--help", MiB, None),
    "long name": ("x" * 101, MiB, None),
    "name of more bytes than a file name takes": ("\U0001f600" * 100, MiB, None),
    "no size": ("a", 0, None),
    "negative size": ("a", -512, None),
    "half a sector": ("a", MiB + 1, None),
    "relative path": ("a", MiB, "a.vhd"),
    "protocol for a path": ("a", MiB, "nbd:localhost:10809"),
    "JSON for a path": ("a", MiB, 'json:{"driver":"null-co"}'),
    "directory for a path": ("a", MiB, "/tmp/"),
    "NUL in path": ("a", MiB, "/tmp/a\0b"),
}


@pytest.mark.parametrize("case", sorted(NONSENSE))
async def test_nonsense_is_refused_before_anything_is_done(volumes: VolumeService, where: Path, case: str) -> None:
    name, size, path = NONSENSE[case]
    with pytest.raises(InvalidInput) as refused:
        await volumes.create(name, size, ImageFormat.VHD, path)
    assert refused.value.cause
    assert await left(volumes, where) == ([], [])


async def test_limits_name_limit_value_and_profile(store: SqliteStore, where: Path) -> None:
    for profile in Profile:
        volumes = VolumeService(store, where, PROFILES[profile])
        for format in (ImageFormat.VHD, ImageFormat.VHD_FIXED):
            with pytest.raises(LimitExceeded, match=f"2040 GiB|2.0 TiB.*{profile}") as refused:
                await volumes.create("a", 2040 * GiB + 512, format)
            assert refused.value.details["limit"] == "vhd_size"
        with pytest.raises(LimitExceeded):
            await volumes.create("a", 65 * 1024 * GiB, ImageFormat.QCOW2)
    assert (await volumes.create("a", 2040 * GiB, ImageFormat.VHD)).size == 2040 * GiB


async def test_names_and_paths_are_taken_once(volumes: VolumeService, where: Path, tmp_path: Path) -> None:
    made = await volumes.create("a", MiB)
    with pytest.raises(AlreadyExists, match="volume a"):
        await volumes.create("a", MiB, ImageFormat.RAW)
    with pytest.raises(AlreadyExists, match="volume 'a'"):
        await volumes.create("b", MiB, path=made.path)
    (tmp_path / "link").symlink_to(where)
    with pytest.raises(AlreadyExists, match="volume 'a'"):
        await volumes.register("b", str(tmp_path / "link" / Path(made.path).name))
    (where / "c.raw").write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        await volumes.create("c", MiB, ImageFormat.RAW)
    assert (where / "c.raw").read_bytes() == b"precious"
    assert [v.name for v in await volumes.list()] == ["a"]


async def test_a_missing_directory_leaves_no_record(volumes: VolumeService, where: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="directory"):
        await volumes.create("a", MiB, path=str(tmp_path / "no/a.vhdx"))
    assert await left(volumes, where) == ([], [])


@pytest.mark.parametrize("format", [None, *ImageFormat])
async def test_copy_converts_grows_and_tells_how_far_it_is(
    volumes: VolumeService, tmp_path: Path, format: ImageFormat | None
) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(b"A" * MiB + bytes(MiB) + b"B" * 100)
    told: list[float] = []
    made = await volumes.create_from(
        "copy", str(source), format, source_format=ImageFormat.RAW, on_progress=told.append
    )
    assert made.format is (format or ImageFormat.RAW)
    assert made.size == 2 * MiB + 512
    assert told[-1] == 1.0
    again = await volumes.create_from("larger", "copy", ImageFormat.VHD, size=4 * MiB)
    assert again.size == 4 * MiB
    assert images.verified(again.path, ImageFormat.VHD, ord("A"), "0 1M")
    with pytest.raises(InvalidInput, match="end would be lost"):
        await volumes.create_from("smaller", "copy", size=MiB)


async def test_a_known_source_is_copied_as_its_record_says(volumes: VolumeService, where: Path, tmp_path: Path) -> None:
    """The guest of a raw volume writes a qcow2 header that points at /etc/shadow; the copy is raw, with the header."""
    raw = await volumes.create("raw", 2 * MiB, ImageFormat.RAW)
    evil = tmp_path / "evil"
    await QemuImg().create(str(evil), ImageFormat.QCOW2, MiB)
    header = bytearray(evil.read_bytes()[:1024])
    header[8:20] = (512).to_bytes(8, "big") + (11).to_bytes(4, "big")
    header[512:523] = b"/etc/shadow"
    with open(raw.path, "r+b") as file:
        file.write(header)
    made = await volumes.create_from("copy", "raw")
    assert made.format is ImageFormat.RAW
    assert Path(made.path).read_bytes()[:1024] == bytes(header)
    assert (await volumes.inspect(raw.path)).format is ImageFormat.RAW
    assert (await volumes.get("raw")).state is VolumeState.READY
    (tmp_path / "unknown").write_bytes(Path(raw.path).read_bytes())
    for attempt in (
        volumes.create_from("x", str(tmp_path / "unknown")),
        volumes.register("x", str(tmp_path / "unknown")),
        volumes.inspect(str(tmp_path / "unknown")),
    ):
        with pytest.raises(BadImage, match="/etc/shadow"):
            await attempt
    assert await left(volumes, where) == (["copy", "raw"], ["copy.raw", "raw.raw"])


async def test_cancelled_while_copying(volumes: VolumeService, where: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(32 * MiB))
    started = asyncio.Event()
    work = volumes.create_from(
        "a", str(source), ImageFormat.VHDX, source_format=ImageFormat.RAW, on_progress=lambda _: started.set()
    )
    copying = asyncio.create_task(work)
    async with asyncio.timeout(60):
        await started.wait()
    assert (await volumes.get("a")).state is VolumeState.CREATING
    with pytest.raises(Busy):
        await volumes.delete("a")
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert await left(volumes, where) == ([], [])


async def test_cancelled_at_any_moment_nothing_is_left(volumes: VolumeService, where: Path) -> None:
    """After n turns of the event loop, for every n until it is too late to cancel."""
    done, turns = False, 0
    while not done:
        making = asyncio.create_task(volumes.create(f"v{turns}", MiB, ImageFormat.QCOW2))
        for _ in range(turns):
            if making.done():
                break
            await asyncio.sleep(0.002 if turns > 20 else 0)
        making.cancel()
        done = isinstance((await asyncio.gather(making, return_exceptions=True))[0], Volume)
        if not done:
            assert await left(volumes, where) == ([], [])
        turns += 1 + turns // 5
    assert turns > 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("format", ImageFormat)
async def test_a_full_disk(volumes: VolumeService, where: Path, tmp_path: Path, format: ImageFormat) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(8 * MiB))
    with images.small_disk(tmp_path / "small", "4m") as small:
        with pytest.raises(NoSpace):
            await volumes.create_from("a", str(source), format, path=str(small / "a"), source_format=ImageFormat.RAW)
        assert images.names(small) == []
    assert await left(volumes, where) == ([], [])


# looking


async def test_register_takes_the_format_from_content(volumes: VolumeService, tmp_path: Path) -> None:
    for format in ImageFormat:
        path = tmp_path / f"{format}.img"
        await QemuImg().create(str(path), format, 4 * MiB)
        if format is ImageFormat.RAW:
            with pytest.raises(InvalidInput, match="no header"):
                await volumes.register("raw", str(path))
        known = await volumes.register(str(format), str(path), ImageFormat.RAW if format is ImageFormat.RAW else None)
        assert (known.format, known.size, known.path) == (format, 4 * MiB, str(path))
    with pytest.raises(AlreadyExists, match="volume 'vhdx'"):
        await volumes.register("x", str(tmp_path / "vhdx.img"), ImageFormat.QCOW2)
    await QemuImg().create(str(tmp_path / "new"), ImageFormat.VHDX, MiB)
    with pytest.raises(BadImage, match="content of vhdx"):
        await volumes.register("x", str(tmp_path / "new"), ImageFormat.QCOW2)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/no/such/image", NotFound),
        ("/tmp", InvalidInput),
        ("/dev/zero", InvalidInput),
        ("relative", InvalidInput),
        ("json:{}", InvalidInput),
    ],
)
async def test_what_is_no_image_file(volumes: VolumeService, where: Path, path: str, error: type[HostlerError]) -> None:
    for attempt in (volumes.inspect(path), volumes.register("a", path), volumes.create_from("a", path)):
        with pytest.raises(error):
            await attempt
    assert await left(volumes, where) == ([], [])


async def test_a_fifo_is_refused_at_once(volumes: VolumeService, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidInput, match="pipe"):
        await volumes.inspect(str(tmp_path / "fifo"))


async def test_missing_and_damaged_are_seen_and_end_when_the_file_is_back(volumes: VolumeService) -> None:
    made = [await volumes.create(str(format), 4 * MiB, format) for format in ImageFormat]
    contents = {v.path: Path(v.path).read_bytes() for v in made}

    async def states() -> set[VolumeState]:
        return {v.state for v in await volumes.list()}

    for volume in made:
        Path(volume.path).unlink()
    assert await states() == {VolumeState.MISSING}
    for volume in made:
        Path(volume.path).write_bytes(contents[volume.path][:300])
    assert await states() == {VolumeState.DAMAGED}
    for volume in made:
        Path(volume.path).write_bytes(contents[volume.path])
    assert await states() == {VolumeState.READY}


async def test_a_vhdx_left_by_a_crash_is_copied_with_its_log_replayed(volumes: VolumeService, where: Path) -> None:
    """QEMU opens one with a log only for writing; our reader replays it in memory. The source stays as it is."""
    made = await volumes.create("a", 4 * MiB, ImageFormat.VHDX)
    images.qemu_io(made.path, ImageFormat.VHDX, "write -P 7 1M 64k")
    images.leave_log(made.path)
    before = Path(made.path).read_bytes()
    assert (await volumes.inspect(made.path)).size == 4 * MiB
    assert (await volumes.get("a")).state is VolumeState.READY
    for name, format in (("b", None), ("c", ImageFormat.QCOW2)):
        copy = await volumes.create_from(name, "a", format, 6 * MiB)
        assert copy.size == 6 * MiB
        assert images.verified(copy.path, copy.format, 7, "1M 64k")
    assert Path(made.path).read_bytes() == before
    assert await left(volumes, where) == (["a", "b", "c"], ["a.vhdx", "b.vhdx", "c.qcow2"])


async def test_a_mistyped_name_gets_the_near_one(volumes: VolumeService) -> None:
    await volumes.create("webserver", MiB)
    with pytest.raises(NotFound, match="no such volume") as missing:
        await volumes.get("websever")
    assert "'webserver'" in missing.value.advice


SOUND: dict[ImageFormat, bytes] = {}


async def sound(format: ImageFormat, directory: Path) -> bytes:
    """A real image with some data in it, made once."""
    if format not in SOUND:
        path = directory / format
        await QemuImg().create(str(path), format, 4 * MiB)
        images.qemu_io(path, format, "write -P 7 0 64k", "write -P 8 3M 64k")
        SOUND[format] = path.read_bytes()
    return SOUND[format]


@pytest.mark.parametrize("format", [f for f in ImageFormat if f is not ImageFormat.RAW])
@settings(max_examples=25)
@given(data=st.data())
def test_inspecting_mutated_images_raises_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, format: ImageFormat, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("mutated")

    async def play() -> None:
        content = bytearray(await sound(format, directory))
        base = len(content) - 512 if format is ImageFormat.VHD_FIXED else 0
        for _ in range(data.draw(st.integers(1, 3))):
            at = base + data.draw(st.one_of(st.integers(0, 127), st.sampled_from((512, 544, 65_536, 131_072, 196_608))))
            piece = data.draw(st.binary(min_size=1, max_size=8))
            content[at : at + len(piece)] = piece
        cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
        (directory / "image").write_bytes(bytes(content[:cut]))
        store = await SqliteStore.open(directory / "state.db")
        try:
            seen = await VolumeService(store, directory, LIMITS).inspect(str(directory / "image"))
            assert seen.size >= 0
        except HostlerError as error:
            assert error.cause
            assert not error.cause.endswith(".")
        finally:
            await store.close()

    asyncio.run(play())


# ending


async def test_a_claimed_volume_is_not_deleted(volumes: VolumeService, store: SqliteStore, where: Path) -> None:
    made, book = await volumes.create("a", MiB), ClaimBook(store)
    for read_only in (True, False):
        await book.claim("vm1", [disk(made.path, read_only)], 1)
        for keep_file in (True, False):
            with pytest.raises(InUse, match="VM vm1"):
                await volumes.delete("a", keep_file)
        await book.release("vm1")
    assert await left(volumes, where) == (["a"], ["a.qcow2"])
    await volumes.delete("a", keep_file=True)
    assert await left(volumes, where) == ([], ["a.qcow2"])
    assert await store.list("") == []


async def test_a_volume_that_a_vm_writes_is_not_copied(volumes: VolumeService, store: SqliteStore, where: Path) -> None:
    made = await volumes.create("a", MiB)
    await ClaimBook(store).claim("vm1", [disk(made.path)], 1)
    with pytest.raises(InUse):
        await volumes.create_from("b", "a")
    assert await left(volumes, where) == (["a"], ["a.qcow2"])


async def test_claiming_and_deleting_at_once_have_one_winner(volumes: VolumeService, store: SqliteStore) -> None:
    book = ClaimBook(store)
    for n in range(10):
        made = await volumes.create(f"v{n}", MiB, ImageFormat.QCOW2)
        outcome = await asyncio.gather(
            book.claim("vm1", [disk(made.path)], 1), volumes.delete(made.name), return_exceptions=True
        )
        if outcome[1] is None:
            assert not Path(made.path).exists()
        else:
            assert isinstance(outcome[1], InUse)
            assert outcome[0] is None
            assert Path(made.path).exists()
            assert [c.vm for c in await book.on(made.path)] == ["vm1"]
        await book.release("vm1")


async def test_deleting_what_is_gone_already(volumes: VolumeService, where: Path) -> None:
    made = await volumes.create("a", MiB)
    Path(made.path).unlink()
    await volumes.delete("a")
    assert await left(volumes, where) == ([], [])


# after a crash


async def test_recovery_after_a_kill_at_each_step(volumes: VolumeService, store: SqliteStore, where: Path) -> None:
    """The states a killed daemon can leave, and what the next one makes of them."""
    # Killed after the file had its name, before the last word about it.
    whole = await volumes.create("whole", MiB, ImageFormat.QCOW2)
    # Killed before the file had its name: a part of it is left.
    half = whole.but(name="half", path=str(where / "half.qcow2"))
    with suppress(RuntimeError):
        async with qemu_img.new_file(half.path) as part:
            os.link(part, part.removesuffix(qemu_img.PART) + "0" + qemu_img.PART)
            raise RuntimeError
    # Killed while deleting, before and after the file was removed.
    doomed = await volumes.create("doomed", MiB, ImageFormat.QCOW2)
    gone = await volumes.create("gone", MiB, ImageFormat.QCOW2)
    Path(gone.path).unlink()
    writes = [stored(doomed, VolumeState.DELETING), stored(gone, VolumeState.DELETING)]
    writes += [stored(half, VolumeState.CREATING), stored(whole, VolumeState.CREATING)]
    await store.commit(Transaction([*writes, Put(f"volume-path/{half.path}", {"name": "half"})]))
    assert len(images.names(where)) == 3
    for _ in range(2):
        await VolumeService(store, where, LIMITS).recover()
        assert await left(volumes, where) == (["whole"], ["whole.qcow2"])
        assert (await volumes.get("whole")).state is VolumeState.READY
    for name in ("half", "doomed", "gone"):
        await volumes.create(name, MiB, ImageFormat.QCOW2)


def stored(volume: Volume, state: VolumeState) -> Put:
    """The record of a volume in a state in which a kill can leave it."""
    return Put(f"volume/{volume.name}", volume.but(state=state).to_json())
