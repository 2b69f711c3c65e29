"""Consoles: bytes between a web socket and the unix socket of a guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from rest_world import PATIENCE, World, record, running
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hostler.model.principal import Role
from hostler.model.requests import TokenCreate

pytestmark = pytest.mark.component


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


class Guest:
    """What QEMU's socket is: it takes one client and keeps what that one sends."""

    def __init__(self) -> None:
        self.connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.server: asyncio.Server | None = None

    async def open(self, path: str) -> None:
        self.server = await asyncio.start_unix_server(lambda r, w: self.connected.put_nowait((r, w)), path)

    async def client(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(PATIENCE):
            return await self.connected.get()


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    made = Guest()
    await made.open(world.app.serial_socket("web1"))
    yield made
    assert made.server is not None
    made.server.close()


def _open(world: World, what: str = "serial", **options: Any) -> connect:
    return unix_connect(str(world.unix), f"ws://hostler/v1/vms/web1/{what}", open_timeout=PATIENCE, **options)


async def _ends(client: ClientConnection) -> tuple[int | None, str | None]:
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(PATIENCE):
            while True:
                await client.recv()
    return client.close_code, client.close_reason


async def test_bytes_go_both_ways_unchanged(world: World, guest: Guest) -> None:
    async with _open(world) as client:
        reader, writer = await guest.client()
        every = bytes(range(256)) * 1000
        await client.send(every)
        assert await asyncio.wait_for(reader.readexactly(len(every)), PATIENCE) == every
        writer.write(every)
        got = b""
        while len(got) < len(every):
            piece = await asyncio.wait_for(client.recv(), PATIENCE)
            assert isinstance(piece, bytes)
            got += piece
        assert got == every
        writer.close()
    assert [(e["what"], e["outcome"]) for e in world.audit()] == [("WEBSOCKET /v1/vms/{vm}/serial", "opened")]


async def test_a_second_client_is_told_and_the_first_is_not_disturbed(world: World, guest: Guest) -> None:
    async with _open(world) as first:
        reader, writer = await guest.client()
        async with _open(world) as second:
            assert await _ends(second) == (4409, "serial console of vm web1 is open for another client")
        await first.send(b"still here")
        assert await asyncio.wait_for(reader.readexactly(10), PATIENCE) == b"still here"
        writer.close()
    async with _open(world):  # and when it has gone the next one may
        _, writer = await guest.client()
        writer.close()


async def test_a_client_that_leaves_frees_the_guests_socket(world: World, guest: Guest) -> None:
    client = await _open(world)
    reader, writer = await guest.client()
    client.transport.abort()
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    writer.close()
    async with asyncio.timeout(PATIENCE):
        while True:
            async with _open(world) as again:
                if not guest.connected.empty() or await _is_in(guest):
                    break
                await _ends(again)
    _, writer = await guest.client()
    writer.close()


async def _is_in(guest: Guest) -> bool:
    try:
        taken = await asyncio.wait_for(guest.connected.get(), 0.2)
    except TimeoutError:
        return False
    guest.connected.put_nowait(taken)
    return True


async def test_a_vm_that_ends_closes_the_console_in_order(world: World, guest: Guest) -> None:
    async with _open(world) as client:
        _, writer = await guest.client()
        writer.write(b"last words")
        writer.close()
        assert await asyncio.wait_for(client.recv(), PATIENCE) == b"last words"
        assert (await _ends(client))[0] == 1000


async def test_a_daemon_that_stops_says_so(world: World, guest: Guest) -> None:
    async with _open(world) as client:
        _, writer = await guest.client()
        await world.server.stop()
        assert (await _ends(client))[0] == 1012
        writer.close()


async def test_a_vm_that_does_not_run_is_refused_before_the_handshake(world: World) -> None:
    with pytest.raises(InvalidStatus) as caught:
        await _open(world, "vnc")
    assert caught.value.response.status_code == 409
    assert b'"code":"wrong-state"' in caught.value.response.body


@pytest.mark.parametrize("linked", [True, False])
async def test_another_socket_in_its_place_is_not_spoken_to(
    world: World, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that broke out owns the directory: what it puts there must not make its console the daemon's own API,
    where root needs no token."""
    path = Path(world.app.serial_socket("web1"))
    if linked:
        path.symlink_to(world.unix)
    elif os.geteuid() != 0:
        pytest.skip("only a daemon that is root gives a QEMU a user of its own")
    else:
        config = record("web1").config.but(run_as=1_900_000_321)
        monkeypatch.setattr(world.app, "get", lambda ref: record(ref).but(config=config))
        os.link(world.unix, path)
    with pytest.raises(InvalidStatus) as caught:
        await _open(world)
    assert caught.value.response.status_code == 409
    assert b'"code":"wrong-state"' in caught.value.response.body


async def test_who_may_not_is_refused_before_the_handshake(world: World, guest: Guest) -> None:
    made = await world.tokens.create(TokenCreate(name="t", role=Role.VIEWER))
    expected: list[tuple[dict[str, str], int]] = [({}, 401), ({"authorization": f"Bearer {made.secret}"}, 403)]
    url = f"wss://127.0.0.1:{world.port}/v1/vms/web1/serial"
    for headers, status in expected:
        with pytest.raises(InvalidStatus) as caught:
            await connect(url, ssl=world.pinned(), additional_headers=headers, open_timeout=PATIENCE, proxy=None)
        assert caught.value.response.status_code == status
    assert guest.connected.empty()


async def test_an_operator_may_over_https(world: World, guest: Guest) -> None:
    made = await world.tokens.create(TokenCreate(name="t", role=Role.OPERATOR))
    headers = {"authorization": f"Bearer {made.secret}"}
    url = f"wss://127.0.0.1:{world.port}/v1/vms/web1/serial"
    async with connect(
        url, ssl=world.pinned(), additional_headers=headers, open_timeout=PATIENCE, proxy=None
    ) as client:
        reader, writer = await guest.client()
        await client.send("text is bytes too")
        assert await asyncio.wait_for(reader.readexactly(17), PATIENCE) == b"text is bytes too"
        writer.close()


async def test_a_slow_client_slows_the_guest_and_not_the_daemon(world: World, guest: Guest) -> None:
    """Backpressure: what nobody reads is not kept in memory."""
    async with _open(world, max_queue=1) as client:
        _, writer = await guest.client()
        writer.transport.set_write_buffer_limits(high=64 * 1024)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                writer.write(b"x" * 65536)
                sent += 65536
                await writer.drain()

        flooding = asyncio.create_task(flood())
        await _stands_still(lambda: sent)
        assert sent < 16 * 1024**2
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        writer.transport.abort()
        client.transport.abort()


async def _stands_still(value: Callable[[], int]) -> None:
    async with asyncio.timeout(PATIENCE):
        before = -1
        while value() != before or before == 0:
            before = value()
            await asyncio.sleep(0.3)
