"""What the micro guest writes on its disks, computed from outside, so that an image can be checked without a guest.

The same arithmetic as `guest/pattern.c` and `guest/journal.c`; words are little-endian, as the guest's processor has
them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

BLOCK = 4096
"""Bytes of one block of the journal."""
DEFAULT_SLOTS = 1024
"""Blocks that the journal goes round in, unless told another span."""

_MASK = 2**64 - 1
_MAGIC = 0x484F53544C45524A  # "HOSTLERJ"


def mix64(seed: int, index: int) -> int:
    """The index-th word of the SplitMix64 sequence of a seed (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def pattern(seed: int, length: int, offset: int = 0) -> bytes:
    """What `write DISK SEED length offset` puts there. `length` and `offset` in bytes, multiples of 8."""
    words = range(offset // 8, (offset + length) // 8)
    return struct.pack(f"<{len(words)}Q", *(mix64(seed, word) for word in words))


@dataclass(frozen=True, slots=True)
class JournalVerdict:
    """What reading a journal back told. `newest` is the highest number found."""

    checked: int
    lost: tuple[int, ...]
    """Acknowledged numbers that are not on the disk."""
    torn: tuple[int, ...]
    """Slots that hold no whole block, the one of the write under way excepted."""
    newest: int

    @property
    def sound(self) -> bool:
        """Whether nothing that was acknowledged is missing or damaged."""
        return not self.lost and not self.torn


def check_journal(blocks: Iterable[bytes], seed: int, acked: int, slots: int = DEFAULT_SLOTS) -> JournalVerdict:
    """Judge the blocks of a journal, in the order of their slots, after the guest knew `acked` as acknowledged.

    A second of work for a thousand blocks: Python counts every word.
    """
    lost: list[int] = []
    torn: list[int] = []
    checked = newest = 0
    for slot, block in zip(range(slots), blocks, strict=False):
        expected = acked - (acked - slot) % slots if acked >= slot else 0
        if expected == 0:
            continue
        checked += 1
        number = _number(block, seed)
        if number is None or number % slots != slot:
            if (acked + 1) % slots != slot:
                torn.append(slot)
            continue
        newest = max(newest, number)
        if number < expected:
            lost.append(expected)
    return JournalVerdict(checked, tuple(lost), tuple(torn), newest)


def journal_block(seed: int, number: int, stamp: int) -> bytes:
    """The block that a guest writes as its `number`-th, at `stamp` on its clock."""
    base = seed ^ mix64(number, stamp)
    body = (mix64(base, word) for word in range(4, BLOCK // 8))
    return struct.pack(f"<{BLOCK // 8}Q", _MAGIC, seed, number, stamp, *body)


def _number(block: bytes, seed: int) -> int | None:
    """The number of a whole block of this seed; None where it is torn or foreign."""
    magic, found_seed, number, stamp = struct.unpack_from("<4Q", block)
    if magic != _MAGIC or found_seed != seed or len(block) != BLOCK:
        return None
    return int(number) if block == journal_block(seed, number, stamp) else None
