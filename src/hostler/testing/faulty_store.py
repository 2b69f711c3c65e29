"""A store on a disk that fails on request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from hostler.store.contract import Change, Entry, Store, Transaction
from hostler.testing.faults import Faults


class FaultyStore:
    """Another store, with failures planned at "get", "list", "commit" (nothing is written) and "committed" (it is
    written, but nobody is told). Satisfies hostler.store.contract.Store."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store = store
        self.faults = faults

    async def get(self, key: str) -> Entry | None:
        """See Store."""
        await self.faults.enter("get")
        return await self._store.get(key)

    async def list(self, prefix: str) -> Sequence[Entry]:
        """See Store."""
        await self.faults.enter("list")
        return await self._store.list(prefix)

    async def commit(self, transaction: Transaction) -> int:
        """See Store."""
        await self.faults.enter("commit")
        revision = await self._store.commit(transaction)
        await self.faults.enter("committed")
        return revision

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """See Store."""
        return self._store.watch(prefix)

    async def close(self) -> None:
        """See Store."""
        await self._store.close()
