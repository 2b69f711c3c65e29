"""A pool as people see it, from what is known of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from hostler.model.pool import Features, Health, Pool, PoolState, PoolView
from hostler.model.units import format_size
from hostler.model.volume import Volume


def view_of(
    pool: Pool,
    health: Health,
    features: Features | None,
    volumes: Sequence[Volume],
    allocated: int,
    has_secret: bool,
    checked: datetime,
) -> PoolView:
    """The whole of it."""
    promised = sum(v.size for v in volumes)
    return PoolView(
        **dict(pool),
        state=health.state,
        text=health.text,
        latency=health.latency,
        capacity=health.usage.capacity,
        free=health.usage.free,
        allocated=allocated,
        promised=promised,
        volumes=len(volumes),
        features=features,
        has_secret=has_secret,
        warnings=tuple(warnings(pool, health, promised, allocated)),
        checked=checked,
    )


def warnings(pool: Pool, health: Health, promised: int, allocated: int) -> list[str]:
    """What its owner should know, as sentences."""
    found = []
    capacity, free = health.usage.capacity, health.usage.free
    if capacity and free is not None and health.state in (PoolState.LOW, PoolState.FULL):
        used = (capacity - free) * 100 // capacity
        found.append(f"{used} % of it are in use, {format_size(free)} are free (it warns at {pool.warn_at} %)")
    if capacity and free is not None and pool.makes and promised - allocated > free:
        found.append(
            f"its volumes may grow by {format_size(promised - allocated)}, but only {format_size(free)} are free:"
            " a guest that fills them is stopped until there is room"
        )
    return found
