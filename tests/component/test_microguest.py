"""The micro guest does what its clients rely on, and the pause meter hears it: two boots, all of its protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from hostler.model.errors import GuestRefused
from hostler.model.units import MiB
from hostler.testing import microguest, patterns, qemu_raw
from hostler.testing.guestclient import GuestSerial
from hostler.testing.observer import PauseMeter
from hostler.testing.qemu_raw import RawQemu, RawSettings

pytestmark = pytest.mark.component

SIZE = 8 * MiB


@dataclass
class Booted:
    place: Path
    machine: RawQemu
    guest: GuestSerial

    def image(self, name: str) -> Path:
        path = self.place / f"{name}.img"
        with path.open("wb") as file:
            file.truncate(SIZE)
        return path

    async def add(self, serial: str, lun: int = 1) -> Path:
        image = self.image(serial)
        await qemu_raw.hot_add(self.machine, serial, image, lun=lun)
        return image


@pytest.fixture
async def booted() -> AsyncIterator[Booted]:
    kept = microguest.build()
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        place = Path(folder)
        argv = qemu_raw.command_line(place, kept, 256)
        async with (
            await RawQemu.start(argv, place / "qmp.sock") as machine,
            GuestSerial.unix(place / "serial.sock") as guest,
        ):
            await guest.wait_ready(deadline=90)
            yield Booted(place, machine, guest)


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while True:
            if await done():
                return
            await asyncio.sleep(0.02)


async def reached(guest: GuestSerial, number: int) -> bool:
    return (await guest.pattern_status()).acked >= number


async def dirtied(guest: GuestSerial, mib: int) -> bool:
    return (await guest.load()).written_mib >= mib


async def answered(guest: GuestSerial, port: int, count: int) -> bool:
    return (await guest.beat("10.0.2.2", port, 5)).answered >= count


async def check_small_talk(guest: GuestSerial) -> None:
    first, second = await guest.ping(), await guest.ping()
    assert second.count > first.count
    assert second.boot == first.boot != "0" * 16
    assert await guest.uptime() > 0
    assert (await guest.mac()).startswith("52:54:00")
    memory = await guest.mem()
    assert memory.cpus == 1
    assert 100 * MiB < memory.free < memory.total < 256 * MiB
    assert await guest.look("/proc/sys/kernel/ostype") == "Linux"
    with pytest.raises(GuestRefused, match="cannot be read"):
        await guest.look("/sys/no-such-file")
    with pytest.raises(GuestRefused, match="no such command: dance"):
        await guest.link.request("dance")
    with pytest.raises(GuestRefused, match="takes 3 to 4"):
        await guest.link.request("write", "sda")


async def check_disks(booted: Booted) -> None:
    guest = booted.guest
    waiting = asyncio.create_task(guest.wait_disk("late"))
    assert await guest.disks() == []
    image = await booted.add("late", lun=5)
    disk = await waiting
    assert (disk.size, disk.hctl.split(":")[3], disk.vendor, disk.read_only) == (SIZE, "5", "QEMU", False)
    await guest.write("late", 7, 1 * MiB, 4096)
    assert image.read_bytes()[4096 : 4096 + 65536] == patterns.pattern(7, 65536, 4096)
    assert (await guest.verify("late", 7, 1 * MiB, 4096)).bad_sectors == 0
    wrong = await guest.verify(disk.name, 7, 2 * MiB)
    assert (wrong.bad_sectors, wrong.first_bad) == (1 * MiB // 512, 0)
    with pytest.raises(GuestRefused, match="no such disk"):
        await guest.write("other", 7, 512)
    with pytest.raises(GuestRefused, match="has only"):
        await guest.write("late", 7, SIZE, 512)
    gone = asyncio.create_task(guest.wait_disk_gone(disk.name))
    await qemu_raw.hot_remove(booted.machine, "late")
    await gone


async def check_journal(booted: Booted) -> None:
    """It sees nothing wrong with a sound disk, and each kind of damage on a damaged one."""
    guest, slots = booted.guest, 8
    image = await booted.add("log", lun=2)
    await guest.wait_disk("log")
    await guest.pattern_start("log", 99, slots * patterns.BLOCK)
    await until(lambda: reached(guest, 3 * slots))
    with pytest.raises(GuestRefused, match="runs already"):
        await guest.pattern_start("log", 99)
    stopped = await guest.pattern_stop()
    sound = await guest.pattern_verify("log", 99)
    assert sound.sound
    assert (sound.checked, sound.newest) == (slots, stopped.acked)

    assert journal_outside(image, slots, stopped.acked).sound
    last = stopped.acked
    put_block(image, last, slots, patterns.journal_block(99, last, stamp=1))
    put_block(image, last - 1, slots, patterns.journal_block(99, last - 1 - slots, stamp=1))
    put_block(image, last - 2, slots, patterns.journal_block(99, last - 2, stamp=1)[:-1] + b"?")
    put_block(image, last - 3, slots, patterns.journal_block(99, last - 4, stamp=1))
    seen = await guest.pattern_verify("log", 99)
    assert (seen.foreign, seen.lost, seen.torn, seen.sound) == (1, 1, 2, False)
    outside = journal_outside(image, slots, last)
    assert outside.lost == (last - 1,)
    assert set(outside.torn) == {(last - 2) % slots, (last - 3) % slots}


def put_block(image: Path, number: int, slots: int, block: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(number % slots * patterns.BLOCK)
        file.write(block)


def journal_outside(image: Path, slots: int, acked: int) -> patterns.JournalVerdict:
    content = image.read_bytes()
    blocks = [content[n * patterns.BLOCK : (n + 1) * patterns.BLOCK] for n in range(slots)]
    return patterns.check_journal(blocks, 99, acked, slots)


async def check_load(guest: GuestSerial) -> None:
    await guest.dirty(16, 50)
    await until(lambda: dirtied(guest, 16))
    still = await guest.dirty(16, 0)
    assert (await guest.load()).written_mib <= still.written_mib + 1
    assert (await guest.dirty(0, 0)).mib == 0
    with pytest.raises(GuestRefused, match="not enough memory"):
        await guest.dirty(4096, 1)


async def check_ticks(guest: GuestSerial) -> None:
    async with guest.link.listening() as events:
        await guest.ticks(2)
        async with asyncio.timeout(30):
            numbers = [(await events.get())["tick"] for _ in range(20)]
        await guest.ticks(0)
    assert numbers == sorted(set(map(int, map(str, numbers))))


class Beats(asyncio.DatagramProtocol):
    """Receives beats and answers each."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.received.put_nowait(data)
        self.transport.sendto(data, addr)


async def check_network(guest: GuestSerial) -> None:
    await guest.set_ip("10.0.2.15/24", "10.0.2.2")
    loop = asyncio.get_running_loop()
    transport, beats = await loop.create_datagram_endpoint(Beats, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    await guest.beat("10.0.2.2", port, 5)
    async with asyncio.timeout(30):
        frames = [await beats.received.get() for _ in range(5)]
    await until(lambda: answered(guest, port, 3))
    await guest.beat("10.0.2.2", 1, 0)
    transport.close()
    assert all(len(frame) == 40 for frame in frames)
    counts = [int.from_bytes(frame[16:24], "big") for frame in frames]
    assert counts == sorted(set(counts))


async def check_agent(place: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(place / "qga.sock"))

    async def ask(command: str, **arguments: object) -> bytes:
        writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return await asyncio.wait_for(reader.readline(), 30)

    writer.write(b"\xff")
    assert await ask("guest-sync-delimited", id=4711) == b'\xff{"return":4711}\n'
    assert json.loads(await ask("guest-ping")) == {"return": {}}
    assert b"guest-shutdown" in await ask("guest-info")
    assert b"CommandNotFound" in await ask("guest-fly")
    writer.close()
    await writer.wait_closed()


async def check_move(booted: Booted) -> None:
    """It goes on elsewhere: the same boot, the same load, and requests find it there."""
    guest, before = booted.guest, await booted.guest.ping()
    there = booted.place / "there"
    there.mkdir()
    argv = [*qemu_raw.command_line(there, microguest.build(), 256, incoming=True)]
    for serial, lun in (("log", 2),):
        argv += ["-blockdev", json.dumps(raw_node(serial, booted.place)), "-device", scsi_disk(serial, lun)]
    async with await RawQemu.start(argv, there / "qmp.sock") as target:
        moved = await qemu_raw.migrate(booted.machine, target, RawSettings())
        assert moved.transferred > 0
        guest.move_to(there / "serial.sock")
        after = await guest.ping()
        assert (after.boot, after.count > before.count) == (before.boot, True)
        await guest.write("log", 5, 1 * MiB)
        await target.cmd("system_powerdown")
        assert (await target.event("SHUTDOWN"))["data"] == {"guest": True, "reason": "guest-shutdown"}


def raw_node(serial: str, place: Path) -> dict[str, object]:
    file = {"driver": "file", "filename": str(place / f"{serial}.img"), "cache": {"direct": True}}
    return {"driver": "raw", "node-name": f"n-{serial}", "file": file}


def scsi_disk(serial: str, lun: int) -> str:
    return f"scsi-hd,id={serial},bus=scsi0.0,lun={lun},channel=0,drive=n-{serial},serial={serial}"


async def test_one_boot(booted: Booted) -> None:
    await check_small_talk(booted.guest)
    await check_disks(booted)
    await check_journal(booted)
    await check_load(booted.guest)
    await check_ticks(booted.guest)
    await check_network(booted.guest)
    await check_agent(booted.place)
    await check_move(booted)


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_pause_is_measured_from_outside() -> None:
    """Each way of hearing, then two of them across a move: one guest that went on, and a gap heard outside."""
    kept = microguest.build()
    udp, tcp = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        here, there = Path(folder) / "a", Path(folder) / "b"
        here.mkdir()
        there.mkdir()
        async with PauseMeter.beats() as beats:
            cmdline = kept.with_network("10.0.2.15/24", "10.0.2.2", f"10.0.2.2:{beats.port}:2")
            network = f"user,hostfwd=udp:127.0.0.1:{udp}-:7007,hostfwd=tcp:127.0.0.1:{tcp}-:7008"
            argv = qemu_raw.command_line(here, kept, 256, cmdline, network=network)
            async with await RawQemu.start(argv, here / "qmp.sock") as source:
                await beats.hearing(deadline=90)
                for port, stream in ((udp, False), (tcp, True)):
                    async with PauseMeter.echo("127.0.0.1", tcp=stream, port=port) as echo:
                        await echo.hearing()
                        report = await echo.report()
                        assert report.continuous
                        assert report.rtt["p50"] > 0
                target_argv = qemu_raw.command_line(there, kept, 256, cmdline, incoming=True)
                async with (
                    PauseMeter.ticks(here / "serial.sock", there / "serial.sock") as ticks,
                    await RawQemu.start(target_argv, there / "qmp.sock") as target,
                ):
                    await ticks.hearing()
                    await qemu_raw.migrate(source, target, RawSettings())
                    await asyncio.gather(ticks.hearing(1), beats.next())
                    reports = [await ticks.report(), await beats.report()]
            for report in reports:
                assert report.continuous, report
                assert report.received > 10
                assert report.longest_gap > report.median_gap > 0


async def test_two_builds_at_once_give_one_guest(tmp_path: Path) -> None:
    first, second = await asyncio.gather(
        asyncio.to_thread(microguest.build, tmp_path), asyncio.to_thread(microguest.build, tmp_path)
    )
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == [first.kernel.parent.name]
    assert first.kernel.stat().st_mode & 0o777 == first.initrd.stat().st_mode & 0o777 == 0o644
