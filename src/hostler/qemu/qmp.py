"""The QMP session: one connection to the monitor of one QEMU, with deadlines, and events that end when QEMU does.

It wraps `qemu.qmp`, which alone has no deadline, leaves a reader of events waiting for ever once QEMU is gone,
re-raises a stored error when it is closed, and keeps every event it ever saw. None of that gets past this module.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self, cast

from pydantic import JsonValue
from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from hostler.model.errors import HostlerError, QemuFailed, TimedOut
from hostler.model.machine import MachineEvent
from hostler.model.pool import Connection
from hostler.qemu.connector import connect_to

# Everything the library logs reaches us as an exception too; left on, each death of a QEMU would print its traceback.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

COMMAND_DEADLINE = 10.0
"""Seconds a command may take where nothing else is said. QEMU answers in a millisecond; a busy host under TCG, or an
image on a slow share, takes longer."""

CONNECT_PAUSE = 0.001
"""Seconds between two looks for the monitor socket of a QEMU that has just been spawned."""

EVENTS_LOST = "HOSTLER_EVENTS_LOST"
"""Name of the event put in place of those a slow subscriber missed; data: count. Read the state back on it."""

_EVENT_LIMIT = 1000


class EventStream:
    """The events of one subscriber, from its making on. It ends when QEMU is gone or the session was closed.

    At most `limit` events wait; a subscriber that is slower loses the oldest and is told so by EVENTS_LOST.
    """

    def __init__(self, limit: int = _EVENT_LIMIT) -> None:
        self._limit = limit
        self._waiting: deque[MachineEvent] = deque()
        self._lost = 0
        self._ended = False
        self._wake = asyncio.Event()

    def put(self, event: MachineEvent) -> None:
        """Add an event (used by the session)."""
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._wake.set()

    def end(self) -> None:
        """No more events will come; those that wait are still delivered."""
        self._ended = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> MachineEvent:
        while True:
            if self._lost:
                lost, self._lost = self._lost, 0
                return MachineEvent(name=EVENTS_LOST, data={"count": lost})
            if self._waiting:
                return self._waiting.popleft()
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    async def wait_for(self, accept: Callable[[MachineEvent], bool], deadline: float) -> MachineEvent | None:
        """The next event that `accept` wants, within `deadline` seconds; None when they passed or the stream ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                async for event in self:
                    if accept(event):
                        return event
        return None

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more (what waits may still be read)."""
        return self._ended


class _FanOut(EventListener):
    """Hands each event to the session's subscribers at once, so that events and replies keep their order."""

    def __init__(self, streams: weakref.WeakSet[EventStream]) -> None:
        super().__init__()
        self._streams = streams

    async def put(self, event: Message) -> None:
        data = cast(dict[str, JsonValue], event.get("data", {}))
        machine_event = MachineEvent(name=str(event["event"]), data=data)
        for stream in list(self._streams):
            stream.put(machine_event)


class QmpSession:
    """A monitor connection. Made by `connect`; over when QEMU closes it or `close` was called."""

    def __init__(self, name: str, client: QMPClient, sock: socket.socket) -> None:
        self._name = name
        self._client = client
        self._sock = sock
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._fd_lock = asyncio.Lock()
        self.connections: dict[str, Connection] = {}
        """How this QEMU reaches network pools, by name: what `network_disks.reach` puts into block graphs."""
        # The library's own listener cannot be removed and would keep every event for ever.
        client.events.event_filter = _nothing
        client.register_listener(_FanOut(self._streams))
        self._over = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch(), name=f"qmp {name}")

    @classmethod
    async def connect(
        cls, path: str, *, deadline: float, name: str = "qemu", alive: Callable[[], bool] = lambda: True
    ) -> QmpSession:
        """Connect to the monitor socket at `path`, waiting until it is there, at most `deadline` seconds.

        `alive` tells whether QEMU still lives: QemuFailed as soon as it does not. TimedOut when it lives and does not
        answer (it hangs, or another program holds its monitor: QEMU serves one at a time).
        """
        try:
            async with asyncio.timeout(deadline):
                sock = await _open(path, name, alive)
                try:
                    return cls(name, await _greet(sock), sock)
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError:
            raise TimedOut(
                name,
                f"QEMU did not answer on its monitor within {deadline:g} s",
                "it hangs, or another program holds the monitor; turn the VM off to end it",
            ) from None
        except (ConnectError, OSError) as error:
            raise QemuFailed(name, f"cannot connect to QEMU's monitor {path}: {_reason(error)}") from error

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline: float = COMMAND_DEADLINE
    ) -> JsonValue:
        """Run a command and return its value.

        QemuFailed when QEMU refuses (details: `command`, `error_class`) or is gone, at once also when it goes while the
        command is under way; TimedOut when `deadline` seconds pass: then nobody knows whether it was done.
        """
        try:
            async with asyncio.timeout(deadline):
                return cast(JsonValue, await self._client.execute(command, arguments))
        except TimeoutError:
            raise TimedOut(
                self._name, f"QEMU did not answer {command} within {deadline:g} s", command=command
            ) from None
        except ExecuteError as error:
            raise QemuFailed(
                self._name,
                f"QEMU refused {command}: {error.error.error.desc.rstrip('. ')}",
                command=command,
                error_class=error.error.error.class_,
            ) from None
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise self._gone(command, error) from None

    async def execute_with_fd(
        self, fd: int, command: str, arguments: Mapping[str, object], *, deadline: float = COMMAND_DEADLINE
    ) -> JsonValue:
        """Run a command that takes the file descriptor `fd` (getfd, add-fd). The caller keeps and closes its own."""
        async with self._fd_lock:
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise self._gone(command, error) from None
            return await self.execute(command, arguments, deadline=deadline)

    def events(self) -> EventStream:
        """Events from this call on."""
        stream = EventStream()
        if self.closed:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    @property
    def name(self) -> str:
        """What errors name as their object."""
        return self._name

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._over.is_set()

    async def wait_closed(self) -> None:
        """Returns when the connection is gone, whoever ended it."""
        await self._over.wait()

    async def close(self) -> None:
        """End the connection; QEMU runs on. Never raises, never waits for QEMU."""
        # Shutting the socket, not asking the library to flush: a stopped QEMU does not read.
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        await self._over.wait()
        await asyncio.wait({self._watcher})

    async def _watch(self) -> None:
        try:
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()
            await self._client.disconnect()
        except Exception as error:  # noqa: BLE001 - top of a task
            # disconnect() raises whatever ended the connection (EOFError, OSError, a parse error, ...); each caller has
            # been told already.
            logging.getLogger(__name__).debug("monitor of %s closed: %r", self._name, error)
        finally:
            self._over.set()
            for stream in list(self._streams):
                stream.end()

    def _gone(self, command: str, error: BaseException) -> HostlerError:
        return QemuFailed(
            self._name, f"QEMU is gone, {command} was not answered", command=command, gone=True, reason=_reason(error)
        )


def _nothing(_event: Message) -> bool:
    return False


async def _open(path: str, name: str, alive: Callable[[], bool]) -> socket.socket:
    """A socket connected to `path`, as soon as somebody listens there."""
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            return connect_to(path)
        if not alive():
            raise QemuFailed(name, "QEMU ended before it answered", gone=True)
        await asyncio.sleep(CONNECT_PAUSE)


async def _greet(sock: socket.socket) -> QMPClient:
    client = QMPClient()
    await client.connect(sock)
    return client


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
