"""Which driver a pool has."""

from __future__ import annotations

from hostler.model.errors import HostLacks
from hostler.model.pool import Pool, PoolSecrets
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.pools.directory import DirectoryPool


def driver_of(pool: Pool, secrets: PoolSecrets) -> PoolDriver:
    """The driver of that pool. Reaches for nothing."""
    if pool.in_files:
        return DirectoryPool(pool)
    raise HostLacks(f"pool {pool.name}", f"pools of kind {pool.kind} are not known to this host", "update Hostler")
