"""What every image of a chain is to the others: a disk of a size, an identity, perhaps a parent, and its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from hostler.storage.chains.source import ImageFile, Piece

MAX_NAMES = 16
"""Names of its parent that an image may give; the VHD header has room for nine, a VHDX uses three."""
MAX_NAME = 4096
"""Characters of one such name."""


@dataclass(frozen=True, slots=True)
class ParentLink:
    """What an image says about its parent. `ids`: any of them is right; `names`: paths as written, the relative one
    first; `stamp`: when the parent was last written, in seconds since 1970, or None where the format does not say."""

    ids: tuple[UUID, ...]
    names: tuple[str, ...]
    stamp: int | None = None


class Layer(Protocol):
    """One open image. `format`: "vhd", "vhd-fixed" or "vhdx"; `size`: bytes that a guest sees; `log_pending`: whether
    its log had to be replayed (in memory) to read it."""

    @property
    def file(self) -> ImageFile: ...

    @property
    def format(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def id(self) -> UUID: ...

    @property
    def dynamic(self) -> bool: ...

    @property
    def link(self) -> ParentLink | None: ...

    @property
    def log_pending(self) -> bool: ...

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Where the bytes from `start` to `end` are, in order and without gaps; read as it goes, in little memory.
        BadImage."""
