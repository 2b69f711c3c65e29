"""Start: from the call until QEMU runs the guest, and until the guest's first word."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from bench import libvirt
from bench.bare import by_hand
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import first_word, guest_in, ms, now, serial_line, workplace
from bench.subject import Host
from hostler.model.vm import VmRecord
from hostler.testing.qemu_raw import RawQemu

MEMORY_MIB = 256
RUNNING = "call to running"
WORD = "call to the guest's first word"


async def _hostler(host: Host, vm: VmRecord) -> Sample:
    async with serial_line(host.serial(vm)) as heard:
        begun = now()
        await host.act(vm.config.id, "start")
        running = now()
        word = await first_word(heard)
    await host.act(vm.config.id, "turn-off")
    return {RUNNING: ms(running - begun), WORD: ms(word - begun)}


async def _bare(line: Sequence[str], place: Path) -> Sample:
    place.mkdir(exist_ok=True)
    async with serial_line(place / "serial.sock") as heard:
        begun = now()
        async with await RawQemu.start(line, place / "qmp.sock") as machine:
            await machine.cmd("query-status")
            running = now()
            word = await first_word(heard)
    return {RUNNING: ms(running - begun), WORD: ms(word - begun)}


async def _virsh(libvirtd: libvirt.Libvirtd, xml: Path, place: Path) -> Sample:
    async with serial_line(place / "serial.sock") as heard:
        begun = now()
        await libvirtd.virsh("create", str(xml))
        running = now()
        word = await first_word(heard)
    await libvirtd.virsh("destroy", libvirt.DOMAIN)
    return {RUNNING: ms(running - begun), WORD: ms(word - begun)}


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("start")
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(workplace())
        guest = guest_in(place)
        host = await stack.enter_async_context(Host("a", place / "a").running())
        vm = await host.create("guest", guest, MEMORY_MIB, guest.cmdline)
        await host.act(vm.config.id, "start")
        line = host.qemu_command_line(await host.vm(vm.config.id))
        await host.act(vm.config.id, "turn-off")
        bare = by_hand(line, host.serial(vm).parent, place / "q")
        contenders = [
            Contender("qemu", lambda: _bare(bare, place / "q")),
            Contender("hostler", lambda: _hostler(host, vm)),
        ]
        reason = libvirt.missing()
        if reason:
            result.skipped["virsh"] = reason
        else:
            libvirtd = await stack.enter_async_context(libvirt.Libvirtd("a", place / "v").running())
            xml = libvirt.domain(place / "v", guest, MEMORY_MIB, guest.cmdline)
            contenders.append(Contender("virsh", lambda: _virsh(libvirtd, xml, place / "v"), optional=True))
        return await in_turns(result, contenders, rounds)
