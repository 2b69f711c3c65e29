"""The records of pools, and, apart from them, their secrets.

Both are in the store, whose file only the daemon's user can read. A pool and its secrets are written and removed in one
transaction; whatever is shown to anybody is made of the record alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostler.model.errors import AlreadyExists, Busy, NotFound
from hostler.model.names import nearest
from hostler.model.pool import Pool, PoolSecrets
from hostler.store.contract import CheckFailed, Store, Transaction
from hostler.store.table import Row, Table


class PoolBook:
    """Pools in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pools = Table(store, "pool", Pool)
        self._secrets = Table(store, "pool-secret", PoolSecrets)

    async def rows(self) -> Sequence[Row[Pool]]:
        """Every pool, by name."""
        return await self._pools.list()

    async def get(self, name: str) -> Row[Pool]:
        """That pool. NotFound with the nearest name."""
        row = await self._pools.find(name)
        if row is None:
            near = nearest(name, [r.id for r in await self.rows()])
            advice = f"did you mean {near!r}?" if near else "list the known ones with 'hostler pool list'"
            raise NotFound(f"pool {name}", "there is no such pool on this host", advice)
        return row

    async def secrets(self, name: str) -> PoolSecrets:
        """Its secrets; empty when it has none."""
        row = await self._secrets.find(name)
        return row.value if row else PoolSecrets()

    async def add(self, pool: Pool, secrets: PoolSecrets) -> None:
        """A new pool. AlreadyExists."""
        writes = [self._pools.put(pool.name, pool)]
        if secrets != PoolSecrets():
            writes.append(self._secrets.put(pool.name, secrets))
        try:
            await self._store.commit(Transaction(writes, [self._pools.absent(pool.name)], durable=True))
        except CheckFailed as error:
            raise AlreadyExists(f"pool {pool.name}", "there is a pool with that name", "choose another name") from error

    async def change(self, row: Row[Pool], pool: Pool, secrets: PoolSecrets | None = None) -> None:
        """Write a changed pool (its name stays), with `secrets` in place of the old ones. Busy when somebody else was
        faster."""
        writes = [self._pools.put(row.id, pool)]
        if secrets is not None:
            writes.append(self._secrets.put(row.id, secrets))
        await self._commit(Transaction(writes, [self._pools.at(row.id, row.revision)], durable=True), row.id)

    async def remove(self, row: Row[Pool]) -> None:
        """Forget a pool and its secrets."""
        writes = [self._pools.remove(row.id), self._secrets.remove(row.id)]
        await self._commit(Transaction(writes, [self._pools.at(row.id, row.revision)], durable=True), row.id)

    async def _commit(self, transaction: Transaction, name: str) -> None:
        try:
            await self._store.commit(transaction)
        except CheckFailed as error:
            raise Busy(f"pool {name}", "was changed by somebody else at the same moment", "try again") from error
