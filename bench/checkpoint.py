"""Checkpoints of a guest that writes all the time: how long it is silent, seen from outside, while one is made and
while one is deleted, whose layer is merged, and how long that takes. Beside it the same guest with nothing done to it:
what its longest silence is anyway on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bench.measure import BASE, Contender, Result, Sample, in_turns
from bench.stage import GATEWAY, GUEST_ADDRESS, guest_in, ms, now, workplace
from bench.subject import WAIT, Host
from hostler.client import calls
from hostler.model.checkpoint import CheckpointKind
from hostler.model.checkpoint_requests import CheckpointCreate
from hostler.model.nic import Network
from hostler.model.requests import DiskAdd, NicAdd, VmCreate, VolumeCreate
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot, VmRecord
from hostler.testing.guestclient import GuestSerial
from hostler.testing.observer import PauseMeter

MEMORY = 256 * MiB
SIZE = 256 * MiB
WRITTEN = 64 * MiB
"""What is written after the checkpoint, and merged when it is deleted."""
QUIET = 0.5
"""Seconds of listening before and after."""
INTERVAL = 2
"""Milliseconds between two signs of life."""
SEED = 7


@dataclass(slots=True)
class Stage:
    """A running guest that writes its journal and sends beats."""

    host: Host
    vm: VmRecord
    guest: GuestSerial
    disk: str

    async def silence(self, work: Callable[[], Awaitable[None]]) -> float:
        """The guest's longest silence around `work`, in milliseconds."""
        async with PauseMeter.beats() as meter:
            await self.guest.beat(GATEWAY, meter.port, INTERVAL)
            await meter.hearing()
            await asyncio.sleep(QUIET)
            await work()
            await asyncio.sleep(QUIET)
            report = await meter.report()
        await self.guest.beat(GATEWAY, meter.port, 0)
        return float(report.longest_gap)

    async def timed(self, name: str, work: Callable[[], Awaitable[None]]) -> dict[str, float]:
        """Both figures of one deed."""
        took = 0.0

        async def run() -> None:
            nonlocal took
            begun = now()
            await work()
            took = now() - begun

        return {f"{name}: longest silence": await self.silence(run), f"{name}: took": ms(took)}

    async def make(self, kind: CheckpointKind) -> None:
        request = CheckpointCreate(name="bench", kind=kind)
        job = await self.host.client.send(calls.checkpoint_create(self.vm.id, request, wait=WAIT))
        await self.host.client.finish(job, WAIT)

    async def delete(self) -> None:
        job = await self.host.client.send(calls.checkpoint_delete(self.vm.id, "bench", wait=WAIT))
        await self.host.client.finish(job, WAIT)

    async def hostler(self) -> Sample:
        """Everything once; nothing is left of it."""
        found: dict[str, float] = {}
        found |= await self.timed("make, disks", lambda: self.make(CheckpointKind.DISKS))
        await self.guest.write(self.disk, SEED, WRITTEN, 16 * MiB, deadline=WAIT)
        found |= await self.timed(f"delete, {WRITTEN // MiB} MiB merged", self.delete)
        found |= await self.timed("make, with memory", lambda: self.make(CheckpointKind.FULL))
        await self.delete()
        return found

    async def nothing(self) -> Sample:
        """The same watching, without any work."""
        found: dict[str, float] = {}
        for name in ("make, disks", f"delete, {WRITTEN // MiB} MiB merged", "make, with memory"):
            found[f"{name}: longest silence"] = await self.silence(lambda: asyncio.sleep(0.5))
        return found


async def run(rounds: int) -> Result:
    """The benchmark."""
    result = Result("checkpoint")
    with workplace() as place:
        files = guest_in(place)
        async with Host("bench", place / "h").running() as host:
            volume = VolumeCreate(name="disk", size=SIZE)
            await host.client.finish(await host.client.send(calls.volume_create(volume, wait=WAIT)), WAIT)
            boot = KernelBoot(kernel=str(files.kernel), initrd=str(files.initrd), cmdline=files.cmdline)
            nic = NicAdd(network=Network.USER)
            request = VmCreate(name="bench", memory=MEMORY, kernel=boot, disks=(DiskAdd(volume="disk"),), nics=(nic,))
            vm = await host.client.send(calls.vm_create(request))
            await host.act(vm.id, "start")
            async with GuestSerial.unix(host.serial(vm)) as guest:
                await guest.wait_ready(deadline=120)
                disk = vm.config.disks[0].serial
                await guest.set_ip(GUEST_ADDRESS, GATEWAY)
                await guest.pattern_start(disk, SEED, 8 * MiB)
                stage = Stage(host, vm, guest, disk)
                contenders = [Contender(BASE, stage.nothing), Contender("hostler", stage.hostler)]
                await in_turns(result, contenders, rounds)
                await guest.pattern_stop()
                reading = await guest.pattern_verify(disk, SEED, 8 * MiB)
                result.notes["journal"] = (
                    f"{reading.checked} blocks read back, {reading.lost} lost, {reading.torn} torn"
                )
    result.notes["qemu"] = "here: nothing is done to the guest; what its longest silence is anyway"
    return result
