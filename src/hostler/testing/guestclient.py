"""The micro guest's commands as typed calls: what disks it sees, patterns on them, load, network, switching off."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, JsonValue

from hostler.model.errors import GuestRefused, TimedOut
from hostler.testing.guestlink import Connect, GuestLink, Message, unix


class Seen(BaseModel):
    """A value the guest told."""

    model_config = ConfigDict(frozen=True)


class GuestDisk(Seen):
    """A disk as the guest sees it. `size` in bytes; `hctl` is SCSI's host:channel:target:LUN; `wwn` as in sysfs
    ("naa.5..."), "" where there is none."""

    name: str
    size: int
    serial: str
    wwn: str
    vendor: str
    model: str
    hctl: str
    read_only: bool
    cdrom: bool


class Ping(Seen):
    """`count` grows with every answer, tick and beat of one boot; `boot` differs from boot to boot."""

    count: int
    boot: str


class RangeVerdict(Seen):
    """`first_bad` is a byte offset, -1 if every sector was right."""

    bytes: int
    bad_sectors: int
    first_bad: int


class JournalStatus(Seen):
    """`acked`: last number the disk acknowledged; `errno` of the write that ended it, 0 if none did."""

    acked: int
    errno: int
    running: bool = False


class JournalReading(Seen):
    """See `guest/journal.c`: lost, torn and foreign must be 0 after whatever happened."""

    acked: int
    checked: int
    lost: int
    torn: int
    foreign: int
    unreadable: int
    newest: int

    @property
    def sound(self) -> bool:
        """Whether something was checked and nothing of it is wrong."""
        return self.checked > 0 and not (self.lost or self.torn or self.foreign or self.unreadable)


class IoRun(Seen):
    """What `io` did, in so many nanoseconds of the guest's clock."""

    requests: int
    bytes: int
    ns: int


class Load(Seen):
    """MiB held, MiB/s asked for, MiB dirtied since the memory was filled."""

    mib: int
    rate: int
    written_mib: int


class Memory(Seen):
    """Bytes, and the number of processors that run."""

    total: int
    free: int
    cpus: int


class Beats(Seen):
    sent: int
    answered: int


class DiskCalls:
    """The commands about disks."""

    def __init__(self, connect: Connect, name: str) -> None:
        self.link = GuestLink(connect, name)

    async def disks(self, deadline: float = 30.0) -> list[GuestDisk]:
        found = await self.link.request("disks", deadline=deadline)
        return [GuestDisk.model_validate(disk) for disk in found] if isinstance(found, list) else []

    async def wait_disk(self, serial: str, deadline: float = 30.0) -> GuestDisk:
        """The disk with that serial number, at once if it is there, else as soon as the guest's kernel announces it."""
        async with self.link.listening() as events:
            try:
                async with asyncio.timeout(deadline):
                    return await self._find_disk(serial, deadline) or await self._announced(events, serial)
            except TimeoutError as error:
                raise TimedOut("guest", f"no disk {serial} within {deadline:g} s") from error

    async def wait_disk_gone(self, name: str, deadline: float = 30.0) -> None:
        """Until the guest has no disk of that name ("sdb")."""
        async with self.link.listening() as events:
            try:
                async with asyncio.timeout(deadline):
                    while any(disk.name == name for disk in await self.disks()):
                        while _event_disk(await events.get(), "disk-removed").get("name") != name:
                            continue
            except TimeoutError as error:
                raise TimedOut("guest", f"still has the disk {name} after {deadline:g} s") from error

    async def _find_disk(self, serial: str, deadline: float) -> GuestDisk | None:
        return next((disk for disk in await self.disks(deadline) if disk.serial == serial), None)

    async def _announced(self, events: asyncio.Queue[Message], serial: str) -> GuestDisk:
        while True:
            disk = _event_disk(await events.get(), "disk-added")
            if disk.get("serial") == serial:
                return GuestDisk.model_validate(disk)

    async def hold(self, disk: str) -> int:
        """Keep a disk open, as if it were mounted; its size in bytes. A CD drive's door is locked then."""
        return int(str(_fields(await self.link.request("hold", disk))["size"]))

    async def release(self) -> None:
        """Let the held disk go."""
        await self.link.request("release")

    async def reserve(self, disk: str, key: int) -> None:
        """Take a persistent reservation, so that nobody else writes; key 0 gives it up. GuestRefused where the disk has
        none."""
        await self.link.request("reserve", disk, key)

    async def write(self, disk: str, seed: int, size: int, offset: int = 0, deadline: float = 60.0) -> None:
        """Fill `size` bytes at `offset` (multiples of 512) of a disk (name or serial number) and flush it."""
        await self.link.request("write", disk, seed, size, offset, deadline=deadline)

    async def verify(self, disk: str, seed: int, size: int, offset: int = 0, deadline: float = 60.0) -> RangeVerdict:
        """Read back what `write` with the same arguments wrote."""
        answer = await self.link.request("verify", disk, seed, size, offset, deadline=deadline)
        return RangeVerdict.model_validate(answer)

    async def io(
        self, disk: str, *, writes: bool, random: bool, block: int, depth: int = 1, seconds: float = 1.0
    ) -> IoRun:
        """Read or write (over what is there!) blocks of so many bytes for so long, `depth` at a time."""
        words = ("write" if writes else "read", "rand" if random else "seq", block, depth, int(seconds * 1000))
        answer = await self.link.request("io", disk, *words, deadline=seconds + 60)
        return IoRun.model_validate(answer)

    async def pattern_start(self, disk: str, seed: int, span: int | None = None, report_ms: int = 0) -> None:
        """Start the journal on a disk, over `span` bytes; with `report_ms`, events tell the acknowledged number."""
        words = [] if span is None else [span, report_ms]
        if span is None and report_ms:
            raise GuestRefused("guest", "pattern-start takes a report interval only with a span")
        await self.link.request("pattern-start", disk, seed, *words)

    async def pattern_status(self) -> JournalStatus:
        return JournalStatus.model_validate(await self.link.request("pattern-status"))

    async def pattern_stop(self, deadline: float = 60.0) -> JournalStatus:
        return JournalStatus.model_validate(await self.link.request("pattern-stop", deadline=deadline))

    async def pattern_verify(
        self, disk: str, seed: int, span: int | None = None, acked: int | None = None, deadline: float = 60.0
    ) -> JournalReading:
        """Read the journal back. After a new boot `span` and `acked` come from outside."""
        words = [word for word in (span, acked) if word is not None]
        answer = await self.link.request("pattern-verify", disk, seed, *words, deadline=deadline)
        return JournalReading.model_validate(answer)


class GuestSerial(DiskCalls):
    """`async with GuestSerial.unix(path) as guest`. Each call takes a deadline in seconds and raises GuestRefused (with
    the guest's reason) or TimedOut."""

    def __init__(self, connect: Connect, name: str = "guest") -> None:
        super().__init__(connect, name)

    @classmethod
    def unix(cls, path: str | Path, name: str = "guest") -> Self:
        """Over QEMU's serial socket; it need not exist yet."""
        return cls(unix(path), name)

    async def __aenter__(self) -> Self:
        await self.link.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.link.__aexit__(*exc)

    def move_to(self, path: str | Path) -> None:
        """The VM runs elsewhere now: its serial socket is there."""
        self.link.move_to(unix(path))

    async def ping(self, deadline: float = 30.0) -> Ping:
        return Ping.model_validate(await self.link.request("ping", deadline=deadline))

    async def wait_ready(self, deadline: float = 60.0) -> Ping:
        """Until the guest answers: its drivers are loaded then."""
        return await self.ping(deadline)

    async def dirty(self, mib: int, mib_per_s: int, deadline: float = 120.0) -> Load:
        """Fill `mib` MiB with random data and dirty them at a rate (0: leave them still); 0, 0 gives them back."""
        return Load.model_validate(await self.link.request("dirty", mib, mib_per_s, deadline=deadline))

    async def load(self) -> Load:
        """What `dirty` did so far."""
        return Load.model_validate(await self.link.request("dirty"))

    async def ticks(self, interval_ms: int) -> None:
        """Numbered ticks on the serial line, to whoever listens on the link; 0 ends them."""
        await self.link.request("ticks", interval_ms)

    async def set_ip(self, address: str, gateway: str = "") -> None:
        """`address` like "10.0.0.2/24"."""
        await self.link.request("ip", address, *([gateway] if gateway else []))

    async def mac(self) -> str:
        return str(_fields(await self.link.request("mac"))["mac"])

    async def beat(self, address: str, port: int, interval_ms: int) -> Beats:
        """Send numbered datagrams to an observer; 0 ends them."""
        return Beats.model_validate(await self.link.request("beat", address, port, interval_ms))

    async def uptime(self) -> float:
        """Seconds since the guest booted, on its own clock."""
        nanoseconds = _fields(await self.link.request("uptime"))["ns"]
        return int(str(nanoseconds)) / 1e9

    async def mem(self) -> Memory:
        return Memory.model_validate(await self.link.request("mem"))

    async def look(self, path: str) -> str:
        """A short file of the guest's /sys or /proc, on one line. GuestRefused where there is none."""
        return str(await self.link.request("look", path))

    async def poweroff(self) -> None:
        """Returns when the guest has understood; then it flushes its disks and switches off."""
        await self.link.request("poweroff")

    async def reboot(self) -> None:
        await self.link.request("reboot")


def _fields(value: JsonValue) -> Message:
    return value if isinstance(value, dict) else {}


def _event_disk(message: Message, event: str) -> Message:
    return _fields(message.get("disk")) if message.get("event") == event else {}
