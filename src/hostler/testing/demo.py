"""`./run demo`: what Hostler does, shown on one machine and measured from outside.

Two hosts (real daemons, as root each in a network namespace of its own), a guest that boots in seconds, a client that
keeps talking to it: the guest moves to the other host while it runs, is given a disk there, and moves back with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hostler.client.client import Client
from hostler.model.errors import HostlerError, InternalError
from hostler.model.migration import MigrationProgress
from hostler.model.nic import Network
from hostler.model.requests import DiskAdd, MigrateRequest, NicAdd, ShutdownRequest, VmCreate, VolumeCreate
from hostler.model.units import GiB, MiB, format_size, parse_size
from hostler.model.vm import KernelBoot, StopAction
from hostler.testing import microguest
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab, LabHost
from hostler.testing.observer import PauseMeter
from hostler.testing.pausereport import PauseReport

T = TypeVar("T")

VM, DISK, SERIAL = "demo", "demo-data", "demo-data-1"
PATTERN, SEED = 16 * MiB, 2008
BEAT_MS = 2
"""Between two signs of life of the guest: what a pause is measured to."""
GUEST_NUMBER = 100
"""The guest's number in the lab's network."""


@contextlib.contextmanager
def act(text: str) -> Iterator[Callable[[str], None]]:
    """Say what begins, then how long it took; what is handed to the yielded function is said behind that."""
    print(f"  {text:<44}", end="", flush=True)
    said: list[str] = []
    begun = time.monotonic()
    try:
        yield said.append
    except BaseException:
        print(" failed", flush=True)
        raise
    print("   ".join([f"{time.monotonic() - begun:6.2f} s", *said]), flush=True)


@dataclass(slots=True)
class Demo:
    """`shared` is a directory both hosts see; `windows` are start and end of each move (monotonic clock)."""

    lab: Lab
    shared: Path
    memory: int
    vm_id: str = ""
    boot: str = ""
    windows: dict[str, tuple[float, float]] = field(default_factory=dict)

    async def run(self) -> PauseReport:
        """The whole play."""
        with act("building the small guest"):
            guest = await asyncio.to_thread(microguest.build)
        with act("starting two hosts that trust each other"):
            first, second = await asyncio.to_thread(self._hosts)
        async with contextlib.AsyncExitStack() as undo:
            meter, nic, cmdline = self._outside(guest)
            if not self.lab.isolated:
                await undo.enter_async_context(meter)
                cmdline = guest.with_network("10.0.2.15/24", "10.0.2.2", f"10.0.2.2:{meter.port}:{BEAT_MS}")
            await self._boot(first, nic, self._kernel(guest, cmdline))
            if self.lab.isolated:
                await undo.enter_async_context(meter)
            await meter.hearing()
            print(f"    a client hears from it every {BEAT_MS} ms, from now on", flush=True)
            await self._move(first, second)
            await self._add_disk(second)
            await self._move(second, first)
            await self._same_guest(first)
            report = await meter.report()
        await self._end(first)
        return report

    def _hosts(self) -> tuple[LabHost, LabHost]:
        first = self.lab.add_host("alpha", guest_bridge=self.lab.isolated)
        second = self.lab.add_host("beta", guest_bridge=self.lab.isolated)
        self.lab.join(first, second)
        return first, second

    def _outside(self, guest: microguest.MicroGuest) -> tuple[PauseMeter, NicAdd, str]:
        """With a network of our own the guest has an address and is asked. Otherwise QEMU's own network lets it reach
        out only, so it sends."""
        if not self.lab.isolated:
            return PauseMeter.beats(), NicAdd(network=Network.USER), ""
        address = self.lab.address(GUEST_NUMBER)
        nic = NicAdd(network=Network.BRIDGE, bridge="br0")
        return PauseMeter.echo(address, BEAT_MS), nic, guest.with_network(f"{address}/24")

    def _kernel(self, guest: microguest.MicroGuest, cmdline: str) -> KernelBoot:
        """Where both hosts, and the user the VM runs as, can read it."""
        for file in (guest.kernel, guest.initrd):
            shutil.copyfile(file, self.shared / file.name)
        kernel, initrd = (str(self.shared / file.name) for file in (guest.kernel, guest.initrd))
        return KernelBoot(kernel=kernel, initrd=initrd, cmdline=cmdline)

    async def _boot(self, host: LabHost, nic: NicAdd, kernel: KernelBoot) -> None:
        wanted = VmCreate(name=VM, memory=self.memory, kernel=kernel, nics=(nic,))
        with act(f"making VM {VM} ({format_size(self.memory)}) on {host.name}") as note:
            self.vm_id = (await call(host, lambda client: client.vms.create(wanted))).id
            facts = (await call(host, lambda client: client.hosts.this())).facts
            note(f"accelerator {facts.accelerator.kind}" if facts else "")
        with act("starting it, until QEMU runs"):
            await call(host, lambda client: client.jobs.finish(client.vms.start(VM, wait=60)))
        with act("until the guest's first word"):
            async with self._guest(host) as guest:
                self.boot = (await guest.wait_ready()).boot

    def _guest(self, host: LabHost) -> GuestSerial:
        return GuestSerial.unix(host.run_dir / "vms" / self.vm_id / "serial.sock")

    async def _move(self, source: LabHost, target: LabHost) -> None:
        request = MigrateRequest(host=target.name)
        begun = time.monotonic()
        with act(f"moving it from {source.name} to {target.name}") as note:
            job = await call(source, lambda client: client.jobs.finish(client.vms.migrate(VM, request, wait=120)))
            progress = MigrationProgress.model_validate(job.progress.detail)
            note(f"{format_size(progress.transferred)} sent")
        self.windows[f"{source.name} to {target.name}"] = (begun, time.monotonic())

    async def _add_disk(self, host: LabHost) -> None:
        path = str(self.shared / "data.vhdx")
        volume = VolumeCreate.model_validate({"name": DISK, "size": 1 * GiB, "format": "vhdx", "path": path})
        disk = DiskAdd(volume=DISK, serial=SERIAL)
        with act("making a 1 GiB VHDX volume"):
            await call(host, lambda client: client.jobs.finish(client.volumes.create(volume, wait=60)))
        async with self._guest(host) as guest:
            await guest.ping()
            with act("adding it while the guest runs, until it sees it"):
                seen = asyncio.create_task(guest.wait_disk(SERIAL))
                await call(host, lambda client: client.jobs.finish(client.vms.attach_disk(VM, disk, wait=60)))
                await seen
            with act(f"the guest writes {format_size(PATTERN)} to it"):
                await guest.write(SERIAL, SEED, PATTERN)

    async def _same_guest(self, host: LabHost) -> None:
        async with self._guest(host) as guest:
            with act("the guest reads back what it wrote") as note:
                verdict = await guest.verify(SERIAL, SEED, PATTERN)
                if verdict.bad_sectors or verdict.bytes != PATTERN:
                    raise InternalError(f"vm {VM}", f"reads back something else than it wrote: {verdict}")
                note("every byte")
            if (await guest.ping()).boot != self.boot:
                raise InternalError(f"vm {VM}", "was restarted on the way")

    async def _end(self, host: LabHost) -> None:
        request = ShutdownRequest(timeout=30, then=StopAction.TURN_OFF)
        with act("shutting it down"):
            await call(host, lambda client: client.jobs.finish(client.vms.shutdown(VM, request, wait=60)))


async def call(host: LabHost, question: Callable[[Client], T]) -> T:
    """Ask a host's API, beside everything else that goes on here."""

    def ask() -> T:
        with host.client(deadline=150) as client:
            return question(client)

    return await asyncio.to_thread(ask)


def pause_in(report: PauseReport, window: tuple[float, float]) -> float | None:
    """The longest silence (ms) that began in that time; None where it is not among those the report lists."""
    found = [hole.ms for hole in report.gaps if window[0] <= hole.start <= window[1]]
    return max(found, default=None)


def summary(report: PauseReport, windows: dict[str, tuple[float, float]]) -> Iterator[str]:
    """What the client found, for people."""
    yield f"  signs of life heard   {report.received}, one every {report.median_gap:.1f} ms"
    least = min((hole.ms for hole in report.gaps), default=0.0)
    for name, window in windows.items():
        pause = pause_in(report, window)
        shown = f"{pause:.0f} ms" if pause is not None else f"below {least:.0f} ms"
        yield f"  silence, {name:<16}{shown}"
    yield f"  one guest that never stopped being itself: {'yes' if report.continuous else 'NO'}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all of it worked, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", type=parse_size, default=256 * MiB, metavar="SIZE", help="of the VM (default 256M)")
    options = parser.parse_args(arguments)
    # Short, for the unix sockets below it (107 bytes), and open to the user the VM runs as.
    directory = Path(tempfile.mkdtemp(prefix="hl-", dir="/tmp"))
    directory.chmod(0o755)
    shared = directory / "shared"
    shared.mkdir()
    print("\nHostler: a running VM that moves between two hosts, and a disk added on the way\n", flush=True)
    try:
        with Lab(directory) as lab:
            demo = Demo(lab, shared, options.memory)
            report = asyncio.run(demo.run())
        print("\nMeasured from outside\n", *summary(report, demo.windows), "", sep="\n", flush=True)
        return 0 if report.continuous else 1
    except HostlerError as error:
        print(f"\nerror: {error.object}: {error.cause}\n  {error.advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
