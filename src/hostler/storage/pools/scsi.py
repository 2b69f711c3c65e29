"""What LUNs say of themselves: their list, their kind, their name, their size. SPC-4 and SBC-3.

What is parsed here came from outside: a malformed answer is an absence, never an exception of another kind.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hostler.storage.pools.iscsi_wire import Refused, Session

MAX_LUNS = 1024
"""LUNs of one target that are looked at."""
_DISK = 0x00
_ILLEGAL_REQUEST = 0x05
_NAA, _EUI64, _T10, _NAME = 3, 2, 1, 8
_LOCALLY_ASSIGNED = 3
"""NAA 3h: unique where it was assigned, nowhere else (SPC-4, 7.8.6.6.4)."""


@dataclass(frozen=True, slots=True)
class Lun:
    """A disk behind a target. `name` is worldwide unique, or "" where it has none such; `size` in bytes."""

    number: int
    name: str
    size: int
    thin: bool = False


async def luns(session: Session) -> list[int]:
    """The numbers of the LUNs, ascending, at most MAX_LUNS."""
    length = 8 + 8 * MAX_LUNS
    answer = await session.command(0, struct.pack(">BBBBBBIBB", 0xA0, 0, 0, 0, 0, 0, length, 0, 0), length)
    return sorted(set(_numbers(answer)))


def _numbers(answer: bytes) -> Iterator[int]:
    for at in range(8, len(answer) - 7, 8):
        method, first, second = answer[at] >> 6, answer[at] & 0x3F, answer[at + 1]
        if method == 0 and first == 0:  # peripheral device addressing on bus 0
            yield second
        elif method == 1:  # flat space addressing
            yield first << 8 | second


async def describe(session: Session, number: int, target: str) -> Lun | None:
    """That LUN; None when it is no disk, or not there."""
    try:
        kind = await session.command(number, bytes([0x12, 0, 0, 0, 96, 0]), 96)
        if not kind or kind[0] != _DISK:  # qualifier 0: connected; a LUN that is not there answers 0x7f
            return None
        size, thin = await _capacity(session, number)
        name = await _name(session, number, target)
    except Refused:
        return None
    return Lun(number, name, size, thin) if size else None


async def _capacity(session: Session, number: int) -> tuple[int, bool]:
    try:
        answer = await session.command(number, struct.pack(">BB8xIBB", 0x9E, 0x10, 32, 0, 0), 32)
        if len(answer) >= 12:
            last, block = struct.unpack_from(">QI", answer)
            return (last + 1) * block, len(answer) > 14 and bool(answer[14] & 0x80)
    except Refused as error:
        if error.key != _ILLEGAL_REQUEST:
            raise
    answer = await session.command(number, bytes([0x25]) + bytes(9), 8)
    if len(answer) < 8:
        return 0, False
    last, block = struct.unpack(">II", answer)
    return (last + 1) * block, False


async def _name(session: Session, number: int, target: str) -> str:
    try:
        page = await session.command(number, bytes([0x12, 1, 0x83, 0x04, 0, 0]), 1024)
    except Refused:
        return ""  # it has no such page
    return best_name(page, target)


def best_name(page: bytes, target: str) -> str:
    """The most telling designator of the LUN itself in a device identification page. One that is unique only where it
    was assigned is told apart by the target's name."""
    found = dict(_designators(page))
    naa = found.get(_NAA, b"")
    known = len(naa) in (8, 16)
    if known and naa[0] >> 4 != _LOCALLY_ASSIGNED and any(naa[1:4]):
        return f"naa.{naa.hex()}"
    if len(found.get(_EUI64, b"")) in (8, 12, 16):
        return f"eui.{found[_EUI64].hex()}"
    if found.get(_NAME, b"").strip(b"\0"):
        return _printable(found[_NAME])
    if found.get(_T10, b"").strip(b"\0 "):
        return f"t10.{_printable(found[_T10])}@{target}"
    return f"naa.{naa.hex()}@{target}" if known else ""


def _designators(page: bytes) -> Iterator[tuple[int, bytes]]:
    """Those of the logical unit (association 0), by type; the last one of a type is the one that counts least."""
    if len(page) < 4 or page[1] != 0x83:
        return
    end = min(len(page), 4 + struct.unpack_from(">H", page, 2)[0])
    at, seen = 4, set()
    while at + 4 <= end:
        association, kind, length = page[at + 1] >> 4 & 3, page[at + 1] & 0x0F, page[at + 3]
        if association == 0 and kind not in seen and at + 4 + length <= end:
            seen.add(kind)
            yield kind, page[at + 4 : at + 4 + length]
        at += 4 + length


def _printable(value: bytes) -> str:
    text = value.strip(b"\0 ").decode("ascii", "replace")
    return "".join(c if c.isalnum() or c in ".:-_" else "_" for c in text)[:200]
