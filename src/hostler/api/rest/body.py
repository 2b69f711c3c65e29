"""Reads the body of a request within bounds: size, time, and depth of the JSON in it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

MAX_BODY = 1024**2
"""Bytes. The largest sensible request, a VM with 260 disks, takes a tenth."""
MAX_DEPTH = 100
"""Nested arrays and objects. The model's own depth is 5, and one more for each layer of a disk (limit chain_depth, 64)
when a VM moves here; Python's parser gives up at about 1,000."""
BODY_TIME = 30.0
"""Seconds for the whole body."""
DRAIN = 16 * MAX_BODY
"""Bytes of a too large body that are read and thrown away, so that the client, which reads the answer only when it
has sent everything, sees why it was refused and not a broken connection."""

NAMES = ("name", "host", "volume", "device", "path", "directory", "source", "role", "mode")
"""Fields of a body that the audit trail repeats. None of them is ever a secret."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
"""A string (one without end too, so that none is looked at twice), or a bracket."""


async def bounded(request: Request) -> tuple[Request, bytes]:
    """The same request with its body read and found within bounds, and that body. HTTPException otherwise, with
    `connection: close` where the rest of the body is still under way."""
    try:
        async with asyncio.timeout(BODY_TIME):
            body = await _read(request)
    except TimeoutError as error:
        raise _refused(408, f"did not arrive within {BODY_TIME:.0f} s") from error
    if depth_of(body) > MAX_DEPTH:
        raise _refused(400, f"is nested deeper than {MAX_DEPTH} levels")
    return Request(request.scope, _replay(body, request.receive)), body


def depth_of(body: bytes) -> int:
    """How deep arrays and objects are nested (0: shallow enough without looking; counting stops above MAX_DEPTH).
    Does not parse: a parser would have to recurse to find out."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0  # cannot be too deep: the common case costs microseconds
    depth = deepest = 0
    for match in _STRUCTURE.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
        if deepest > MAX_DEPTH:
            break
    return deepest


def names_in(body: bytes) -> dict[str, str]:
    """The names a request is about, for the audit trail; {} when it is not a JSON object."""
    if not body or len(body) > 64 * 1024:
        return {}
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: value[name][:200] for name in NAMES if isinstance(value.get(name), str)}


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "0")
    too_large = announced.isdecimal() and int(announced) > MAX_BODY
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > MAX_BODY
        if too_large:
            chunks.clear()
        else:
            chunks.append(chunk)
        if size > DRAIN:
            break
    if too_large:
        raise _refused(413, f"is larger than {MAX_BODY} bytes")
    return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives the body that was read already, then what comes after (the disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _refused(status: int, cause: str) -> HTTPException:
    return HTTPException(status, cause, {"connection": "close"})
