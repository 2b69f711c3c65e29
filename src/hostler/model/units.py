"""Sizes as people write them. Bytes inside, always integers; binary units (1 GiB = 2**30), as QEMU counts."""

from __future__ import annotations

import re

from hostler.model.errors import InvalidInput

KiB = 1024
MiB = 1024**2
GiB = 1024**3
TiB = 1024**4

_SUFFIX = {"k": KiB, "m": MiB, "g": GiB, "t": TiB}
_SIZE = re.compile(r"\s*(\d{1,15})(?:\.(\d{1,6}))?\s*(?:b|([kmgt])(?:ib?|b)?)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes for "512", "512M", "1.5 GiB", "10gb", "2Gi". InvalidInput for anything else, also for parts of a byte."""
    match = _SIZE.fullmatch(text)
    if match is None or (match[2] and not match[3]):
        raise InvalidInput(f"size {text!r}", "is not a size", "write a number with K, M, G or T, for example 20G")
    whole, fraction, suffix = match.groups()
    unit = _SUFFIX[suffix.lower()] if suffix else 1
    extra = int(fraction) * unit // 10 ** len(fraction) if fraction else 0
    return int(whole) * unit + extra


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_size(size: int) -> str:
    """A short text such as "1.5 GiB"; exact below 1 KiB. Whole MiB and GiB that rounding would falsify stay what they
    are: 2040 GiB is a limit, 2.0 TiB is above it."""
    power = 0
    while power < len(_UNITS) - 1 and abs(size) >= 1024 ** (power + 1):
        power += 1
    if power >= 3 and size * 10 % 1024**power and size % 1024 ** (power - 1) == 0:
        power -= 1
    value = size / 1024**power
    return f"{value:.0f} {_UNITS[power]}" if value == int(value) else f"{value:.1f} {_UNITS[power]}"
