"""What an operation on a volume is: who may begin it, its steps, and how it is taken up after a crash.

The job holds a claim on the file from before it begins until after it has ended, so that no VM opens it in between and
no two jobs work on one volume. A job that changes the volume does so in its last step: what was begun there is
finished, by this daemon or the next; anything before it is undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from hostler.host.events import EventHub
from hostler.host.steps import JobContext, Step
from hostler.host.volumes.users import VolumeUsers
from hostler.model.job import Progress
from hostler.model.volume import Volume
from hostler.storage.changes import VolumeChanges
from hostler.storage.qemu_img import OnProgress

Params = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Tools:
    """What the steps of an operation work with."""

    changes: VolumeChanges
    users: VolumeUsers
    events: EventHub

    async def finish(self, context: JobContext, old: Volume, new: Volume) -> None:
        """Tell everybody of a changed volume; it is the job's result."""
        await self.users.follow(old, new)
        self.events.publish("volume", new.name, new)
        context.result(new.to_json())


async def anything(_tools: Tools, _volume: Volume, _params: Params) -> None:
    """Nothing stands in the way."""


@dataclass(frozen=True, slots=True)
class VolumeOperation:
    """`writes`: whether nobody may even read the volume meanwhile. `check`: raises what stands in its way, while the
    volume is held. `makes`: the parameter that names the volume it makes, if it makes one."""

    kind: str
    steps: Callable[[Tools, Volume, Params], Sequence[Step]]
    writes: bool = False
    makes: str | None = None
    damaged: bool = False
    """Whether it may begin on a damaged volume."""
    check: Callable[[Tools, Volume, Params], Awaitable[None]] = anything


def shown(context: JobContext, text: str, first: float = 0.0, last: float = 1.0) -> OnProgress:
    """Progress of a part of the job, from `first` to `last` of the whole; may be called from a thread."""
    loop = asyncio.get_running_loop()

    def show(fraction: float) -> None:
        progress = Progress(fraction=min(1.0, first + fraction * (last - first)), text=text)
        loop.call_soon_threadsafe(context.progress, progress)

    return show
