"""The event stream: everything in order to everybody, and nobody is waited for."""

from __future__ import annotations

import asyncio

import pytest

from hostler.host import events
from hostler.host.events import EventHub
from hostler.model.disk import ImageFormat
from hostler.model.views import Event
from hostler.model.volume import Volume
from hostler.testing.inprocess import until

pytestmark = pytest.mark.unit

VOLUME = Volume(name="v", path="/v", format=ImageFormat.RAW, size=1)


async def listening(hub: EventHub) -> tuple[asyncio.Task[list[Event]], list[Event]]:
    """A listener that is subscribed, and what it has heard so far."""
    heard: list[Event] = []
    before = len(hub._listeners)

    async def listen() -> list[Event]:
        async for event in hub.subscribe():
            heard.append(event)
        return heard

    task = asyncio.create_task(listen())
    await until(lambda: len(hub._listeners) > before)
    return task, heard


async def test_everybody_hears_everything_in_order() -> None:
    hub = EventHub()
    hub.publish("volume", "early", VOLUME)
    first, _ = await listening(hub)
    second, _ = await listening(hub)
    hub.publish("volume", "v", VOLUME)
    hub.publish("volume", "v", None)
    hub.close()
    one, two = await first, await second
    assert one == two
    assert [(e.kind, e.key, e.data is None) for e in one] == [("volume", "v", False), ("volume", "v", True)]
    assert one[0].data == VOLUME.to_json()
    assert one[0].id < one[1].id


async def test_a_listener_that_is_too_slow_is_let_go_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BACKLOG", 3)
    hub = EventHub()
    slow = hub.subscribe()
    waiting = asyncio.ensure_future(anext(slow))
    await until(lambda: bool(hub._listeners))
    hub.publish("volume", "first", VOLUME)
    await waiting
    quick, heard = await listening(hub)
    for number in range(5):
        hub.publish("volume", str(number), VOLUME)
        await until(lambda: len(heard) == number + 1)  # noqa: B023 - it is awaited here
    assert [event.key async for event in slow] == ["0", "1", "2"]
    assert len(hub._listeners) == 1
    hub.close()
    assert len(await quick) == 5


async def test_who_leaves_is_forgotten() -> None:
    hub = EventHub()
    task, _ = await listening(hub)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not hub._listeners
