"""Connections to storage systems on the network."""

from __future__ import annotations

import asyncio

from hostler.model.errors import NotFound


async def connect(subject: str, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TCP connection; the caller has a deadline around it. NotFound, about `subject`, where nobody listens."""
    try:
        return await asyncio.open_connection(host, port)
    except OSError as error:
        raise NotFound(
            subject, f"cannot be connected to: {error.strerror or error}", "check address and port"
        ) from error
