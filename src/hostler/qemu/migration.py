"""Live migration and saved states, between two QEMUs or between QEMU and a file.

    source                                            target (started with -incoming defer -S)
    setup --handshake--> active --> (guest stops)     setup --> active --> completed (loaded, guest stopped)
      --> completed | failed | cancelled              any error: QEMU ends itself

Facts of QEMU 7.2 this rests on (each has a test):
- With `return-path` the source says `completed` only after the target has confirmed that it has loaded everything; with
  `late-block-activate` (and -S) the target has then neither taken its image locks nor run, until `cont`.
- After `failed` and `cancelled` QEMU lets the guest run on by itself, also when it had been stopped for the last round.
- For some milliseconds after each end it is still "finish-migrate" and refuses `cont`: see go_on.
- `migrate tcp:` connects with blocking sockets: a target that is frozen before the TLS handshake stops the source's
  main loop, its guest and its monitor for ever, and a connect that gets no answer cannot be cancelled for two minutes.
  So the daemon connects (with a deadline), hands the socket over, and makes it non-blocking *after* that, for QEMU
  makes each descriptor it is given blocking. Several streams need `tcp:`, for QEMU opens the further connections
  itself; then the target is made to react just before (a target that freezes between that and the handshake, some
  milliseconds, still freezes the source).
- Nobody but us notices when the other side stops taking the stream: see STALL.
- The whole state of capabilities and parameters is set before each move, whatever an earlier one (perhaps under a
  daemon that was killed) left.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from hostler.model.errors import HostlerError, PeerUnreachable, QemuFailed, TimedOut
from hostler.model.machine import MachineEvent, MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import MigrationMode, MigrationProgress, MigrationSettings
from hostler.qemu import commands, psk
from hostler.qemu.commands_block import block_nodes
from hostler.qemu.progress import ENDS, progress_of, result_of
from hostler.qemu.qmp import EVENTS_LOST, EventStream, QmpSession

OnProgress = Callable[[MigrationProgress], None]

UNLIMITED = 1 << 60
"""Bytes per second: `max-bandwidth` where no limit is wished."""

TICK = 0.1
"""Seconds between two readings of the counters."""

STALL = 15.0
"""Seconds without a single byte moving after which a move is given up and the guest runs on here."""

CONNECT_DEADLINE = 10.0
UNANSWERED = 30.0
"""Seconds during which a busy QEMU may leave questions about its progress unanswered."""

_TLS = "migration-tls"
_FD = "migration"
_CUT_AFTER = 1.0
"""Seconds `cancelling` may take before the connection is cut; QEMU waits for the other side in a handshake."""


_CAPABILITIES = ("return-path", "late-block-activate", "multifd", "pause-before-switchover", "dirty-bitmaps")


class Migrator:
    """The moves of one QEMU. `uid`: the user it runs as."""

    def __init__(self, qmp: QmpSession, run_dir: str, uid: int) -> None:
        self._qmp = qmp
        self._run_dir = run_dir
        self._uid = uid

    async def listen(self, settings: MigrationSettings, secret: str, host: str) -> str:
        """See `Machine.listen`. Called again, it takes the new secret and gives the same address."""
        address = await self._listening_at()
        if address is None:
            await self._prepare(settings, incoming=True)
        if settings.encrypted:
            await self._take_key(secret, "server")
        if address is None:
            await commands.migrate_incoming(self._qmp, f"tcp:{_bracketed(host)}:0")
            address = await self._listening_at()
        if address is None:
            raise QemuFailed(self._qmp.name, "QEMU does not say where it listens for the migration")
        return f"{_bracketed(host)}:{address}"

    async def loaded(self) -> bool:
        """See `Machine.loaded`. The key is removed once the state is there."""
        if (await commands.query_migrate(self._qmp)).get("status") != "completed":
            return False
        psk.remove_keys(self._run_dir)
        return True

    async def migrate_to(
        self, address: str, settings: MigrationSettings, secret: str, on_progress: OnProgress
    ) -> MigrationResult:
        """See `Machine.migrate_to`. PeerUnreachable when nobody listens at `address`; the guest runs on."""
        was_running = await commands.query_status(self._qmp) is RunStatus.RUNNING
        await self._prepare(settings, incoming=False)
        if settings.encrypted:
            await self._take_key(secret, "client")
        end = MigrationEnd.FAILED
        try:
            send = self._send_by_address if settings.streams > 1 else self._send_by_socket
            result = await send(address, settings, on_progress)
            end = result.end
        finally:
            if end is not MigrationEnd.COMPLETED:
                await self._carry_on(was_running)
        return result

    async def cancel(self) -> None:
        """See `Machine.cancel_migration`."""
        await commands.migrate_cancel(self._qmp)

    async def state(self) -> MigrationProgress:
        """See `Machine.migration_state`."""
        return await _progress(self._qmp)

    async def send(
        self, start: Callable[[], Awaitable[None]], on_progress: OnProgress, wire: socket.socket | None = None
    ) -> MigrationResult:
        """Begin with `start` and follow to the end, whichever it is. `wire` is cut where only that ends it."""
        events = self._qmp.events()
        await start()
        return await self._follow(_Follow(self._qmp, events, on_progress, wire))

    async def send_with_stop(
        self,
        start: Callable[[], Awaitable[None]],
        look: Callable[[MigrationProgress], Awaitable[None]],
        at_stop: Callable[[], Awaitable[None]],
    ) -> MigrationResult:
        """As `send`, with `pause-before-switchover` set: once the guest is stopped for its last pages `at_stop` is
        awaited, which lets QEMU go on. When that fails, the transfer is cancelled before its error is raised."""
        events = self._qmp.events()
        await start()
        follow = _FollowWithStop(self._qmp, events, look, at_stop)
        result = await self._follow(follow)
        if follow.failed is not None:
            raise follow.failed
        return result

    async def _follow(self, follow: _Follow) -> MigrationResult:
        try:
            end = await follow.to_the_end()
        except asyncio.CancelledError:
            # The daemon stops: an unattended move would end with a guest that runs nowhere until the next start.
            with suppress(HostlerError):
                await commands.migrate_cancel(self._qmp)
            raise
        info = await commands.query_migrate(self._qmp)
        with commands.understood(self._qmp, "query-migrate"):
            return result_of(info, end, follow.reason if end is not MigrationEnd.COMPLETED else "")

    async def set_up(self, capabilities: dict[str, bool], settings: MigrationSettings) -> None:
        """Set every capability and parameter Hostler uses: those in `capabilities`, and all others off."""
        off = dict.fromkeys(_CAPABILITIES, False)
        await _set_capabilities(self._qmp, off | {"events": True} | capabilities)
        await commands.migrate_set_parameters(
            self._qmp,
            {
                "max-bandwidth": settings.bandwidth or UNLIMITED,
                "downtime-limit": settings.downtime_limit,
                "tls-creds": "",
                "tls-hostname": "",
                "multifd-channels": settings.streams if settings.streams > 1 else 2,
            },
        )

    async def _prepare(self, settings: MigrationSettings, *, incoming: bool) -> None:
        """Bitmaps that are in memory only go along in the stream (the receiving side needs no capability for that);
        those in images are read there once they are written and closed here."""
        wanted = {"return-path": not incoming, "late-block-activate": incoming, "multifd": settings.streams > 1}
        if not incoming:
            nodes = (await block_nodes(self._qmp)).values()
            wanted["dirty-bitmaps"] = any(b.name and not b.persistent for node in nodes for b in node.bitmaps)
        await self.set_up(wanted, settings)

    async def _take_key(self, secret: str, endpoint: str) -> None:
        """Make QEMU use the key: the object under its one name, then the parameter that names it."""
        directory = psk.write_key(self._run_dir, secret, self._uid)
        try:
            await commands.object_del(self._qmp, _TLS)
            options = {"qom-type": "tls-creds-psk", "id": _TLS, "dir": directory, "endpoint": endpoint}
            user = {"username": psk.USERNAME} if endpoint == "client" else {}
            await commands.object_add(self._qmp, options | user)
            await commands.migrate_set_parameters(self._qmp, {"tls-creds": _TLS})
        except BaseException:
            psk.remove_keys(self._run_dir)
            raise
        if endpoint == "client":
            psk.remove_keys(self._run_dir)

    async def _listening_at(self) -> str | None:
        """The port QEMU listens on, None when it does not."""
        addresses = (await commands.query_migrate(self._qmp)).get("socket-address")
        if not isinstance(addresses, list) or not addresses or not isinstance(addresses[0], dict):
            return None
        return str(addresses[0].get("port"))

    async def _send_by_socket(
        self, address: str, settings: MigrationSettings, on_progress: OnProgress
    ) -> MigrationResult:
        with await _connect(self._qmp.name, address) as wire:
            await commands.getfd(self._qmp, _FD, wire.fileno())
            wire.setblocking(False)
            return await self.send(lambda: self._start(f"fd:{_FD}", settings), on_progress, wire)

    async def _send_by_address(
        self, address: str, settings: MigrationSettings, on_progress: OnProgress
    ) -> MigrationResult:
        """QEMU connects by itself, as several streams need it: only to a target that has just shown to be alive."""
        if settings.encrypted:
            await _answers(self._qmp.name, address)
        return await self.send(lambda: self._start(f"tcp:{address}", settings), on_progress)

    async def _start(self, uri: str, settings: MigrationSettings) -> None:
        """Stop the guest for a quick move only now, when the other side is there."""
        if settings.mode is MigrationMode.QUICK:
            await commands.stop(self._qmp)
        await commands.migrate(self._qmp, uri)

    async def _carry_on(self, run: bool) -> None:
        """After a move that did not happen: the guest as it was before, nothing left of the attempt."""
        if run:
            with suppress(HostlerError):
                await go_on(self._qmp)
        with suppress(HostlerError):
            await commands.closefd(self._qmp, _FD)
            await self.set_up({}, MigrationSettings())
            await commands.object_del(self._qmp, _TLS)


async def _progress(qmp: QmpSession) -> MigrationProgress:
    info = await commands.query_migrate(qmp)
    with commands.understood(qmp, "query-migrate"):
        return progress_of(info)


async def _set_capabilities(qmp: QmpSession, wanted: dict[str, bool]) -> None:
    """Also right after a move that was given up: QEMU winds it up for some milliseconds and refuses meanwhile."""
    for pause in (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0):
        try:
            return await commands.migrate_set_capabilities(qmp, wanted)
        except QemuFailed as error:
            if "migration process in progress" not in error.cause or await _is_sending(qmp):
                raise
        await asyncio.sleep(pause)
    return await commands.migrate_set_capabilities(qmp, wanted)


async def _is_sending(qmp: QmpSession) -> bool:
    """Whether a migration is really under way, not only being wound up."""
    sending = ("setup", "active", "device", "postcopy-active", "pre-switchover")
    return (await commands.query_migrate(qmp)).get("status") in sending


async def go_on(qmp: QmpSession) -> None:
    """`cont`, also in the milliseconds in which QEMU winds up a migration that has ended and refuses it."""
    for pause in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0):
        try:
            return await commands.cont(qmp)
        except QemuFailed as error:
            if "not finalized yet" not in error.cause:
                raise
        await asyncio.sleep(pause)
    return await commands.cont(qmp)


class _Follow:
    """Watches one outgoing migration: by its events, so that nothing is lost on the way to the guest's going on, and by
    its counters, for people and to notice a stall."""

    def __init__(
        self, qmp: QmpSession, events: EventStream, on_progress: OnProgress, wire: socket.socket | None
    ) -> None:
        self._qmp = qmp
        self._events = events
        self._on_progress = on_progress
        self._wire = wire
        self._clock = asyncio.get_running_loop().time
        self._moved = (("", 0), self._clock())
        self._answered = self._clock()
        self.reason = ""

    async def to_the_end(self) -> MigrationEnd:
        """How it ended. QemuFailed when QEMU is gone before that."""
        while True:
            event = await self._events.wait_for(_concerns_migration, TICK)
            if event is None and self._events.ended:
                raise QemuFailed(self._qmp.name, "QEMU ended during the migration", gone=True)
            if event is not None and str(event.data.get("status")) in ENDS:
                return ENDS[str(event.data["status"])]
            if event is not None and event.data.get("status") == "pre-switchover":
                await self._stopped()
            if event is None or event.name != "MIGRATION":
                progress = await self._read()
                if progress is not None and progress.status in ENDS:
                    return ENDS[progress.status]

    async def _stopped(self) -> None:
        """The guest stands still, and QEMU waits to be told to go on."""

    async def _read(self) -> MigrationProgress | None:
        try:
            progress = await _progress(self._qmp)
        except TimedOut:
            if self._clock() - self._answered > UNANSWERED:
                self._cut()
                raise
            return None
        self._answered = self._clock()
        self._on_progress(progress)
        await self._watch_for_stall(progress)
        return progress

    async def _watch_for_stall(self, progress: MigrationProgress) -> None:
        now = self._clock()
        mark = (progress.status, progress.transferred)
        if mark != self._moved[0]:
            self._moved = (mark, now)
        still = now - self._moved[1]
        if progress.status == "cancelling":
            if still > _CUT_AFTER:
                self._cut()
        elif still > STALL:
            self.reason = f"the other side has taken nothing for {STALL:g} s"
            await commands.migrate_cancel(self._qmp)

    def _cut(self) -> None:
        if self._wire is not None:
            with suppress(OSError):
                self._wire.shutdown(socket.SHUT_RDWR)


class _FollowWithStop(_Follow):
    """Watches a transfer that waits, with the guest stopped, before its last part."""

    def __init__(
        self,
        qmp: QmpSession,
        events: EventStream,
        look: Callable[[MigrationProgress], Awaitable[None]],
        at_stop: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(qmp, events, lambda _: None, None)
        self._look = look
        self._at_stop = at_stop
        self._was_stopped = False
        self.failed: Exception | None = None

    async def _read(self) -> MigrationProgress | None:
        progress = await super()._read()
        if progress is not None:
            await self._look(progress)
            if progress.status == "pre-switchover":
                await self._stopped()
        return progress

    async def _stopped(self) -> None:
        if self._was_stopped:
            return
        self._was_stopped = True
        try:
            await self._at_stop()
        except HostlerError as error:
            self.failed = error
            await commands.migrate_cancel(self._qmp)


def _concerns_migration(event: MachineEvent) -> bool:
    return event.name in ("MIGRATION", "MIGRATION_PASS", EVENTS_LOST)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


async def _connect(name: str, address: str) -> socket.socket:
    """A TCP connection to "host:port", tuned: no delay for small packets, and dead within half a minute of a cut line,
    where Linux alone would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_DEADLINE):
            wire = await _first_that_answers(host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        raise PeerUnreachable(
            name,
            f"cannot connect to the other host's QEMU at {address}: {error or 'no answer'}",
            "look at the network and the firewall between the hosts",
        ) from error
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return wire


async def _answers(name: str, address: str) -> None:
    """PeerUnreachable unless the QEMU at `address`, not only the kernel in front of it, reacts: what is no TLS makes
    it close that connection, and listen on."""
    loop = asyncio.get_running_loop()
    with await _connect(name, address) as wire:
        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                await loop.sock_sendall(wire, b"are you there\n")
                await loop.sock_recv(wire, 1)
        except ConnectionError:
            return
        except TimeoutError:
            raise PeerUnreachable(
                name,
                f"the other host's QEMU at {address} does not react",
                "it hangs; end it there and move the VM again",
            ) from None


async def _first_that_answers(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, target in found:
        with _closing_on_error(socket.socket(family, kind, protocol)) as wire:
            wire.setblocking(False)
            try:
                await loop.sock_connect(wire, target)
                return wire
            except OSError as error:
                failure = error
                wire.close()
    raise failure


@contextmanager
def _closing_on_error(wire: socket.socket) -> Iterator[socket.socket]:
    try:
        yield wire
    except BaseException:
        wire.close()
        raise
