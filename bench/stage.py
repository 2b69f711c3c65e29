"""What the benchmarks share: directories, the micro guest, who takes part."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from hostler.testing.guestclient import GuestSerial
from hostler.testing.guestlink import GuestLink, Message, unix
from hostler.testing.microguest import MicroGuest, build

FIRST_WORD = "HOSTLER-GUEST READY"
PATIENCE = 120.0
GUEST_ADDRESS = "10.0.2.15/24"
"""QEMU's NAT gives a guest this one, itself 10.0.2.2."""
GATEWAY = "10.0.2.2"
BEAT_MS = 2


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A directory with a short name (sockets), open to the users that VMs run as; gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="hb"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def guest_in(place: Path) -> MicroGuest:
    """The micro guest in a directory that every user can reach."""
    return build(place / "guest")


def ms(seconds: float) -> float:
    return seconds * 1000.0


@contextlib.asynccontextmanager
async def serial_line(path: Path) -> AsyncIterator[asyncio.Queue[Message]]:
    """What a guest says on its serial line from now on, also while the socket is not there yet."""
    async with GuestLink(unix(path)) as link, link.listening() as heard:
        yield heard


async def first_word(heard: asyncio.Queue[Message]) -> float:
    """When (monotonic seconds) user space ran."""
    async with asyncio.timeout(PATIENCE):
        while True:
            message = await heard.get()
            if str(message.get("word", "")).endswith(FIRST_WORD):
                return float(str(message["at"]))


async def disk_seen(heard: asyncio.Queue[Message], event: str = "disk-added", serial: str | None = None) -> float:
    """When the guest's kernel announced a disk (with that serial number, where one is given)."""
    async with asyncio.timeout(PATIENCE):
        while True:
            message = await heard.get()
            disk = message.get("disk")
            if message.get("event") == event and isinstance(disk, dict) and serial in (None, disk.get("serial")):
                return float(str(message["at"]))


def now() -> float:
    return time.monotonic()


def free_udp_port() -> int:
    """A UDP port nobody uses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heard_cmdline(guest: MicroGuest, port: int) -> str:
    """The kernel command line of a guest behind QEMU's NAT that tells that UDP port every BEAT_MS that it lives."""
    return guest.with_network(GUEST_ADDRESS, GATEWAY, f"{GATEWAY}:{port}:{BEAT_MS}")


async def wait_up(serial: Path) -> None:
    """Wait until the guest on that serial socket is ready."""
    async with GuestSerial.unix(serial) as guest:
        await guest.wait_ready(120)
