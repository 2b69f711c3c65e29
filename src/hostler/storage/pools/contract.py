"""The contract every kind of pool keeps. tests/component/test_pool_contract.py runs on all of them.

Every method has a deadline of its own and never blocks the event loop, also when the storage hangs: TimedOut then. A
storage system that cannot be reached is NotFound or TimedOut; one that refuses us NotPermitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hostler.model.disk import ImageFormat
from hostler.model.pool import Connection, Features, Found, Health, Leftover, Pool, Refused, Usage
from hostler.model.volume import Volume

DEADLINE = 5.0
"""Seconds a pool may take to answer before it is called unreachable."""
SCAN_DEADLINE = 60.0
MAX_SCAN = 10_000
"""Entries of one pool that a scan looks at."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a pool. `truncated`: more than MAX_SCAN things are in it."""

    found: Sequence[Found] = ()
    refused: Sequence[Refused] = ()
    leftovers: Sequence[Leftover] = ()
    truncated: bool = False


class PoolDriver(Protocol):
    """One pool."""

    @property
    def pool(self) -> Pool: ...

    async def check(self) -> Health:
        """How it is now. Never raises: what is wrong is its answer."""

    async def usage(self) -> Usage:
        """What it holds and what is free."""

    async def features(self) -> Features | None:
        """What its file system can do; None for a pool that is not files."""

    async def scan(self, known: frozenset[str]) -> Contents:
        """What is in it; what is `known` (paths) is not looked into. Changes nothing."""

    def place(self, name: str, format: ImageFormat) -> str:
        """The path of a new volume. InvalidInput in a pool where none can be made."""

    async def find(self, path: str) -> Found:
        """What is at that path now. NotFound, and errors of the storage."""

    async def present(self, volumes: Sequence[Volume]) -> dict[str, Found]:
        """Which of these volumes are there, by path, with what they are now. Their content is not looked at."""

    async def allocated(self, volumes: Sequence[Volume]) -> int:
        """Bytes that these volumes take now."""

    async def remove_leftover(self, leftover: Leftover) -> None:
        """Remove a half-made file, if it still is one. NotPermitted."""

    async def connection(self) -> Connection | None:
        """How QEMU reaches it now (without files of secrets): by the first portal that answers. None for files."""
