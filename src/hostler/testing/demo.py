"""The main job, on this machine, in about a minute: `./run demo`.

Two hosts are started (as root each in a network namespace of its own), a VM boots, a client outside talks to it every
2 ms, the VM moves to the other host and back while it runs, is given a disk, writes on it, moves with it, and gives it
back. In between the disk itself moves to other storage, grows, is checkpointed, backed up and merged. Every step says
the command an administrator would type; the figures come from outside the VM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hostler.client.client import Client
from hostler.model.errors import HostlerError, InternalError
from hostler.model.job import Job
from hostler.model.nic import Network
from hostler.model.requests import DiskAdd, MigrateRequest, NicAdd, ShutdownRequest, VmCreate, VolumeCreate
from hostler.model.units import MiB, format_size, parse_size
from hostler.model.vm import KernelBoot, VmRecord
from hostler.testing.demo_storage import StorageSteps
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab, LabHost
from hostler.testing.microguest import MicroGuest, build
from hostler.testing.observer import PauseMeter
from hostler.testing.pausereport import PauseReport

T = TypeVar("T")
VM = "demo"
PATTERN = 8 * MiB
NAT_HOST, NAT_GUEST = "10.0.2.2", "10.0.2.15/24"
"""How QEMU's own network names the host and the guest."""


@dataclass
class Figures:
    """What was measured; printed at the end. Milliseconds unless the name says otherwise."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, float | int | str] = field(default_factory=dict)

    def add(self, what: str, key: str, value: float, unit: str = "ms") -> None:
        """One figure."""
        self.values[key] = round(value, 1)
        self.lines.append((what, f"{value:,.0f} {unit}"))


class Demo:
    """The steps, in order."""

    def __init__(self, lab: Lab, directory: Path, memory: int, quiet: bool) -> None:
        self.lab = lab
        self.directory = directory
        self.memory = memory
        self.quiet = quiet
        self.figures = Figures()
        self.shared = directory / "shared"
        self.shared.mkdir(mode=0o755)

    def say(self, text: str = "") -> None:
        """Tell what happens."""
        if not self.quiet:
            print(text, flush=True)

    def step(self, text: str, command: str = "") -> None:
        """Tell the next step, and the command for it."""
        self.say(f"\n* {text}")
        if command:
            self.say(f"    $ {command}")

    async def run(self) -> None:
        """Everything."""
        guest = await asyncio.to_thread(self._guest)
        one, two = await asyncio.to_thread(self._hosts)
        async with contextlib.AsyncExitStack() as stack:
            meter, cmdline = self._client_outside(guest)
            if not self.lab.isolated:  # the guest is told the port the client listens on
                await stack.enter_async_context(meter)
                cmdline = guest.with_network(NAT_GUEST, NAT_HOST, f"{NAT_HOST}:{meter.port}:2")
            record = await self._boot(one, guest, cmdline)
            serial = await stack.enter_async_context(GuestSerial.unix(self._serial(one, record)))
            await serial.wait_ready()
            self.figures.add("start: command until the guest's first word", "first_word", self._since_start())
            if self.lab.isolated:
                await stack.enter_async_context(meter)
            await meter.hearing()
            await self._move(one, two, serial, record, "there")
            disk = await self._add_disk(two, serial)
            await StorageSteps(self, VM, two, serial).run()
            await self._move(two, one, serial, record, "back")
            await self._check_disk(one, serial, disk)
            await self._judge(meter)
        await asyncio.to_thread(self._shut_down, one)

    # the scene

    def _guest(self) -> MicroGuest:
        self.step("building a small guest from Debian's kernel (kept for the next time)")
        made = build()
        for file in (made.kernel, made.initrd):
            (self.shared / file.name).write_bytes(file.read_bytes())
        return MicroGuest(self.shared / made.kernel.name, self.shared / made.initrd.name, made.cmdline)

    def _hosts(self) -> tuple[LabHost, LabHost]:
        self.step("starting two hosts", "hostlerd --name one ...; hostlerd --name two ...")
        started = time.monotonic()
        bridged = self.lab.isolated
        one = self.lab.add_host("one", guest_bridge=bridged)
        two = self.lab.add_host("two", guest_bridge=bridged)
        self.say(f"    both answer after {(time.monotonic() - started) * 1000:.0f} ms")
        self.step(
            "making them trust each other", "hostler host invite   # on one;   hostler host join TOKEN   # on two"
        )
        self.lab.join(one, two)
        with one.client() as client:
            choice = client.hosts.this().facts
        if choice is not None:
            self.say(f"    accelerator: {choice.accelerator.kind}: {choice.accelerator.reason}")
        return one, two

    def _client_outside(self, guest: MicroGuest) -> tuple[PauseMeter, str]:
        """The observer, and the kernel command line with which the guest can be heard by it. As root the guest has an
        address on the hosts' network and is asked; else it sits behind QEMU's NAT and tells."""
        if self.lab.isolated:
            address = self.lab.address(50)
            return PauseMeter.echo(address), guest.with_network(f"{address}/24")
        return PauseMeter.beats(), guest.cmdline

    # the steps

    async def _boot(self, host: LabHost, guest: MicroGuest, cmdline: str) -> VmRecord:
        nic = NicAdd(network=Network.BRIDGE, bridge="br0") if self.lab.isolated else NicAdd()
        wanted = VmCreate(
            name=VM,
            memory=self.memory,
            kernel=KernelBoot(kernel=str(guest.kernel), initrd=str(guest.initrd), cmdline=cmdline),
            nics=(nic,),
        )
        size = format_size(self.memory)
        self.step(f"booting a VM with {size}", f"hostler vm create {VM} --memory {size} --kernel ... --start")

        def start(client: Client) -> VmRecord:
            client.vms.create(wanted)
            self._started = time.monotonic()
            job = client.jobs.finish(client.vms.start(VM, wait=60))
            self.figures.add("start: command until QEMU runs the guest", "start", _took(job))
            return client.vms.get(VM)

        return await asyncio.to_thread(_with, host, start)

    def _since_start(self) -> float:
        return (time.monotonic() - self._started) * 1000

    def _serial(self, host: LabHost, record: VmRecord) -> Path:
        return host.run_dir / "vms" / record.id / "serial.sock"

    async def _move(self, source: LabHost, target: LabHost, serial: GuestSerial, record: VmRecord, way: str) -> None:
        self.step(f"moving it to {target.name} while it runs", f"hostler vm move {VM} {target.name}")
        before = await serial.ping()
        job = await asyncio.to_thread(
            _with,
            source,
            lambda c: c.jobs.finish(c.vms.migrate(VM, MigrateRequest(host=target.name), wait=120), timeout=120),
        )
        serial.move_to(self._serial(target, record))
        after = await serial.ping()
        if before.boot != after.boot:
            raise InternalError(f"vm {VM}", "was restarted by the move")
        detail = job.progress.detail
        sent = int(str(detail.get("transferred", 0)))
        self.say(f"    {_took(job):,.0f} ms, {format_size(sent)} sent, {detail.get('rounds')} rounds; same guest")
        self.figures.add(f"move {way}: command until all is done", f"move_{way}", _took(job))

    async def _add_disk(self, host: LabHost, serial: GuestSerial) -> str:
        self.step("giving it a disk while it runs", f"hostler disk add {VM} --new 64M --format qcow2")
        volume = VolumeCreate(name="extra", size=64 * MiB, path=str(self.shared / "extra.qcow2"))

        def make(client: Client) -> None:
            client.jobs.finish(client.volumes.create(volume, wait=30))

        await asyncio.to_thread(_with, host, make)
        started = time.monotonic()
        await asyncio.to_thread(
            _with,
            host,
            lambda c: c.jobs.finish(c.vms.attach_disk(VM, DiskAdd(volume="extra", serial="EXTRA"), wait=30)),
        )
        seen = await serial.wait_disk("EXTRA")
        self.figures.add("disk added: command until the guest sees it", "hot_add", (time.monotonic() - started) * 1000)
        await serial.write("EXTRA", seed=7, size=PATTERN)
        self.say(
            f"    the guest sees it as {seen.name} ({format_size(seen.size)}) and has written {PATTERN // MiB} MiB"
        )
        return seen.name

    async def _check_disk(self, host: LabHost, serial: GuestSerial, disk: str) -> None:
        self.step("reading the disk back after the move, and taking it away", f"hostler disk remove {VM} disk0")
        verdict = await serial.verify("EXTRA", seed=7, size=PATTERN)
        if verdict.bad_sectors:
            raise InternalError(f"vm {VM}", f"{verdict.bad_sectors} sectors of its disk are wrong after the move")
        started = time.monotonic()
        await asyncio.to_thread(_with, host, lambda c: c.jobs.finish(c.vms.detach_disk(VM, "disk0", wait=30)))
        await serial.wait_disk_gone(disk)
        self.figures.add("disk removed: command until it is gone", "hot_remove", (time.monotonic() - started) * 1000)
        self.say(f"    {verdict.bytes // MiB} MiB verified, nothing lost")

    async def _judge(self, meter: PauseMeter) -> None:
        await asyncio.sleep(0.5)
        report: PauseReport = await meter.report()
        if not report.continuous:
            raise InternalError(f"vm {VM}", "the client saw more than one guest, or one that went back in time")
        self.figures.add("client: longest silence of the guest, of both moves", "pause", report.longest_gap)
        self.figures.add("client: messages answered", "answered", report.received, f"of {report.sent}")

    def _shut_down(self, host: LabHost) -> None:
        self.step("shutting it down", f"hostler vm shutdown {VM}")
        with host.client() as client:
            request = ShutdownRequest(timeout=30)
            job = client.jobs.finish(client.vms.shutdown(VM, request, wait=60))
            client.vms.delete(VM, disks=True)
        self.figures.add("shut down by the guest's own hand", "shutdown", _took(job))


def _with(host: LabHost, work: Callable[[Client], T]) -> T:
    """Do something with a client of that host."""
    with host.client() as client:
        return work(client)


def _took(job: Job) -> float:
    """Milliseconds from the request to the end of its job."""
    assert job.ended is not None
    return (job.ended - job.created).total_seconds() * 1000


def _print(figures: Figures) -> None:
    width = max(len(what) for what, _ in figures.lines)
    print("\nMeasured:")
    for what, value in figures.lines:
        print(f"  {what:<{width}}  {value}")


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(
        prog="./run demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", default="512M", help="of the VM (default 512M)")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        try:
            with Lab(directory) as lab:
                demo = Demo(lab, directory, parse_size(given.memory), given.json)
                asyncio.run(demo.run())
        except HostlerError as error:
            print(f"demo: {error.object}: {error.cause}\n  {error.advice}", file=sys.stderr)
            return 1
    if given.json:
        print(json.dumps(demo.figures.values))
    else:
        _print(demo.figures)
        print("\nThe two hosts and everything they made are gone again. To go on: ./run up, and docs/user-guide.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
