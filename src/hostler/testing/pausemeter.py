"""The outside observer: how long a guest is silent while it moves, measured by a process of its own.

Three ways, whichever the place allows: `echo` asks the guest over the network (UDP or TCP) every few milliseconds;
`beats` listens for the datagrams a guest sends by itself (it sits behind QEMU's NAT); `ticks` listens on its serial
sockets, before and after a move. The measuring process imports nothing of Hostler's daemon and shares no loop with it.

    python -m hostler.testing.pausemeter 10.0.0.2 --interval 2 --for 10 --json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from hostler.testing.pausereport import NS_PER_MS, Arrival, PauseReport, summarise

UDP_PORT = 7007
TCP_PORT = 7008
REQUEST = struct.Struct(">QQ")
FRAME = struct.Struct(">QQQQQ")
RECONNECT_NS = 2 * NS_PER_MS
"""Between two attempts to connect to a serial socket that is not there yet."""


class Way(Protocol):
    """A way of hearing a guest."""

    sent: int | None

    def tick(self, now: int) -> int:
        """Do what is due; when (ns) it next wants to be called."""

    def sockets(self) -> Sequence[socket.socket]: ...
    def read(self, ready: socket.socket) -> Iterator[Arrival]:
        """What came in on a socket that is ready."""


class Echo:
    """Asks, over UDP or TCP."""

    def __init__(self, address: str, port: int, interval_ns: int, tcp: bool) -> None:
        self.sent: int | None = 0
        self._asked = 0
        self._interval = interval_ns
        self._next = 0
        self._buffer = b""
        self._closed = False
        self._tcp = tcp
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        self._socket = socket.socket(socket.AF_INET, kind)
        self._socket.settimeout(10)
        self._socket.connect((address, port))
        if tcp:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)

    def tick(self, now: int) -> int:
        if now >= self._next:
            # An unreachable or full moment is what is measured, no failure: that request is lost.
            with contextlib.suppress(OSError):
                self._socket.send(REQUEST.pack(self._asked, now))
            self._asked += 1
            self.sent = self._asked
            self._next = max(self._next + self._interval, now + 1) if self._next else now + self._interval
        return self._next

    def sockets(self) -> Sequence[socket.socket]:
        return () if self._closed else (self._socket,)

    def read(self, ready: socket.socket) -> Iterator[Arrival]:
        with contextlib.suppress(OSError):  # nothing more now, or the network told of a moment without the guest
            while data := ready.recv(4096):
                for frame in self._join(data) if self._tcp else [data]:
                    yield _arrival(frame, asked=True)
            self._closed = True

    def _join(self, data: bytes) -> list[bytes]:
        """Whole frames of a stream; the rest is kept."""
        data = self._buffer + data
        whole = len(data) // FRAME.size * FRAME.size
        self._buffer = data[whole:]
        return [data[at : at + FRAME.size] for at in range(0, whole, FRAME.size)]


def _arrival(frame: bytes, asked: bool, way: int = 0) -> Arrival:
    number, sent, count, clock, boot = FRAME.unpack(frame)
    return Arrival(time.monotonic_ns(), number, count, clock, f"{boot:016x}", sent if asked else None, way)


class Beats:
    """Hears the datagrams of a guest and answers each, so that the guest knows, too. Each sender is a way of its own:
    behind NAT the port tells which QEMU the guest runs in."""

    def __init__(self, port: int, host: str) -> None:
        self.sent: int | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self._socket.setblocking(False)
        self._senders: dict[object, int] = {}
        self.port = int(self._socket.getsockname()[1])

    def tick(self, now: int) -> int:
        return now + 1000 * NS_PER_MS

    def sockets(self) -> Sequence[socket.socket]:
        return (self._socket,)

    def read(self, ready: socket.socket) -> Iterator[Arrival]:
        with contextlib.suppress(OSError):  # nothing more now; or an answer could not be sent
            while True:
                frame, sender = ready.recvfrom(FRAME.size)
                if len(frame) == FRAME.size:
                    way = self._senders.setdefault(sender, len(self._senders))
                    yield _arrival(frame, asked=False, way=way)
                    ready.sendto(frame, sender)


class Ticks:
    """Hears ticks on serial sockets, each connected to as soon as it is there, and asks the guest for them."""

    def __init__(self, paths: Sequence[str], interval_ns: int) -> None:
        self.sent: int | None = None
        self._command = f"\nmeter{time.monotonic_ns()} ticks {max(1, interval_ns // NS_PER_MS)}\n".encode()
        self._paths = list(paths)
        self._open: dict[str, socket.socket] = {}
        self._rest: dict[str, bytes] = {}
        self._boot = ""

    def tick(self, now: int) -> int:
        missing = [path for path in self._paths if path not in self._open]
        for path in missing:
            self._connect(path)
        return now + (RECONNECT_NS if missing else 1000 * NS_PER_MS)

    def _connect(self, path: str) -> None:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(path)
            line.setblocking(False)
            if not self._open:
                line.send(self._command)
        except OSError:
            line.close()
            return
        self._open[path] = line
        self._rest[path] = b""

    def sockets(self) -> Sequence[socket.socket]:
        return tuple(self._open.values())

    def read(self, ready: socket.socket) -> Iterator[Arrival]:
        path = next(path for path, line in self._open.items() if line is ready)
        try:
            data = ready.recv(65536)
        except OSError:
            data = b""
        if not data:
            ready.close()
            del self._open[path]
            return
        *lines, self._rest[path] = (self._rest[path] + data).split(b"\n")
        now = time.monotonic_ns()
        for line in lines:
            if line.startswith(b'{"tick":'):
                yield _tick_arrival(line, now, self._paths.index(path))


def _tick_arrival(line: bytes, now: int, way: int) -> Arrival:
    tick = json.loads(line)
    return Arrival(now, int(tick["tick"]), int(tick["tick"]), int(tick["ns"]), way=way)


class Stop:
    """Set by SIGTERM or SIGINT, or when standard input ends (the parent wants the report, or is gone). Anything on
    standard input is a question: tell me of the next sign of life."""

    def __init__(self, watch_stdin: bool) -> None:
        self.asked = False
        self.question = False
        self.descriptors = (sys.stdin.fileno(),) if watch_stdin else ()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def read(self, descriptor: int) -> None:
        """Standard input has something, or has ended."""
        if os.read(descriptor, 4096):
            self.question = True
        else:
            self.asked = True


def _tell(arrival: Arrival, heard: set[int], stop: Stop) -> None:
    """Tell the parent of the first sign by each way, and of the next one where it asked."""
    if arrival.way not in heard:
        heard.add(arrival.way)
        print(f"hearing {arrival.way}", file=sys.stderr, flush=True)
    if stop.question:
        stop.question = False
        print(f"next {arrival.way}", file=sys.stderr, flush=True)


def measure(way: Way, duration_ns: int | None, stop: Stop) -> PauseReport:
    """Listen until the time is over or `stop` is asked."""
    arrivals: list[Arrival] = []
    heard: set[int] = set()
    now = time.monotonic_ns()
    end = now + duration_ns if duration_ns else None
    while not stop.asked and (end is None or now < end):
        wake = way.tick(now) if end is None else min(way.tick(now), end)
        # Rounded up: select may not return before it is due.
        timeout = max(0, wake - time.monotonic_ns()) / 1e9
        waited: list[socket.socket | int] = [*way.sockets(), *stop.descriptors]
        # Signs before the parent's question, so that none that was waiting already answers it.
        for ready in sorted(select.select(waited, [], [], timeout)[0], key=lambda one: isinstance(one, int)):
            if isinstance(ready, int):
                stop.read(ready)
                continue
            for arrival in way.read(ready):
                arrivals.append(arrival)
                _tell(arrival, heard, stop)
        now = time.monotonic_ns()
    return summarise(arrivals, way.sent, now)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="pausemeter", description="Measure from outside how long a guest is silent.")
    made.add_argument("address", nargs="?", help="address of a micro guest to ask (echo)")
    made.add_argument("--port", type=int, help=f"port to ask, if not {UDP_PORT} (UDP) or {TCP_PORT} (TCP)")
    made.add_argument("--tcp", action="store_true", help="ask over one TCP connection instead of UDP")
    made.add_argument("--beats", metavar="PORT", type=int, help="hear a guest's beats on this UDP port (0: any)")
    made.add_argument("--host", default="127.0.0.1", help="address to hear beats on")
    made.add_argument("--ticks", metavar="SOCKET", nargs="+", help="hear ticks on these serial sockets")
    made.add_argument("--interval", type=float, default=2.0, help="milliseconds between two requests or ticks")
    made.add_argument("--for", dest="duration", type=float, help="seconds; without it until standard input ends")
    made.add_argument("--json", action="store_true", help="the report as JSON")
    return made


def choose_way(options: argparse.Namespace) -> Way:
    """The way of hearing that the options name. ValueError when they name none or several."""
    if sum(given is not None for given in (options.address, options.beats, options.ticks)) != 1:
        raise ValueError("give one of ADDRESS, --beats and --ticks")
    interval = int(options.interval * NS_PER_MS)
    if options.beats is not None:
        return Beats(options.beats, options.host)
    if options.ticks is not None:
        return Ticks(options.ticks, interval)
    port = options.port or (TCP_PORT if options.tcp else UDP_PORT)
    return Echo(options.address, port, interval, options.tcp)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 with a report, 1 when the guest was never heard, 2 for a wrong command line or no connection."""
    options = parser().parse_args(arguments)
    stop = Stop(watch_stdin=options.duration is None)
    try:
        way = choose_way(options)
    except (ValueError, OSError) as error:
        print(f"pausemeter: {error}", file=sys.stderr)
        return 2
    gc.disable()  # a collection would look like a pause of the guest
    with contextlib.suppress(OSError):
        os.nice(-10)  # only root may; the guest's own processors load this machine
    print(f"ready {way.port if isinstance(way, Beats) else 0}", file=sys.stderr, flush=True)
    report = measure(way, int(options.duration * 1e9) if options.duration else None, stop)
    print(json.dumps(dataclasses.asdict(report)) if options.json else _text(report))
    return 0 if report.received else 1


def _text(report: PauseReport) -> str:
    return (
        f"longest gap {report.longest_gap:.1f} ms (usual {report.median_gap:.1f} ms), {report.received} of"
        f" {report.sent} heard, {report.duplicates} twice, {report.reordered} out of order; "
        + ("one guest that went on" if report.continuous else f"{report.boots} boots, {report.went_back} steps back")
    )


if __name__ == "__main__":
    sys.exit(main())
