"""QEMU's migration counters, read as progress people understand. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

from pydantic import JsonValue

from hostler.model.machine import MigrationEnd, MigrationResult
from hostler.model.migration import MigrationProgress

ENDS: Final[Mapping[str, MigrationEnd]] = {
    "completed": MigrationEnd.COMPLETED,
    "failed": MigrationEnd.FAILED,
    "cancelled": MigrationEnd.CANCELLED,
}
"""QEMU's MigrationStatus values (qapi/migration.json) after which nothing happens any more."""


def progress_of(info: Mapping[str, JsonValue]) -> MigrationProgress:
    """The reply of query-migrate as progress.

    QEMU gives megabits per second (`mbps`, of the last 100 ms) and pages per second (`dirty-pages-rate`, of the last
    whole second). `expected-downtime` is its own estimate, made from the same numbers.
    """
    ram = cast(Mapping[str, int | float], info.get("ram") or {})
    rate = int(ram.get("mbps", 0) * 1_000_000 / 8)
    dirty_rate = int(ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096))
    remaining = int(ram.get("remaining", 0))
    status = str(info.get("status", "none"))
    return MigrationProgress(
        status=status,
        transferred=int(ram.get("transferred", 0)),
        remaining=remaining,
        total=int(ram.get("total", 0)),
        rounds=int(ram.get("dirty-sync-count", 0)),
        dirty_rate=dirty_rate,
        rate=rate,
        elapsed=_milliseconds(info, "total-time") or 0,
        remaining_time=_remaining_time(remaining, rate, dirty_rate) if status in ("active", "device") else None,
        expected_pause=_milliseconds(info, "expected-downtime") if rate else None,
        downtime=_milliseconds(info, "downtime"),
    )


def result_of(info: Mapping[str, JsonValue], end: MigrationEnd, text: str = "") -> MigrationResult:
    """The reply of query-migrate after the end, as a result."""
    ram = cast(Mapping[str, int], info.get("ram") or {})
    return MigrationResult(
        end=end,
        text=text or str(info.get("error-desc", "")),
        downtime=_milliseconds(info, "downtime"),
        total_time=_milliseconds(info, "total-time"),
        transferred=int(ram.get("transferred", 0)),
    )


def _remaining_time(remaining: int, rate: int, dirty_rate: int) -> int | None:
    """Milliseconds until what remains and what is dirtied meanwhile has been sent; None when the guest dirties memory
    as fast as it is sent, or before there is a rate."""
    gain = rate - dirty_rate
    return remaining * 1000 // gain if gain > 0 else None


def _milliseconds(info: Mapping[str, JsonValue], key: str) -> int | None:
    value = info.get(key)
    return int(value) if isinstance(value, int | float) else None
