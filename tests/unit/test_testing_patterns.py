"""What the micro guest is made of and what it writes, as far as plain functions say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostler.model.errors import HostLacks
from hostler.testing import microguest, patterns
from hostler.testing.initramfs import Member, archive, load_order, parse_modules_dep

pytestmark = pytest.mark.unit

SLOTS = 4


def journal(*numbers: int) -> list[bytes]:
    return [patterns.journal_block(3, number, stamp=100 + number) for number in numbers]


def test_the_pattern_is_the_published_sequence() -> None:
    # First outputs of SplitMix64 for seed 1234567, as its author's reference code prints them.
    assert [patterns.mix64(1234567, n) for n in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_any_part_of_a_pattern_is_the_same_as_in_the_whole() -> None:
    assert patterns.pattern(9, 512, 1024) == patterns.pattern(9, 4096)[1024:1536]


def test_a_whole_journal_is_sound() -> None:
    verdict = patterns.check_journal(journal(8, 9, 6, 7), 3, acked=9, slots=SLOTS)
    assert verdict.sound
    assert (verdict.checked, verdict.newest) == (4, 9)


def test_an_acknowledged_block_that_is_missing_is_lost() -> None:
    assert patterns.check_journal(journal(8, 5, 6, 7), 3, acked=9, slots=SLOTS).lost == (9,)


def test_the_write_under_way_may_be_there_or_not_or_half() -> None:
    for under_way in (*journal(6, 10), journal(10)[0][:2048] + journal(6)[0][2048:]):
        blocks = [*journal(8, 9), under_way, *journal(7)]
        assert patterns.check_journal(blocks, 3, acked=9, slots=SLOTS).sound


@pytest.mark.parametrize("block", [bytes(4096), journal(9)[0][:-1] + b"\0", journal(12)[0]])
def test_anything_but_a_block_of_that_slot_is_torn(block: bytes) -> None:
    blocks = [*journal(8), block, *journal(6, 7)]
    assert patterns.check_journal(blocks, 3, acked=9, slots=SLOTS).torn == (1,)


def test_modules_are_loaded_after_what_they_need() -> None:
    depends = parse_modules_dep("k/sd-mod.ko: k/scsi_mod.ko k/scsi_common.ko\nk/scsi_mod.ko: k/scsi_common.ko\n")
    order = load_order(["sd_mod", "scsi_mod", "not_there"], depends)
    assert order == ["k/scsi_common.ko", "k/scsi_mod.ko", "k/sd-mod.ko"]


def test_the_archive_is_the_same_for_the_same_members_and_makes_directories() -> None:
    members = [Member("init", b"x", 0o755), Member("lib/modules/a.ko", b"abc")]
    made = archive(members)
    assert made == archive(members)
    assert len(made) % 4 == 0
    assert made.count(b"070701") == len(["init", "lib", "lib/modules", "lib/modules/a.ko", "TRAILER!!!"])


def test_a_missing_kernel_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(HostLacks, match="cloud kernel") as caught:
        microguest.find_ingredients(boot=tmp_path, modules=tmp_path)
    assert caught.value.details["package"] == "linux-image-cloud-amd64"
