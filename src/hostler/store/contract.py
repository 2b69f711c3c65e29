"""The contract every store keeps (the embedded one now, etcd later): keys, revisions, compare-and-swap, watch.

Keys are slash-separated paths ("vm/3f2c..."); values are JSON objects. Each successful transaction that writes gets the
next revision; an entry carries the revision of its last change. A transaction's checks and writes are one atomic step.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue

Value = dict[str, JsonValue]

ABSENT = 0
"""As the revision of a Check: the key must not exist."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: Value
    revision: int


@dataclass(frozen=True, slots=True)
class Check:
    """The key must have exactly this revision (ABSENT: must not exist)."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: Value


@dataclass(frozen=True, slots=True)
class Delete:
    """Deleting a key that does not exist is not an error."""

    key: str


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch tells. `value` None: deleted."""

    key: str
    value: Value | None
    revision: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """`durable`: survives a power cut once it returned (ownership changes); otherwise it survives a killed process."""

    writes: Sequence[Put | Delete]
    checks: Sequence[Check] = field(default=())
    durable: bool = False


class CheckFailed(Exception):
    """A check did not hold; nothing was written. `key` is the first that failed."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


class Store(Protocol):
    async def get(self, key: str) -> Entry | None: ...
    async def list(self, prefix: str) -> Sequence[Entry]:
        """Every entry whose key starts with `prefix`, ordered by key, at one revision."""

    async def commit(self, transaction: Transaction) -> int:
        """Apply it; returns the new revision. CheckFailed if a check does not hold."""

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Every change from the call on, in order, none missed. A consumer that falls 10,000 changes behind gets
        CheckFailed(prefix) and must list again."""

    async def close(self) -> None: ...
