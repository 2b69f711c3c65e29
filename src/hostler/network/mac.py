"""MAC addresses for virtual adapters. Pure: the randomness comes from the caller."""

from __future__ import annotations

from collections.abc import Callable

PREFIX = "52:54:00"
"""The range QEMU's community uses for virtual adapters (locally administered bit set): known to people and tools."""


def new_mac(random_bytes: Callable[[int], bytes]) -> str:
    """A fresh address; `random_bytes(n)` gives n random bytes (`secrets.token_bytes`)."""
    return PREFIX + "".join(f":{byte:02x}" for byte in random_bytes(3))
