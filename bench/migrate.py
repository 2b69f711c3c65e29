"""Live migration of an idle guest: total time, and the pause an outside client sees.

Everybody moves the same guest between two QEMUs on this machine, with unlimited bandwidth and the same downtime limit;
Hostler and bare QEMU encrypt (TLS with a pre-shared key), virsh does not. The pause is the longest time without a beat
of the guest, over the whole move, heard by a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bench import libvirt
from bench.bare import by_hand
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import BEAT_MS, free_udp_port, guest_in, heard_cmdline, ms, now, wait_up, workplace
from bench.subject import Host, introduce
from hostler.model.errors import InternalError
from hostler.model.vm import VmRecord
from hostler.testing import qemu_raw
from hostler.testing.microguest import MicroGuest
from hostler.testing.observer import PauseMeter
from hostler.testing.qemu_raw import RawQemu, RawSettings

MEMORY_MIB = 1024
DOWNTIME_LIMIT = 50
TOTAL = "call to done, target start included"
MOVE = "without the target's start"
PAUSE = "pause seen outside, whole move"
HANDOVER = "pause seen outside, hand-over"
LOST = "beats lost (count)"


WHOLE_MIB = (
    "sends unencrypted, and gives its guest whole MiB, for which QEMU before 9.0 under TCG skips work at the start of a"
    " move and may lose the guest's writes (see hostler.qemu.cmdline.ram_size)"
)


async def paused(port: int, move: Callable[[], Awaitable[dict[str, float]]]) -> Sample:
    """What `move` measured, and the pause around it. InternalError where it was not one guest that went on."""
    async with PauseMeter.beats(port) as meter:
        await meter.hearing()
        found = await move()
        await meter.next()
        report = await meter.report()
    if not report.continuous:
        raise InternalError("guest", f"is not the one that was moved: {report}")
    return {**found, PAUSE: report.longest_gap, HANDOVER: report.handover_gap, LOST: float(report.lost)}


@dataclass(slots=True)
class Hostler:
    """Moves between two hosts, there in one round and back in the next."""

    source: Host
    target: Host
    vm: VmRecord
    port: int

    async def run(self) -> Sample:
        found = await paused(self.port, self._move)
        self.source, self.target = self.target, self.source
        return found

    async def _move(self) -> dict[str, float]:
        begun = now()
        await self.source.migrate(self.vm.config.id, self.target)
        return {TOTAL: ms(now() - begun)}


@dataclass(slots=True)
class Bare:
    """Moves to a QEMU started for it each time."""

    machine: RawQemu
    line: list[str]
    """The command line with the word PLACE for the directory."""
    place: Path
    settings: RawSettings
    port: int
    moves: int = 0

    async def run(self) -> Sample:
        return await paused(self.port, self._move)

    async def _move(self) -> dict[str, float]:
        self.moves += 1
        there = self.place / f"q{self.moves}"
        there.mkdir()
        begun = now()
        target = await RawQemu.start(placed(self.line, there, incoming=True), there / "qmp.sock")
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(target.close)
            moved = await qemu_raw.migrate(self.machine, target, self.settings)
            undo.pop_all()
        done = now()
        await self.machine.close()
        self.machine = target
        return {TOTAL: ms(done - begun), MOVE: ms(moved.seconds)}

    async def close(self) -> None:
        await self.machine.close()


@dataclass(slots=True)
class Virsh:
    source: libvirt.Libvirtd
    target: libvirt.Libvirtd
    port: int

    async def run(self) -> Sample:
        found = await paused(self.port, self._move)
        self.source, self.target = self.target, self.source
        return found

    async def _move(self) -> dict[str, float]:
        begun = now()
        await self.source.virsh(
            *("migrate", "--live", libvirt.DOMAIN, self.target.uri, "--migrateuri", "tcp://127.0.0.1")
        )
        return {TOTAL: ms(now() - begun)}


def placed(line: list[str], place: Path, incoming: bool = False) -> list[str]:
    """The command line with its files in `place`."""
    return [*(word.replace("PLACE", str(place)) for word in line), *(("-incoming", "defer") if incoming else ())]


async def _hostler(stack: contextlib.AsyncExitStack, place: Path, guest: MicroGuest) -> Hostler:
    first = await stack.enter_async_context(Host("a", place / "a").running())
    second = await stack.enter_async_context(Host("b", place / "b").running())
    await introduce(first, second)
    port = free_udp_port()
    vm = await first.create("guest", guest, MEMORY_MIB, heard_cmdline(guest, port))
    await first.act(vm.config.id, "start")
    await wait_up(first.serial(vm))
    return Hostler(first, second, await first.vm(vm.config.id), port)


async def _bare(stack: contextlib.AsyncExitStack, place: Path, hostler: Hostler) -> Bare:
    """The command line Hostler built, with another port for the beats."""
    port = free_udp_port()
    theirs = hostler.source.qemu_command_line(hostler.vm)
    line = by_hand(theirs, hostler.source.serial(hostler.vm).parent, Path("PLACE"))
    line = [word.replace(f":{hostler.port}:{BEAT_MS}", f":{port}:{BEAT_MS}") for word in line]
    keys = place / "keys"
    keys.mkdir()
    (keys / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")
    here = place / "q0"
    here.mkdir()
    machine = await RawQemu.start(placed(line, here), here / "qmp.sock")
    settings = RawSettings(downtime_limit=DOWNTIME_LIMIT, keys=keys, late_block_activate=True)
    bare = Bare(machine, line, place, settings, port)
    stack.push_async_callback(bare.close)
    await wait_up(here / "serial.sock")
    return bare


async def _virsh(stack: contextlib.AsyncExitStack, place: Path, guest: MicroGuest) -> Virsh:
    first = await stack.enter_async_context(libvirt.Libvirtd("a", place / "va").running())
    second = await stack.enter_async_context(libvirt.Libvirtd("b", place / "vb").running())
    port = free_udp_port()
    await first.virsh("create", str(libvirt.domain(place / "va", guest, MEMORY_MIB, heard_cmdline(guest, port))))
    await wait_up(place / "va/serial.sock")
    for libvirtd in (first, second):
        await libvirtd.virsh("uri")
    return Virsh(first, second, port)


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("migrate")
    result.notes["guest"] = f"{MEMORY_MIB} MiB, idle"
    result.notes["virsh"] = WHOLE_MIB
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
        await in_turns(result, contenders, rounds)
        await asyncio.to_thread(shutil.rmtree, place / "keys")
        return result
