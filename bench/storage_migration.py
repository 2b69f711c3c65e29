"""Live storage migration of a full disk: total time, and the pause an outside client sees.

Everybody copies the same raw image to another file on the same file system, past the page cache, with the guest
running, goes on there and removes the old file. The pause is the longest time without a beat of the guest over all of
the move.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from bench import libvirt
from bench.bare import by_hand, scsi_bus
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import BEAT_MS, free_udp_port, guest_in, heard_cmdline, ms, now, wait_up, workplace
from bench.subject import WAIT, Host
from hostler.client import calls
from hostler.model.disk import ImageFormat
from hostler.model.disk_requests import DiskMove
from hostler.model.errors import InternalError
from hostler.model.requests import DiskAdd, VolumeRegister
from hostler.model.units import GiB, MiB
from hostler.model.vm import VmRecord
from hostler.testing.microguest import MicroGuest
from hostler.testing.observer import PauseMeter
from hostler.testing.qemu_raw import RawQemu

MEMORY_MIB = 256
SIZE = int(os.environ.get("HOSTLER_BENCH_DISK_MIB", "1024")) * MiB
TOTAL = "call to done"
PAUSE = "pause seen outside"


def fill(path: Path) -> Path:
    """An image without holes."""
    with path.open("wb") as file:
        for _ in range(SIZE // (16 * MiB)):
            file.write(os.urandom(1 * MiB) * 16)
        os.fsync(file.fileno())
    path.chmod(0o666)
    return path


class Pair:
    """Where the image is, and where it goes next."""

    def __init__(self, place: Path, name: str) -> None:
        self._place = place
        self._name = name
        self._moves = 0
        self.here = fill(place / f"{name}0.raw")

    def next(self) -> Path:
        self._moves += 1
        return self._place / f"{self._name}{self._moves}.raw"


async def paused(port: int, move: Callable[[], Awaitable[float]]) -> Sample:
    """How long `move` took, and the pause in it. InternalError where it was not one guest that went on."""
    async with PauseMeter.beats(port) as meter:
        await meter.hearing()
        took = await move()
        await meter.next()
        report = await meter.report()
    if not report.continuous:
        raise InternalError("guest", f"is not the one whose disk was moved: {report}")
    return {TOTAL: ms(took), PAUSE: report.longest_gap}


@dataclass(slots=True)
class Hostler:
    host: Host
    vm: VmRecord
    pair: Pair
    port: int

    async def run(self) -> Sample:
        return await paused(self.port, self._move)

    async def _move(self) -> float:
        target, client = self.pair.next(), self.host.client
        request = DiskMove(to=str(target))
        begun = now()
        await client.finish(await client.send(calls.disk_move(self.vm.config.id, "disk0", request, wait=WAIT)), WAIT)
        took = now() - begun
        if self.pair.here.exists() or not target.exists():
            raise InternalError("disk0", "is not where it should be")
        self.pair.here = target
        return took


@dataclass(slots=True)
class Bare:
    """By hand, as QEMU's documents tell it."""

    machine: RawQemu
    pair: Pair
    port: int
    node: str = "n0"
    moves: int = 0

    async def plug(self, bus: str) -> None:
        await self._open(self.pair.here, self.node)
        await self.machine.cmd(
            "device_add", driver="scsi-hd", id="d", bus=bus, channel=0, lun=0, drive=self.node, serial="d"
        )

    async def _open(self, path: Path, node: str) -> None:
        file: dict[str, JsonValue] = {
            "driver": "file",
            "filename": str(path),
            "aio": "io_uring",
            "cache": {"direct": True},
        }
        await self.machine.cmd("blockdev-add", driver="raw", node_name=node, file=file)

    async def run(self) -> Sample:
        return await paused(self.port, self._move)

    async def _move(self) -> float:
        self.moves += 1
        target, node = self.pair.next(), f"n{self.moves}"
        begun = now()
        with target.open("wb") as file:
            file.truncate(SIZE)
        await self._open(target, node)
        await self.machine.cmd("blockdev-mirror", job_id="m", device=self.node, target=node, sync="full")
        await self.machine.event("BLOCK_JOB_READY")
        await self.machine.cmd("block-job-complete", device="m")
        await self.machine.event("BLOCK_JOB_COMPLETED")
        await self.machine.cmd("blockdev-del", node_name=self.node)
        self.pair.here.unlink()
        self.pair.here, self.node = target, node
        return now() - begun


@dataclass(slots=True)
class Virsh:
    libvirtd: libvirt.Libvirtd
    pair: Pair
    port: int

    async def run(self) -> Sample:
        return await paused(self.port, self._move)

    async def _move(self) -> float:
        target = self.pair.next()
        begun = now()
        await self.libvirtd.virsh(
            *("blockcopy", libvirt.DOMAIN, "sda", "--dest", str(target), "--format", "raw"),
            *("--wait", "--pivot", "--transient-job"),
        )
        self.pair.here.unlink()
        took = now() - begun
        self.pair.here = target
        return took


async def _hostler(stack: contextlib.AsyncExitStack, place: Path, guest: MicroGuest) -> Hostler:
    host = await stack.enter_async_context(Host("a", place / "a").running())
    pair, port = Pair(place, "h"), free_udp_port()
    vm = await host.create("guest", guest, MEMORY_MIB, heard_cmdline(guest, port))
    volume = VolumeRegister(name="h", path=str(pair.here), format=ImageFormat.RAW)
    await host.client.send(calls.volume_register(volume))
    await host.client.finish(await host.client.send(calls.disk_add(vm.config.id, DiskAdd(volume="h"), wait=WAIT)), WAIT)
    await host.act(vm.config.id, "start")
    await wait_up(host.serial(vm))
    return Hostler(host, await host.vm(vm.config.id), pair, port)


async def _bare(stack: contextlib.AsyncExitStack, place: Path, hostler: Hostler) -> Bare:
    """The command line Hostler built for the same guest, without its disk."""
    port, here = free_udp_port(), place / "q"
    here.mkdir()
    line = by_hand(hostler.host.qemu_command_line(hostler.vm), hostler.host.serial(hostler.vm).parent, here)
    line = [word.replace(f":{hostler.port}:{BEAT_MS}", f":{port}:{BEAT_MS}") for word in _diskless(line)]
    machine = await stack.enter_async_context(await RawQemu.start(line, here / "qmp.sock"))
    bare = Bare(machine, Pair(place, "q"), port)
    await bare.plug(scsi_bus(line))
    await wait_up(here / "serial.sock")
    return bare


def _diskless(line: list[str]) -> list[str]:
    """The command line without disk0."""
    left: list[str] = []
    for option, value in zip(line, [*line[1:], ""], strict=True):
        if left and left[-1] == "":
            left.pop()
            continue
        of_disk = '"node-name":"disk0"' in value or '"id":"disk-disk0"' in value
        left.append("" if option in ("-blockdev", "-device") and of_disk else option)
    return left


async def _virsh(stack: contextlib.AsyncExitStack, place: Path, guest: MicroGuest) -> Virsh:
    libvirtd = await stack.enter_async_context(libvirt.Libvirtd("a", place / "v").running())
    pair, port = Pair(place, "v"), free_udp_port()
    await libvirtd.virsh("create", str(libvirt.domain(place / "v", guest, MEMORY_MIB, heard_cmdline(guest, port))))
    await wait_up(place / "v/serial.sock")
    await libvirtd.virsh(
        *("attach-disk", libvirt.DOMAIN, str(pair.here), "sda", "--driver", "qemu", "--subdriver", "raw"),
        *("--cache", "none", "--targetbus", "scsi", "--live"),
    )
    return Virsh(libvirtd, pair, port)


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("storage_migration")
    result.notes["disk"] = f"{SIZE / GiB:g} GiB raw without holes, past the page cache, idle guest"
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(workplace())
        guest = guest_in(place)
        hostler = await _hostler(stack, place, guest)
        bare = await _bare(stack, place, hostler)
        contenders = [Contender("qemu", bare.run), Contender("hostler", hostler.run)]
        reason = libvirt.missing()
        if reason:
            result.skipped["virsh"] = reason
        else:
            contenders.append(Contender("virsh", (await _virsh(stack, place, guest)).run, optional=True))
        return await in_turns(result, contenders, rounds)
