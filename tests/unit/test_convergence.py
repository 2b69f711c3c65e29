"""When a copy is near enough, and when its guest writes too much."""

from __future__ import annotations

import pytest

from hostler.host.convergence import LEAST, PAUSE, SMALL, STAYS, WINDOW, Convergence, Verdict
from hostler.host.operations.copying import braked
from hostler.model.disk import IoLimits
from hostler.model.units import GiB, MiB

pytestmark = pytest.mark.unit


def run(copy: int, dirty: int, seconds: float, size: int = 1 * GiB, near: Convergence | None = None) -> list[Verdict]:
    """The verdicts other than GO_ON on a copy of so many bytes/s whose guest writes so many again."""
    found, near = [], near or Convergence()
    step = 0.25
    done, total = 0, size
    for tick in range(int(seconds / step)):
        verdict = near.look(tick * step, done, total)
        if verdict is not Verdict.GO_ON:
            found.append(verdict)
        if verdict is Verdict.SWITCH:
            break
        done = min(total, done + int(copy * step))
        total += int(dirty * step)
    return found


def test_a_guest_that_writes_little_is_left_alone() -> None:
    assert run(copy=100 * MiB, dirty=10 * MiB, seconds=60) == [Verdict.SWITCH]


def test_a_large_disk_takes_its_time() -> None:
    assert run(copy=100 * MiB, dirty=50 * MiB, seconds=120, size=1024 * GiB) == []


def test_a_guest_that_writes_as_fast_as_is_copied_is_slowed_down_more_and_more() -> None:
    near = Convergence()
    assert run(100 * MiB, 100 * MiB, 3 * WINDOW + 1, near=near) == [Verdict.BRAKE] * 3
    assert near.allowed <= 100 * MiB / 8 * 1.1
    for _ in range(30):
        run(100 * MiB, 100 * MiB, WINDOW + 1, near=near)
    assert near.allowed >= LEAST


def test_a_copy_that_stands_still_is_nobodys_fault() -> None:
    assert run(copy=0, dirty=100 * MiB, seconds=60) == []


def test_a_rest_that_fits_into_the_pause_is_enough() -> None:
    near = Convergence()
    fast = 1 * GiB
    assert near.look(0, 0, 10 * GiB) is Verdict.GO_ON
    rest = int(fast * PAUSE) - 1
    assert rest > SMALL
    for tick in range(1, 20):
        done = fast * tick // 4
        verdict = near.look(tick / 4, done, done + rest)
        assert verdict is (Verdict.SWITCH if (tick - 1) / 4 >= STAYS else Verdict.GO_ON)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (IoLimits(), IoLimits(bandwidth_write=10)),
        (IoLimits(iops=7), IoLimits(iops=7, bandwidth_write=10)),
        (IoLimits(bandwidth=50, bandwidth_burst=60), IoLimits(bandwidth_read=50, bandwidth_write=10)),
        (IoLimits(bandwidth=5), IoLimits(bandwidth_read=5, bandwidth_write=5)),
        (IoLimits(bandwidth_read=9, bandwidth_write=3), IoLimits(bandwidth_read=9, bandwidth_write=3)),
    ],
)
def test_the_brake_lies_within_the_limits(own: IoLimits, expected: IoLimits) -> None:
    assert braked(own, 10) == expected
