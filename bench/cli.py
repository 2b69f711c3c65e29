"""The command line as a whole process: how long a person waits for it. Python alone is the floor under it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from bench import libvirt
from bench.idle import MEMORY_MIB, PROGRAM, VMS, fill
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import guest_in, ms, now, workplace
from bench.subject import Host
from hostler.model.errors import InternalError
from hostler.testing.microguest import MicroGuest

HELP = "--help"
LIST = f"list of {VMS} VMs"


async def _time(*command: str, env: dict[str, str] | None = None) -> float:
    """Milliseconds of a command that must succeed."""
    begun = now()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **(env or {})}
    )
    _, words = await process.communicate()
    took = ms(now() - begun)
    if process.returncode != 0:
        raise InternalError(f"command {command[0]}", words.decode(errors="replace").strip() or "failed")
    return took


async def _python() -> Sample:
    took = await _time(sys.executable, "-c", "pass")
    return {HELP: took, LIST: took}


async def _hostler(host: Host) -> Sample:
    program = str(Path(sys.executable).with_name("hostler"))
    env = {"HOSTLER_HOST": f"unix:{host.run_dir / 'api.sock'}"}
    return {HELP: await _time(program, "--help", env=env), LIST: await _time(program, "vm", "list", env=env)}


async def _virsh(libvirtd: libvirt.Libvirtd) -> Sample:
    help_time = await _time("virsh", "help")
    begun = now()
    await libvirtd.virsh("list", "--all")
    return {HELP: help_time, LIST: ms(now() - begun)}


async def _define_many(libvirtd: libvirt.Libvirtd, guest: MicroGuest, place: Path) -> None:
    text = libvirt.domain(place, guest, MEMORY_MIB, "").read_text()
    for number in range(VMS):
        one = text.replace(f"<name>{libvirt.DOMAIN}</name>", f"<name>vm{number:03}</name>")
        (place / "one.xml").write_text(one.replace(f"<uuid>{libvirt.UUID}</uuid>", ""))
        await libvirtd.virsh("define", str(place / "one.xml"))


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("cli", base="python")
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(workplace())
        guest = guest_in(place)
        host = await stack.enter_async_context(Host("a", place / "a", PROGRAM).running())
        await fill(host, guest, start=False)
        contenders = [Contender("python", _python), Contender("hostler", lambda: _hostler(host))]
        reason = libvirt.missing()
        if reason:
            result.skipped["virsh"] = reason
        else:
            libvirtd = await stack.enter_async_context(libvirt.Libvirtd("a", place / "v").running())
            await _define_many(libvirtd, guest, place / "v")
            contenders.append(Contender("virsh", lambda: _virsh(libvirtd), optional=True))
        return await in_turns(result, contenders, rounds)
