"""Reading and writing inside a guest: a disk as Hostler attaches it beside one as QEMU does by itself.

Both guests have the same machine, and a raw image without holes on the same file system. Bare QEMU has `-drive` with
its defaults, through the host's page cache: what it reads is mostly in memory already, and what it writes is not on the
disk when the guest thinks so. To tell that apart it takes part a second time, with the page cache left out.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from bench.bare import by_hand, scsi_bus
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import guest_in, workplace
from bench.subject import WAIT, Host
from hostler.client import calls
from hostler.model.disk import ImageFormat
from hostler.model.requests import DiskAdd, VolumeRegister
from hostler.model.units import KiB, MiB
from hostler.testing.guestclient import GuestSerial
from hostler.testing.microguest import MicroGuest
from hostler.testing.qemu_raw import RawQemu

MEMORY_MIB = 256
SIZE = 256 * MiB
SERIAL = "bench"
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    writes: bool
    random: bool
    block: int
    depth: int


LOADS = (
    Load("read 4 KiB anywhere, 1 at a time", False, True, 4 * KiB, 1),
    Load("read 4 KiB anywhere, 8 at a time", False, True, 4 * KiB, 8),
    Load("write 4 KiB anywhere, 1 at a time", True, True, 4 * KiB, 1),
    Load("write 4 KiB anywhere, 8 at a time", True, True, 4 * KiB, 8),
    Load("read 1 MiB in order", False, False, 1 * MiB, 2),
    Load("write 1 MiB in order", True, False, 1 * MiB, 2),
)
"""Each measured as microseconds for a request: less is better, as everywhere."""


@dataclass(frozen=True, slots=True)
class Guest:
    serial: GuestSerial

    async def run(self) -> Sample:
        found: dict[str, float] = {}
        for load in LOADS:
            done = await self.serial.io(
                SERIAL,
                writes=load.writes,
                random=load.random,
                block=load.block,
                depth=load.depth,
                seconds=SECONDS,
            )
            found[f"{load.name} (us)"] = done.ns / 1000 / max(1, done.requests)
        return found


def filled(path: Path) -> Path:
    """An image without holes."""
    with path.open("wb") as file:
        for _ in range(SIZE // MiB):
            file.write(b"\xa5" * MiB)
    path.chmod(0o666)
    return path


async def _up(stack: contextlib.AsyncExitStack, socket: Path) -> Guest:
    serial = await stack.enter_async_context(GuestSerial.unix(socket))
    await serial.wait_ready(120)
    await serial.wait_disk(SERIAL)
    return Guest(serial)


async def _hostler(stack: contextlib.AsyncExitStack, place: Path, guest: MicroGuest) -> tuple[Guest, list[str], Path]:
    host = await stack.enter_async_context(Host("a", place / "a").running())
    vm = await host.create("guest", guest, MEMORY_MIB, guest.cmdline)
    await host.act(vm.config.id, "start")
    line = host.qemu_command_line(await host.vm(vm.config.id))
    image = filled(place / "h.raw")
    await host.client.send(calls.volume_register(VolumeRegister(name="h", path=str(image), format=ImageFormat.RAW)))
    disk = DiskAdd(volume="h", serial=SERIAL)
    await host.client.finish(await host.client.send(calls.disk_add(vm.config.id, disk, wait=WAIT)), WAIT)
    return await _up(stack, host.serial(vm)), line, host.serial(vm).parent


async def _bare(
    stack: contextlib.AsyncExitStack, place: Path, name: str, line: list[str], run_dir: Path, options: str
) -> Guest:
    here = place / name
    here.mkdir()
    image = filled(place / f"{name}.raw")
    argv = [*by_hand(line, run_dir, here), "-drive", f"file={image},format=raw,if=none,id=d{options}"]
    device = {"driver": "scsi-hd", "drive": "d", "bus": scsi_bus(line), "serial": SERIAL}
    argv += ["-device", json.dumps(device)]  # QEMU makes those in JSON last, and the controller is one of them
    await stack.enter_async_context(await RawQemu.start(argv, here / "qmp.sock"))
    return await _up(stack, here / "serial.sock")


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("guestio")
    result.notes["disk"] = f"{SIZE // MiB} MiB raw without holes; in the guest past its page cache"
    result.notes["qemu"] = "its defaults: through the host's page cache"
    result.notes["direct"] = "bare QEMU with cache=none, otherwise its defaults"
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(workplace())
        hostler, line, run_dir = await _hostler(stack, place, guest_in(place))
        bare = await _bare(stack, place, "q", line, run_dir, "")
        direct = await _bare(stack, place, "d", line, run_dir, ",cache=none")
        contenders = [
            Contender("qemu", bare.run),
            Contender("hostler", hostler.run),
            Contender("direct", direct.run),
        ]
        return await in_turns(result, contenders, rounds)
