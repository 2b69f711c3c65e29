"""Chains of VHD and VHDX, written by an independent writer: content, links and their verdicts, logs, hostile names."""

from __future__ import annotations

import itertools
import os
import random
import uuid
from pathlib import Path

import pytest

from hostler.model.errors import BadImage
from hostler.model.links import LinkState
from hostler.model.units import MiB, TiB
from hostler.storage.chains import plan, vhdx_log
from hostler.storage.chains.chain import MAX_DEPTH, Chain, open_chain
from hostler.storage.chains.locate import candidates
from hostler.storage.chains.source import ZERO
from hostler.storage.chains.survey import survey
from hostler.testing import hyperv_vhd as vhd
from hostler.testing import hyperv_vhdx as vhdx

pytestmark = pytest.mark.unit

SIZE = 5 * MiB + 4096
"""Ends in the middle of a block of either format."""


def some_sectors(seed: int, size: int = SIZE, runs: int = 40) -> dict[int, bytes]:
    """Runs of sectors with content of their own, some in the last sector, some that touch block edges."""
    rng = random.Random(seed)
    last = size // 512
    starts = [rng.randrange(last) for _ in range(runs)] + [last - 1, 4095, 4096, 2047]
    chosen = {s for start in starts for s in range(start, min(last, start + rng.randrange(1, 20)))}
    return {sector: rng.randbytes(512) for sector in chosen}


def overlaid(size: int, *layers: dict[int, bytes]) -> bytes:
    disk = bytearray(size)
    for sectors in layers:
        for sector, data in sectors.items():
            disk[sector * 512 : sector * 512 + 512] = data
    return bytes(disk)


def content(chain: Chain) -> bytes:
    return plan.read(chain.layers, 0, chain.size)


def vhd_chain(place: Path, depth: int = 3) -> tuple[Path, bytes]:
    """A dynamic base and differencing images over it."""
    layers = [some_sectors(seed) for seed in range(depth)]
    last = (vhd.dynamic(place / "base.vhd", SIZE, layers[0]), place / "base.vhd")
    for number, sectors in enumerate(layers[1:], 1):
        path = place / f"Check Point {number}.avhd"
        last = (vhd.differencing(path, SIZE, sectors, last), path)
    return last[1], overlaid(SIZE, *layers)


def vhdx_chain(place: Path, depth: int = 3) -> tuple[Path, bytes]:
    layers = [some_sectors(seed) for seed in range(depth)]
    last = (vhdx.Vhdx(SIZE, layers[0]).write(place / "base.vhdx"), place / "base.vhdx")
    for number, sectors in enumerate(layers[1:], 1):
        path = place / f"point{number}.avhdx"
        last = (vhdx.Vhdx(SIZE, sectors, vhdx.Parent.of(*last)).write(path), path)
    return last[1], overlaid(SIZE, *layers)


@pytest.mark.parametrize("make", [vhd_chain, vhdx_chain])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_chain_reads_as_its_layers_over_each_other(tmp_path: Path, make: object, depth: int) -> None:
    assert callable(make)
    top, disk = make(tmp_path, depth)
    with open_chain(str(top)) as chain:
        chain.require_sound()
        assert len(chain.layers) == depth
        assert content(chain) == disk
        for start, length in ((0, 512), (SIZE - 512, 512), (2 * MiB - 512, 1024), (123 * 512, 3 * MiB)):
            assert plan.read(chain.layers, start, length) == disk[start : start + length]


def test_extents_follow_each_other_without_gaps_and_neighbours_differ(tmp_path: Path) -> None:
    with open_chain(str(vhd_chain(tmp_path)[0])) as chain:
        found = list(plan.extents(chain.layers, 0, chain.size))
    assert found[0].offset == 0
    assert found[-1].end == SIZE
    for one, following in itertools.pairwise(found):
        assert one.end == following.offset
        assert not (one.at == following.at == ZERO)
        assert (one.source, one.at + one.length) != (following.source, following.at)


def test_a_fixed_parent(tmp_path: Path) -> None:
    base, over = some_sectors(1), some_sectors(2)
    id = vhd.fixed(tmp_path / "base.vhd", overlaid(SIZE, base))
    vhd.differencing(tmp_path / "top.avhd", SIZE, over, (id, tmp_path / "base.vhd"))
    with open_chain(str(tmp_path / "top.avhd")) as chain:
        assert content(chain) == overlaid(SIZE, base, over)


def test_what_a_guest_writes_at_the_start_of_a_fixed_vhd_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.vhd").write_bytes(b"s" * 4096)
    evil = tmp_path / "evil.avhd"
    vhd.differencing(evil, SIZE, {}, (uuid.uuid4(), tmp_path / "secret.vhd"))
    disk = evil.read_bytes().ljust(SIZE, b"\0")
    vhd.fixed(tmp_path / "disk.vhd", disk)
    with open_chain(str(tmp_path / "disk.vhd")) as chain:
        assert [layer.format for layer in chain.layers] == ["vhd-fixed"]
        assert content(chain) == disk


def test_a_block_that_a_vhdx_has_zeroed_hides_the_parent(tmp_path: Path) -> None:
    base = {sector: b"b" * 512 for sector in range(0, SIZE // 512, 7)}
    id = vhdx.Vhdx(SIZE, base).write(tmp_path / "base.vhdx")
    parent = vhdx.Parent.of(id, tmp_path / "base.vhdx")
    vhdx.Vhdx(SIZE, {5000: b"c" * 512}, parent, full=(2,), zeroed=(0, 4)).write(tmp_path / "top.avhdx")
    disk = bytearray(overlaid(SIZE, base))
    disk[0:MiB] = disk[4 * MiB : 5 * MiB] = disk[2 * MiB : 3 * MiB] = bytes(MiB)
    disk[5000 * 512 : 5001 * 512] = b"c" * 512
    with open_chain(str(tmp_path / "top.avhdx")) as chain:
        assert content(chain) == bytes(disk)


def test_several_chunks_of_bitmaps(tmp_path: Path) -> None:
    """One bitmap block is for 4 GiB of 512-byte sectors."""
    size = 9 * 1024 * MiB
    base = {sector: sector.to_bytes(8, "little") * 64 for sector in (0, 8_388_607, 8_388_608, 16_777_216, 18_874_367)}
    over = {sector + step: b"over" * 128 for sector in (4, 8_388_612, 18_874_360) for step in (0, 2, 3)}
    id = vhdx.Vhdx(size, base, block=32 * MiB).write(tmp_path / "base.vhdx")
    vhdx.Vhdx(size, over, vhdx.Parent.of(id, tmp_path / "base.vhdx"), block=32 * MiB).write(tmp_path / "top.avhdx")
    with open_chain(str(tmp_path / "top.avhdx")) as chain:
        chain.require_sound()
        for sector, data in {**base, **over}.items():
            assert plan.read(chain.layers, sector * 512, 512) == data
        extents = list(plan.extents(chain.layers, 0, size))
    assert sum(e.length for e in extents) == size


# links


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    top, _ = vhd_chain(tmp_path, 2)
    (tmp_path / "base.vhd").rename(tmp_path / "elsewhere.vhd")
    with open_chain(str(top)) as chain:
        assert [link.state for link in chain.links] == [LinkState.MISSING]
        with pytest.raises(BadImage, match=r"base\.vhd"):
            chain.require_sound()


@pytest.mark.parametrize(("make", "depth"), [(vhd_chain, 2), (vhdx_chain, 2)])
def test_another_image_in_the_parents_place_is_not_taken(tmp_path: Path, make: object, depth: int) -> None:
    assert callable(make)
    top, _ = make(tmp_path, depth)
    base = next(tmp_path.glob("base.*"))
    (vhd.dynamic if base.suffix == ".vhd" else lambda path, size, s: vhdx.Vhdx(size, s).write(path))(base, SIZE, {})
    with open_chain(str(top)) as chain:
        assert [link.state for link in chain.links] == [LinkState.FOREIGN]


def test_of_two_files_with_the_name_the_right_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    top, disk = vhd_chain(tmp_path / "a", 2)
    os.rename(tmp_path / "a/base.vhd", tmp_path / "b/base.vhd")
    vhd.dynamic(tmp_path / "a/base.vhd", SIZE, {})
    with open_chain(str(top), [str(tmp_path / "b")]) as chain:
        chain.require_sound()
        assert content(chain) == disk


def test_the_parents_time_is_a_warning(tmp_path: Path) -> None:
    top, disk = vhd_chain(tmp_path, 2)
    os.utime(tmp_path / "base.vhd", (1, 1))
    with open_chain(str(top)) as chain:
        chain.require_sound()
        assert "another time" in chain.links[0].warnings[0]
        assert content(chain) == disk


def test_a_child_larger_than_its_parent_reads_zeroes_at_its_end(tmp_path: Path) -> None:
    id = vhdx.Vhdx(SIZE, {0: b"x" * 512}).write(tmp_path / "base.vhdx")
    vhdx.Vhdx(SIZE + 3 * MiB, {9: b"y" * 512}, vhdx.Parent.of(id, tmp_path / "base.vhdx")).write(tmp_path / "top.avhdx")
    with open_chain(str(tmp_path / "top.avhdx")) as chain:
        assert "larger" in chain.links[0].warnings[0]
        assert content(chain) == overlaid(SIZE + 3 * MiB, {0: b"x" * 512, 9: b"y" * 512})


def test_a_chain_that_leads_back_to_itself(tmp_path: Path) -> None:
    one, two = uuid.uuid4(), uuid.uuid4()
    (tmp_path / "a.avhd").touch()
    vhd.differencing(tmp_path / "b.avhd", SIZE, {}, (one, tmp_path / "a.avhd"), id=two)
    vhd.differencing(tmp_path / "a.avhd", SIZE, {}, (two, tmp_path / "b.avhd"), id=one)
    with open_chain(str(tmp_path / "a.avhd")) as chain:
        assert [link.state for link in chain.links] == [LinkState.SOUND, LinkState.LOOP]
    report = survey(str(tmp_path))
    assert {image.link for image in report.images} == {LinkState.LOOP}


def test_a_chain_too_deep(tmp_path: Path) -> None:
    last = (vhd.dynamic(tmp_path / "0.vhd", MiB, {}), tmp_path / "0.vhd")
    for number in range(1, MAX_DEPTH + 1):
        path = tmp_path / f"{number}.avhd"
        last = (vhd.differencing(path, MiB, {}, last), path)
    with open_chain(str(tmp_path / f"{MAX_DEPTH - 1}.avhd")) as chain:
        chain.require_sound()
        assert content(chain) == bytes(MiB)
    with open_chain(str(last[1])) as chain:
        assert chain.links[-1].state is LinkState.TOO_DEEP
        assert len(chain.layers) == MAX_DEPTH


# names


def test_where_a_parent_is_looked_for() -> None:
    names = ("..\\Virtual Hard Disks\\base.vhd", "D:\\VMs\\web\\Virtual Hard Disks\\base.vhd")
    assert list(candidates(names, "/in/web/Snapshots", ["/in/web"])) == [
        "/in/web/Virtual Hard Disks/base.vhd",
        "/in/web/Snapshots/Virtual Hard Disks/base.vhd",
        "/in/web/Snapshots/base.vhd",
        "/in/web/Snapshots/web/Virtual Hard Disks/base.vhd",
        "/in/web/base.vhd",
        "/in/web/web/Virtual Hard Disks/base.vhd",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "..\\..\\etc\\shadow",
        "/etc/shadow",
        "C:\\..\\..\\etc\\shadow",
        "\\\\server\\share\\..\\..\\etc\\shadow",
        "\\\\?\\Volume{0}\\..\\shadow",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 5000,
        "\ud800",
    ],
)
def test_no_name_leads_out(name: str) -> None:
    for path in candidates([name], "/in/vm", ["/search"]):
        assert path.startswith(("/in/vm/", "/search/"))
        assert ".." not in path.split("/")


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    top, disk = vhd_chain(inside, 2)
    os.rename(inside / "base.vhd", outside / "base.vhd")
    (inside / "base.vhd").symlink_to(outside / "base.vhd")
    with open_chain(str(top)) as chain:
        assert [link.state for link in chain.links] == [LinkState.MISSING]
    with open_chain(str(top), [str(outside)]) as chain:
        assert content(chain) == disk


def test_a_name_in_another_case_is_found(tmp_path: Path) -> None:
    top, disk = vhd_chain(tmp_path, 2)
    os.rename(tmp_path / "base.vhd", tmp_path / "BASE.Vhd")
    with open_chain(str(top)) as chain:
        assert content(chain) == disk


# surveys


def test_a_directory_is_a_tree_with_several_children_of_one_parent(tmp_path: Path) -> None:
    id = vhd.dynamic(tmp_path / "base.vhd", SIZE, {})
    first = vhd.differencing(tmp_path / "a.avhd", SIZE, {}, (id, tmp_path / "base.vhd"))
    vhd.differencing(tmp_path / "b.avhd", SIZE, {}, (id, tmp_path / "base.vhd"))
    vhd.differencing(tmp_path / "c.avhd", SIZE, {}, (first, tmp_path / "a.avhd"))
    (tmp_path / "broken.vhd").write_bytes(b"conectix" * 100)
    (tmp_path / "notes.txt").write_text("no image")
    found = {Path(image.path).name: image for image in survey(str(tmp_path)).images}
    assert {name: image.parent and Path(image.parent).name for name, image in found.items()} == {
        "base.vhd": None,
        "a.avhd": "base.vhd",
        "b.avhd": "base.vhd",
        "c.avhd": "a.avhd",
        "broken.vhd": None,
    }
    assert found["broken.vhd"].link is LinkState.DAMAGED
    assert found["c.avhd"].link is LinkState.SOUND
    assert not survey(str(tmp_path)).sound
    assert survey(str(tmp_path / "c.avhd")).sound


# logs


def page(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(4096)


@pytest.mark.parametrize("at", [0, 64 * 1024, vhdx.LOG_LENGTH - 8192, vhdx.LOG_LENGTH - 4096])
def test_a_pending_log_is_replayed_in_memory_only(tmp_path: Path, at: int) -> None:
    """Also one that goes over the end of the log's place."""
    whole, crashed = tmp_path / "whole.vhdx", tmp_path / "crashed.vhdx"
    disk = overlaid(SIZE, sectors := some_sectors(3))
    vhdx.Vhdx(SIZE, sectors).write(whole)
    table = page(whole, vhdx.TABLE_AT)
    crashed.write_bytes(whole.read_bytes())
    with crashed.open("r+b") as file:
        file.seek(vhdx.TABLE_AT)
        file.write(bytes(4096))
    vhdx.crash(crashed, [(vhdx.TABLE_AT, b"\xff" * 4096), (vhdx.TABLE_AT, table)], at)
    before = crashed.read_bytes()
    with open_chain(str(crashed)) as chain:
        assert chain.layers[0].log_pending
        assert content(chain) == disk
    assert crashed.read_bytes() == before
    assert survey(str(crashed)).images[0].log_pending


def test_a_log_may_hold_data_and_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    vhdx.Vhdx(SIZE, {sector: b"o" * 512 for sector in range(2048)}).write(path)
    data_at = vhdx.TABLE_AT + MiB
    vhdx.crash(path, [(data_at + 8192, b"n" * 4096)], zeroes={data_at: 16_384})
    with open_chain(str(path)) as chain:
        disk = content(chain)
    assert disk[:16_384] == bytes(8192) + b"n" * 4096 + bytes(4096)
    assert disk[16_384:MiB] == b"o" * (MiB - 16_384)


def test_a_torn_last_entry_leaves_the_log_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    vhdx.Vhdx(SIZE, {}).write(path)
    place = vhdx.TABLE_AT
    vhdx.crash(path, [(place, bytes(4096)), (place, b"\xff" * 4096)])
    with path.open("r+b") as file:
        file.seek(vhdx.LOG_AT + 8192 + 4096 + 100)  # in the data sector of the second entry
        file.write(b"torn")
    with open_chain(str(path)) as chain:
        assert content(chain) == bytes(SIZE)


def test_an_image_cut_off_below_its_log_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    vhdx.Vhdx(SIZE, some_sectors(4)).write(path)
    vhdx.crash(path, [(vhdx.TABLE_AT, page(path, vhdx.TABLE_AT))])
    os.truncate(path, path.stat().st_size - MiB)
    with pytest.raises(BadImage, match="shorter than its log"):
        open_chain(str(path))


def test_patches_over_each_other() -> None:
    rng = random.Random(1)
    patches, memory = vhdx_log.Patches(), bytearray(b"." * 4000)
    for number in range(300):
        start, length = rng.randrange(3900), rng.randrange(1, 100)
        data = bytes([number % 251 + 1]) * length if rng.random() < 0.7 else None
        patches.put(start, length, data)
        memory[start : start + length] = data or bytes(length)
    seen = bytearray(b"." * 4000)
    for low, high, data in patches.within(0, 4000):
        seen[low:high] = data or bytes(high - low)
    assert seen == memory


# size


def test_two_tebibytes_are_planned_lazily(tmp_path: Path) -> None:
    """A sparse chain of 2 TiB: its first extents come at once, all of them in a moment."""
    id = vhd.dynamic(tmp_path / "base.vhd", 2 * TiB - 2 * MiB, {5: b"a" * 512, 4_000_000_000: b"b" * 512})
    vhd.differencing(tmp_path / "top.avhd", 2 * TiB - 2 * MiB, {7: b"c" * 512}, (id, tmp_path / "base.vhd"))
    with open_chain(str(tmp_path / "top.avhd")) as chain:
        found = list(plan.extents(chain.layers, 0, chain.size))
        assert plan.read(chain.layers, 4_000_000_000 * 512, 512) == b"b" * 512
    assert len(found) < 10
    assert found[-1].end == 2 * TiB - 2 * MiB
