"""The guest agent, and guests that are not to be trusted."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostler.model.errors import GuestRefused
from hostler.qemu import guest_agent
from hostler.qemu.guest_agent import GuestAgent

pytestmark = pytest.mark.unit


@pytest.fixture
def path() -> Iterator[str]:
    made = Path(tempfile.mkdtemp(prefix="hq"))
    yield f"{made}/qga.sock"
    shutil.rmtree(made)


class Agent:
    """Speaks as qemu-ga does: one client, no greeting, 0xFF before the answer to guest-sync-delimited."""

    def __init__(self, before: bytes = b"", refuse: str = "", mute: bool = False) -> None:
        self.before = before
        self.refuse = refuse
        self.mute = mute
        self.calls: list[str] = []
        self.clients = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        writer.write(self.before)
        try:
            while line := await reader.readline():
                self.answer(json.loads(line.lstrip(b"\xff")), writer)
        except (OSError, ValueError):
            pass
        finally:
            self.clients -= 1
            writer.close()

    def answer(self, request: dict[str, object], writer: asyncio.StreamWriter) -> None:
        name = str(request["execute"])
        self.calls.append(name)
        if self.mute:
            return
        if name == "guest-sync-delimited":
            answer = {"return": request["arguments"]["id"]}  # type: ignore[index]
            writer.write(b"\xff" + json.dumps(answer).encode() + b"\n")
        elif self.refuse:
            writer.write(json.dumps({"error": {"class": "GenericError", "desc": self.refuse}}).encode() + b"\n")
        elif name != "guest-shutdown":
            writer.write(b'{"return": {}}\n')


@asynccontextmanager
async def running(agent: Agent, path: str) -> AsyncIterator[GuestAgent]:
    server = await asyncio.start_unix_server(agent.serve, path)
    async with server:
        yield GuestAgent(path, "vm a")
    async with asyncio.timeout(30):
        while agent.clients:  # noqa: ASYNC110 - a counter
            await asyncio.sleep(0)


async def test_an_agent_that_answers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "_REFUSAL_WAIT", 0.01)
    agent = Agent()
    async with running(agent, path) as ours:
        await ours.ping()
        await ours.shutdown()
    assert agent.calls == ["guest-sync-delimited", "guest-ping", "guest-sync-delimited", "guest-shutdown"]


async def test_what_an_earlier_client_left_is_skipped(path: str) -> None:
    stale = b'{"return": 1}\n\xff{"return": 99}\n\xffgarbage\n' + b"x" * 1000 + b"\n"
    async with running(Agent(before=stale), path) as ours:
        await ours.ping()


@pytest.mark.parametrize("flood", [b"x" * 300_000, b'\xff{"return": 1}\n' * 200, b"\xff" + b"[" * 50_000 + b"\n"])
async def test_a_guest_that_floods_is_given_up(path: str, flood: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "DEADLINE", 0.5)
    async with running(Agent(before=flood, mute=True), path) as ours:
        with pytest.raises(GuestRefused):
            await ours.ping()


async def test_nobody_answers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "DEADLINE", 0.05)
    ours = GuestAgent(path, "vm a")
    with pytest.raises(GuestRefused):
        await ours.ping()
    agent = Agent(mute=True)
    async with running(agent, path) as ours:
        with pytest.raises(GuestRefused):
            await ours.shutdown()
    assert "guest-shutdown" not in agent.calls


async def test_a_refusal_is_passed_on(path: str) -> None:
    async with running(Agent(refuse="this command is disabled"), path) as ours:
        for call in (ours.ping, ours.shutdown):
            with pytest.raises(GuestRefused, match="disabled"):
                await call()


async def test_one_client_at_a_time(path: str) -> None:
    agent = Agent()
    async with running(agent, path) as ours:
        await asyncio.gather(*(ours.ping() for _ in range(5)))
    assert agent.calls == ["guest-sync-delimited", "guest-ping"] * 5


class Freezing(Agent):
    """An agent with file systems. `slow`: it answers a freeze only when somebody asks for the thaw; `stuck`: how many
    thaws it refuses."""

    def __init__(self, slow: bool = False, stuck: int = 0) -> None:
        super().__init__()
        self.slow = slow
        self.stuck = stuck
        self.frozen = False

    def answer(self, request: dict[str, object], writer: asyncio.StreamWriter) -> None:
        name = str(request["execute"])
        if name == "guest-fsfreeze-freeze":
            self.calls.append(name)
            self.frozen = True
            if not self.slow:
                writer.write(b'{"return": 3}\n')
        elif name == "guest-fsfreeze-thaw":
            self.calls.append(name)
            self.stuck -= 1
            if self.stuck >= 0:
                writer.write(b'{"error": {"class": "GenericError", "desc": "busy"}}\n')
            else:
                self.frozen = False
                writer.write(b'{"return": 3}\n')
        else:
            super().answer(request, writer)


async def test_frozen_and_thawed(path: str) -> None:
    agent = Freezing()
    async with running(agent, path) as ours:
        assert await ours.freeze(5) == 3
        assert agent.frozen
        for _ in range(2):
            await ours.thaw()
        assert not agent.frozen


async def test_a_freeze_that_takes_too_long_is_thawed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "_THAW_PAUSE", 0)
    agent = Freezing(slow=True, stuck=2)
    async with running(agent, path) as ours:
        with pytest.raises(GuestRefused, match=r"0\.05 s"):
            await ours.freeze(0.05)
        assert not agent.frozen
    assert agent.calls.count("guest-fsfreeze-thaw") == 3


async def test_a_freeze_that_is_cancelled_is_thawed(path: str) -> None:
    agent = Freezing(slow=True)
    async with running(agent, path) as ours:
        task = asyncio.create_task(ours.freeze(60))
        async with asyncio.timeout(30):
            while not agent.frozen:  # noqa: ASYNC110 - a flag
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not agent.frozen


async def test_a_guest_that_stays_frozen_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "_THAW_PAUSE", 0)
    monkeypatch.setattr(guest_agent, "THAW_DEADLINE", 0.05)
    async with running(Freezing(stuck=10**6), path) as ours:
        await ours.freeze(5)
        with pytest.raises(GuestRefused, match="may still be frozen"):
            await ours.thaw()


async def test_thawing_is_harmless_without_an_agent_or_qemu(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "DEADLINE", 0.05)
    await GuestAgent(path, "vm a").thaw()
    agent = Agent(mute=True)
    async with running(agent, path) as ours:
        await ours.thaw()
        with pytest.raises(GuestRefused):
            await ours.freeze(5)
    assert "guest-fsfreeze-freeze" not in agent.calls
