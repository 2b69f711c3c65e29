"""Help for tests with a guest that writes a journal on its disk, and with what is done below that disk meanwhile."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from hostler.host.resources import base_of
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.machine import LaunchSpec
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot
from hostler.qemu import blockdev
from hostler.qemu.machine import QemuMachine
from hostler.storage.exports import Exports
from hostler.testing import microguest, patterns
from hostler.testing.guestclient import GuestSerial
from hostler.testing.machines import Rig

SIZE = 16 * MiB
SEED, SPAN = 41, 1 * MiB
"""The journal: at the beginning of the disk."""
STILL, QUIET = 7, (4 * MiB, 8 * MiB)
"""What nobody writes to any more: seed, size and offset."""
WAIT = 60.0


class Guest:
    """A running guest whose disk "data" is under a journal, and what is below it."""

    machine: QemuMachine
    serial: GuestSerial

    def __init__(self, rig: Rig, spec: LaunchSpec, disk: Disk) -> None:
        self.rig = rig
        self.spec = spec
        self.disk = disk
        self.exports = Exports()
        self._places: list[str] = []
        self._stack = AsyncExitStack()

    async def boot(self) -> None:
        """Start it with the disk as it is now, and wait until it answers."""
        await self._stack.aclose()
        self.machine = await self.rig.launch(await self.at(self.spec.run_dir))
        await self.machine.run()
        self.serial = await self._stack.enter_async_context(GuestSerial.unix(f"{self.spec.run_dir}/serial.sock"))
        await self.serial.wait_ready(90)

    async def at(self, run_dir: str, incoming: bool = False) -> LaunchSpec:
        """What to launch there, with its exports started."""
        exports = {}
        if self.disk.source.base.exported:
            exports["data"] = await self.export(self.disk, run_dir, placeholder=incoming)
        config = self.spec.config.but(disks=(self.disk,))
        return self.spec.but(config=config, run_dir=run_dir, incoming=incoming, exports=exports)

    async def export(self, disk: Disk, run_dir: str | None = None, placeholder: bool = False) -> str:
        """Serve the base of a disk; the socket."""
        place = run_dir or self.spec.run_dir
        Path(place).mkdir(exist_ok=True)
        self._places.append(place)
        return await self.exports.start(place, base_of(disk), placeholder=placeholder)

    async def clear(self) -> None:
        """End everything."""
        await self._stack.aclose()
        for place in {self.spec.run_dir, *self._places}:
            await self.rig.hypervisor.kill_leftovers(self.spec.config.id, place)
            await self.exports.stop_all(place)

    async def image(
        self, format: ImageFormat = ImageFormat.QCOW2, backing: DiskSource | None = None, place: Path | None = None
    ) -> DiskSource:
        """A new image, also as a new layer."""
        token = secrets.token_hex(3)
        name = f"{token}.img" if place is None else f"{place.relative_to(self.rig.path)}/{token}.img"
        made = await self.rig.image(name, format, SIZE)
        return made.but(node=token, backing=backing)

    async def push(self, place: Path | None = None) -> None:
        """A new layer on top."""
        self.disk = self.disk.but(source=await self.image(backing=self.disk.source, place=place))
        await self.machine.blocks.push([self.disk])

    async def commit(self, top: int, base: int) -> None:
        """Merge layers, by their positions from the top."""
        chain = list(self.disk.source.layers())
        blocks = self.machine.blocks
        await blocks.commit("merge", self.disk, chain[top], chain[base])
        if top == 0:
            await self.switch("merge")
        else:
            await blocks.watch("merge")
        await blocks.forget("merge")
        self.disk = self.disk.but(source=without(self.disk.source, top, base))

    async def mirror(self, target: DiskSource, export: str | None = None) -> None:
        """Move the disk."""
        await self.machine.blocks.mirror("move", self.disk, target, export)
        await self.switch("move")
        await self.machine.blocks.forget("move")
        self.disk = self.disk.but(source=target)

    async def switch(self, job: str) -> None:
        """Finish a job as the host agent does."""
        await self.machine.blocks.watch(job, until_ready=True)
        await self.machine.stop()
        await self.machine.blocks.finish(job)
        await self.machine.run()

    async def writes_on(self) -> None:
        """Until the guest has written some more."""
        before = (await self.serial.pattern_status()).acked

        async def more() -> bool:
            status = await self.serial.pattern_status()
            assert status.errno == 0
            return status.acked >= before + 5

        await until(more)

    async def check(self) -> None:
        """Everything is there: the still part, and the journal up to its last block."""
        await self.serial.pattern_stop()
        reading = await self.serial.pattern_verify("data", SEED)
        assert reading.sound, reading
        assert (await self.serial.verify("data", STILL, *QUIET)).bad_sectors == 0
        await self.serial.pattern_start("data", SEED, SPAN)

    async def check_from_outside(self, acked: int, disk: Disk | None = None) -> None:
        """The same, of images that no QEMU has open any more, when the guest knew `acked` as written."""
        flat = self.rig.path / "flat.raw"
        graph = blockdev.blockdev_options(disk or self.disk)
        await run("qemu-img", "convert", "-O", "raw", f"json:{json.dumps(nameless(graph))}", str(flat))
        content = flat.read_bytes()
        slots = SPAN // patterns.BLOCK
        blocks = [content[n * patterns.BLOCK : (n + 1) * patterns.BLOCK] for n in range(slots)]
        verdict = patterns.check_journal(blocks, SEED, acked, slots)
        assert verdict.checked > 0
        assert verdict.sound, verdict
        size, offset = QUIET
        assert content[offset : offset + 65536] == patterns.pattern(STILL, 65536, offset)
        assert content[offset + size - 65536 : offset + size] == patterns.pattern(STILL, 65536, offset + size - 65536)


def nameless(graph: object) -> object:
    """The graph for a program that only reads."""
    if not isinstance(graph, dict):
        return graph
    left = {key: nameless(value) for key, value in graph.items() if key not in ("node-name", "aio", "discard")}
    return left | ({"read-only": True} if "read-only" in left else {})


def without(source: DiskSource, top: int, base: int) -> DiskSource:
    """The chain after a merge."""
    chain = list(source.layers())
    new = chain[base]
    for layer in reversed(chain[:top]):
        new = layer.but(backing=new)
    return new


@asynccontextmanager
async def writing_guest(format: ImageFormat = ImageFormat.QCOW2) -> AsyncIterator[Guest]:
    """Boot one with a disk of that format, a part of it filled, and let it write."""
    kept = microguest.build()
    kernel = KernelBoot(kernel=str(kept.kernel), initrd=str(kept.initrd), cmdline=kept.cmdline)
    async with Rig() as rig, AsyncExitStack() as undo:
        disk = Disk(id="data", source=await rig.image("data.img", format, SIZE), serial="data")
        spec = rig.spec(kernel=kernel, memory=192 * MiB, scsi_controllers=4)
        made = Guest(rig, spec, disk)
        undo.push_async_callback(made.clear)
        await made.boot()
        await made.serial.write("data", STILL, *QUIET)
        await made.serial.pattern_start("data", SEED, SPAN)
        yield made


async def run(*argv: str) -> None:
    """Run a program that must succeed."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    """Until it is so."""
    async with asyncio.timeout(WAIT):
        while True:
            if await done():
                return
            await asyncio.sleep(0.02)
