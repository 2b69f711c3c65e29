"""What a storage daemon says may be anything, once a hostile image has taken it over."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostler.storage.qmp import QmpGone, QmpRefused, conversation

pytestmark = pytest.mark.unit

EVENT = b'{"event": "JOB_STATUS_CHANGE", "data": {"id": "x"}}\n'
DELETED = b'{"event": "BLOCK_EXPORT_DELETED", "data": {"id": "%d"}}\n'
OK = b'{"return": {}}\n'


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hq") as directory:
        yield str(Path(directory) / "s")


@asynccontextmanager
async def server(path: str, answer: Callable[[str], bytes]) -> AsyncIterator[None]:
    """Greets, takes the capabilities, then gives `answer` to each command."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"QMP": {}}\n')
        try:
            while line := await reader.readline():
                command = json.loads(line)["execute"]
                writer.write(OK if command == "qmp_capabilities" else answer(command))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield


HOSTILE = {
    "events without end": EVENT * 100_000,
    "wanted events without end": DELETED % 1 * 100_000,
    "a line without end": b"x" * 1024**2,
    "nested deeply": b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "no JSON": b"\xff\xfe\n",
    "a list": b"[1]\n",
    "nothing of what was asked": b'{"return": [{"no": 1}]}\n',
    "another type than was asked": b'{"return": 7}\n',
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_nonsense_is_an_end_of_the_conversation(path: str, kind: str) -> None:
    async with server(path, lambda _: HOSTILE[kind]):
        with pytest.raises(QmpGone):
            async with conversation(path) as qmp:
                nodes = await qmp.execute("query-block-exports")
                assert [node["id"] for node in nodes] == []


@pytest.mark.parametrize(
    ("error", "text"), [(1, "1"), ([], "[]"), ({}, ""), ({"desc": "no " * 1000}, ("no " * 334)[:1000])]
)
async def test_a_refusal_may_have_any_shape(path: str, error: object, text: str) -> None:
    async with server(path, lambda _: json.dumps({"error": error}).encode() + b"\n"), conversation(path) as qmp:
        with pytest.raises(QmpRefused) as caught:
            await qmp.execute("blockdev-add")
    assert str(caught.value) == text


async def test_only_the_last_events_that_somebody_may_want_are_kept(path: str) -> None:
    events = b"".join(EVENT + DELETED % n for n in range(100))
    async with server(path, lambda _: events + OK), conversation(path) as qmp:
        assert await qmp.execute("block-export-del") == {}
        assert len(qmp._events) == 16
        assert await qmp.event("BLOCK_EXPORT_DELETED") == {"id": "84"}


async def test_an_event_without_data_has_none(path: str) -> None:
    async with (
        server(path, lambda _: OK + b'{"event": "BLOCK_EXPORT_DELETED", "data": 5}\n'),
        conversation(path) as qmp,
    ):
        await qmp.execute("block-export-del")
        assert await qmp.event("BLOCK_EXPORT_DELETED") == {}
