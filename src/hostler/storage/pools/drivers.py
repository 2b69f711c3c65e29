"""Which driver a pool has."""

from __future__ import annotations

from hostler.model.pool import Pool, PoolKind, PoolSecrets
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.pools.directory import DirectoryPool
from hostler.storage.pools.iscsi import IscsiPool
from hostler.storage.pools.nbd import NbdPool


def driver_of(pool: Pool, secrets: PoolSecrets) -> PoolDriver:
    """The driver of that pool. Reaches for nothing."""
    if pool.in_files:
        return DirectoryPool(pool)
    return IscsiPool(pool, secrets) if pool.kind is PoolKind.ISCSI else NbdPool(pool, secrets)
