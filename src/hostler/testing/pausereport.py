"""What a row of numbered signs of life tells about a guest: how long it was silent, and whether it is still the same.

Pure: the pause meter collects, this judges. Times in ns of CLOCK_MONOTONIC, which all processes of a machine share;
results in ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

NS_PER_MS = 1_000_000
LISTED = 5
"""Holes listed in a report."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One sign of life. `number` is its sequence number; `count`, `clock` (ns) and `boot` are the guest's counter,
    clock and boot id, `boot` "" where the way of asking does not tell; `sent` (ns) is known for what was asked for;
    `way` tells several sources apart."""

    at: int
    number: int
    count: int
    clock: int
    boot: str = ""
    sent: int | None = None
    way: int = 0


@dataclass(frozen=True, slots=True)
class Hole:
    """`start` in seconds of the monotonic clock; `before` and `after` are the ways of the signs around it (-1: end)."""

    ms: float
    start: float
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class PauseReport:
    """`longest_gap` is the longest time without a sign of life, the silence at the end included. `lost` and
    `reordered` count sequence numbers; `went_back` counts signs of an earlier state than one already seen (a copy of
    the guest, or a restored one); more than one of `boots` is a reboot."""

    sent: int
    received: int
    lost: int
    duplicates: int
    reordered: int
    went_back: int
    boots: int
    longest_gap: float
    median_gap: float
    gaps: tuple[Hole, ...]
    guest_gap: float
    """Longest step of the guest's own clock between two signs."""
    rtt: dict[str, float]
    """Round trip: p50, p90, p99, max; empty where nothing was asked."""
    pending: int = 0
    """Those of `lost` after the last that was heard: their answers may have been under way."""
    handover_gap: float = 0.0
    """Longest silence between signs by different ways: the hand-over itself, where each side is a way of its own. The
    longest gap of a move may lie elsewhere: QEMU halts the guest at the start, too, to set up its dirty log."""

    @property
    def continuous(self) -> bool:
        """Whether it is one guest that went on: heard at all, one boot, never back. Datagrams may overtake each other
        on their way to the guest, which then answers the later one first: that is seen as reordering as well. A copy of
        the guest that answers is seen to go back without any reordering."""
        return self.received > 0 and self.boots <= 1 and self.went_back <= self.reordered


def summarise(arrivals: Sequence[Arrival], sent: int | None, end: int) -> PauseReport:
    """Judge the signs in the order they came. `sent`: requests made, or None where the guest sends by itself (then the
    numbers between first and last count as sent). `end`: when listening ended."""
    fresh = _without_duplicates(arrivals)
    numbers = [arrival.number for arrival in fresh]
    made = sent if sent is not None else (max(numbers) - min(numbers) + 1 if numbers else 0)
    holes = _holes(fresh, end)
    return PauseReport(
        sent=made,
        received=len(fresh),
        lost=made - len(fresh),
        duplicates=len(arrivals) - len(fresh),
        reordered=sum(b < a for a, b in pairwise(numbers)),
        went_back=_went_back(fresh),
        boots=len({arrival.boot for arrival in fresh if arrival.boot}),
        longest_gap=max((hole.ms for hole in holes), default=0.0),
        median_gap=median([hole.ms for hole in holes]) if holes else 0.0,
        gaps=tuple(sorted(holes, key=lambda hole: -hole.ms)[:LISTED]),
        guest_gap=max(((b.clock - a.clock) / NS_PER_MS for a, b in pairwise(fresh)), default=0.0),
        rtt=_percentiles([(a.at - a.sent) / NS_PER_MS for a in fresh if a.sent is not None]),
        handover_gap=max((hole.ms for hole in holes if -1 != hole.after != hole.before), default=0.0),
        pending=sent - 1 - max(numbers, default=-1) if sent is not None else 0,
    )


def _without_duplicates(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Numbers start again after a reboot, so a sign is known by boot and number."""
    seen: dict[tuple[str, int], Arrival] = {}
    for arrival in arrivals:
        seen.setdefault((arrival.boot, arrival.number), arrival)
    return list(seen.values())


def _went_back(arrivals: Sequence[Arrival]) -> int:
    """Later numbers with a counter or a clock not beyond the highest of a lower number of the same boot."""
    back = 0
    highest: dict[str, tuple[int, int]] = {}
    for arrival in sorted(arrivals, key=lambda one: one.number):
        count, clock = highest.get(arrival.boot, (-1, -1))
        back += arrival.count <= count or arrival.clock < clock
        highest[arrival.boot] = (max(count, arrival.count), max(clock, arrival.clock))
    return back


def _holes(arrivals: Sequence[Arrival], end: int) -> list[Hole]:
    holes = [Hole((b.at - a.at) / NS_PER_MS, a.at / 1e9, a.way, b.way) for a, b in pairwise(arrivals)]
    if arrivals:
        last = arrivals[-1]
        holes.append(Hole((end - last.at) / NS_PER_MS, last.at / 1e9, last.way, -1))
    return holes


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * part))] for name, part in _PARTS.items()}
    return {**at, "max": ordered[-1]}


_PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
