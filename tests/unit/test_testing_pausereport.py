"""What the pause meter concludes from the signs of life it heard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hostler.testing.pausereport import Arrival, summarise

pytestmark = pytest.mark.unit

MS = 1_000_000


def sign(number: int, at_ms: float, boot: str = "a", way: int = 0) -> Arrival:
    at = int(at_ms * MS)
    return Arrival(at, number, count=number + 100, clock=number * MS, boot=boot, sent=at - MS, way=way)


def test_a_hole_is_found_with_its_place() -> None:
    report = summarise([sign(0, 0), sign(1, 2), sign(2, 80, way=1), sign(3, 82, way=1)], 4, end=83 * MS)
    assert (report.longest_gap, report.median_gap, report.handover_gap) == (78, 2, 78)
    assert (report.gaps[0].before, report.gaps[0].after, report.gaps[0].start) == (0, 1, 0.002)
    assert report.continuous
    assert report.rtt == {"p50": 1, "p90": 1, "p99": 1, "max": 1}


def test_a_guest_that_never_came_back_is_silent_until_the_end() -> None:
    report = summarise([sign(0, 0), sign(1, 2)], 500, end=1000 * MS)
    assert (report.longest_gap, report.gaps[0].after, report.handover_gap) == (998, -1, 0)
    assert report.lost == report.pending == 498


def test_a_guest_never_heard_is_not_called_continuous() -> None:
    report = summarise([], 10, end=5)
    assert (report.continuous, report.lost, report.pending, report.longest_gap) == (False, 10, 10, 0)


def test_lost_twice_and_out_of_order_are_counted_apart() -> None:
    report = summarise([sign(0, 0), sign(3, 1), sign(2, 2), sign(2, 3)], None, end=4 * MS)
    assert (report.sent, report.received, report.lost, report.duplicates, report.reordered) == (4, 3, 1, 1, 1)
    assert report.continuous


def test_a_reboot_is_not_the_same_guest() -> None:
    report = summarise([sign(0, 0), sign(0, 9, boot="b")], None, end=9 * MS)
    assert (report.boots, report.continuous) == (2, False)


def test_a_second_copy_gives_itself_away_by_its_counter() -> None:
    copy = replace(sign(2, 3), count=101)
    report = summarise([sign(0, 0), sign(1, 1), copy], 3, end=3 * MS)
    assert (report.went_back, report.continuous) == (1, False)
