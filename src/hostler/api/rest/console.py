"""A guest's serial line or screen: bytes between a web socket and the unix socket on which QEMU offers them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from hostler.api.rest.state import Rest
from hostler.model.errors import WrongState
from hostler.qemu.connector import connect_to

CONNECT_TIME = 5.0
"""Seconds; a unix socket answers at once or its QEMU hangs."""
AGAIN = 0.05
"""Seconds between two attempts while its queue is full."""
CHUNK = 64 * 1024

CLOSE_ENDED = 1000
CLOSE_STOPPING = 1012
CLOSE_TAKEN = 4409
"""4000-4999 are the application's own (RFC 6455 7.4.2); 409 is what HTTP says."""


async def bridge(websocket: WebSocket, rest: Rest, name: str, path: str, owner: int | None) -> None:
    """Connect the two until one end closes. One client at a time: a second one is closed with 4409 at once, since
    two that type into one line help nobody. WrongState (before the handshake is accepted) when QEMU is not there.

    `owner`: the user the VM's QEMU runs as, None where that is the daemon's. The socket's directory is that user's, who
    may be hostile: a link to the daemon's own socket in its place would let the client speak to the daemon as root.
    """
    if path in rest.consoles:
        await websocket.accept()
        await websocket.close(CLOSE_TAKEN, f"{name} is open for another client")
        return
    rest.consoles.add(path)
    try:
        reader, writer = await _connect(name, path, owner)
        try:
            await websocket.accept()
            await _pump(websocket, rest, reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), CONNECT_TIME)
    finally:
        rest.consoles.discard(path)


async def _connect(name: str, path: str, owner: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        async with asyncio.timeout(CONNECT_TIME):
            while True:
                with contextlib.suppress(BlockingIOError):  # the socket's queue is full: its last client has just left
                    return await asyncio.open_unix_connection(sock=connect_to(path, owner))
                await asyncio.sleep(AGAIN)
    except PermissionError as error:
        why = "cannot be opened: what listens there is not the VM's QEMU"
        raise WrongState(name, why, "turn the VM off: its guest has broken out") from error
    except OSError as error:  # TimeoutError is one
        raise WrongState(name, "cannot be opened: the VM does not run", "start the VM first") from error


async def _pump(websocket: WebSocket, rest: Rest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    directions: list[asyncio.Task[Any]] = [
        asyncio.create_task(_to_guest(websocket, writer)),
        asyncio.create_task(_to_client(websocket, reader)),
        asyncio.create_task(rest.closing.wait()),
    ]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in directions:
            task.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
    if rest.closing.is_set():
        await _close(websocket, CLOSE_STOPPING, "the host's daemon stops; the VM goes on")
    else:
        await _close(websocket, CLOSE_ENDED, "the VM closed the connection")


async def _to_guest(websocket: WebSocket, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError):
        while (message := await websocket.receive())["type"] == "websocket.receive":
            data = message.get("bytes") or (message.get("text") or "").encode()
            writer.write(data)
            await writer.drain()


async def _to_client(websocket: WebSocket, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError):
        while data := await reader.read(CHUNK):
            await websocket.send_bytes(data)


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Harmless when the client closed first."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await websocket.close(code, reason)
