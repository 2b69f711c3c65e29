"""Names and identifiers: what is allowed, and the nearest known name for a mistyped one."""

from __future__ import annotations

import difflib
import re
import unicodedata
import uuid
from collections.abc import Iterable

from hostler.model.errors import InvalidInput

MAX_NAME = 100
"""Hyper-V's own ElementName limit is 100 characters; more would not survive a round trip through WMI."""


_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def new_id() -> str:
    """A fresh random identifier (UUID version 4, lower case)."""
    return str(uuid.uuid4())


def is_id(text: str) -> bool:
    """Whether this has the form of an identifier as `new_id` makes them."""
    return _ID.fullmatch(text) is not None


def check_name(kind: str, name: str) -> str:
    """`name` if it may name an object of `kind`; InvalidInput otherwise.

    1 to 100 printable characters, no slash (names stand in URLs and file names), no line breaks, no surrounding blanks,
    not starting with a dash (it would look like an option), not "." or "..", and not in the form of an identifier
    (objects are found by either: a name that is another object's id would hide one of them).
    """
    cause = ""
    if not 1 <= len(name) <= MAX_NAME:
        cause = f"has {len(name)} characters, allowed are 1 to {MAX_NAME}"
    elif name != name.strip():
        cause = "starts or ends with a blank"
    elif name.startswith("-") or name in (".", ".."):
        cause = "starts with a dash or is a path of its own"
    elif any(c in "/\\" or unicodedata.category(c) in _UNPRINTABLE for c in name):
        cause = "has a slash, a line break or a control character"
    elif _ID.fullmatch(name):
        cause = "has the form of an identifier"
    if cause:
        raise InvalidInput(f"{kind} name {name[:MAX_NAME]!r}", cause, "choose another name")
    return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, for "did you mean"; None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
