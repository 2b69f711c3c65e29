"""A guest between two hosts of a lab, which can be asked at any moment whether it is still the same and lost nothing.

The guest writes a journal on its disk all the time: numbered blocks, each flushed before the next. `check` reads it
back and compares the boot id, so that a lost write, a second writer and a reboot are all seen.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from hostler.model.errors import HostlerError, NotFound, TimedOut
from hostler.model.job import Job
from hostler.model.requests import DiskAdd, MigrateRequest, VmCreate, VolumeCreate
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot, VmRecord, VmState
from hostler.testing.guestclient import GuestSerial, JournalReading, Ping
from hostler.testing.lab import Lab, LabHost
from hostler.testing.microguest import build

T = TypeVar("T")
SEED = 4711
SPAN = 1 * MiB
"""Bytes of the disk that the journal goes round in: small, so that reading it back is quick."""
UNFINISHED = frozenset({"queued", "running", "unwinding"})


class Bench:
    """One VM, "guest", and what it is asked. Every method is synchronous: the tests around it kill and wait."""

    def __init__(self, lab: Lab, directory: Path, memory: int = 128 * MiB) -> None:
        self.lab = lab
        self.memory = memory
        self.shared = directory / "shared"
        self.shared.mkdir(exist_ok=True)
        self.shared.chmod(0o755)
        self.boot = ""
        self.disk_serial = ""

    @property
    def hosts(self) -> list[LabHost]:
        """The lab's hosts."""
        return self.lab.hosts

    def other(self, host: LabHost) -> LabHost:
        """The one of the two that `host` is not."""
        return next(h for h in self.hosts if h is not host)

    # asking the guest

    def ask(self, host: LabHost, question: Callable[[GuestSerial], Awaitable[T]], deadline: float = 60.0) -> T:
        """One conversation with the guest over its serial line on that host."""

        async def talk() -> T:
            async with asyncio.timeout(deadline), GuestSerial.unix(self.serial(host)) as guest:
                return await question(guest)

        return asyncio.run(talk())

    def serial(self, host: LabHost) -> Path:
        """The socket of its serial line."""
        return host.run_dir / "vms" / self.vm_id / "serial.sock"

    # life

    def create(self, host: LabHost) -> VmRecord:
        """Make the VM and its disk; it is off."""
        guest = build()
        for file in (guest.kernel, guest.initrd):  # the cache may be in a home that a VM's user must not enter
            shutil.copyfile(file, self.shared / file.name)
        kernel = KernelBoot(
            kernel=str(self.shared / guest.kernel.name),
            initrd=str(self.shared / guest.initrd.name),
            cmdline=guest.cmdline,
        )
        with host.client() as client:
            volume = VolumeCreate(name="journal", size=16 * MiB, path=str(self.shared / "journal.qcow2"))
            client.jobs.finish(client.volumes.create(volume, wait=30))
            record = client.vms.create(
                VmCreate(name="guest", memory=self.memory, kernel=kernel, disks=(DiskAdd(volume="journal"),))
            )
        self.vm_id = record.id
        self.disk_serial = record.config.disks[0].serial
        return record

    def start(self, host: LabHost) -> None:
        """Start it and let it write."""
        with host.client() as client:
            client.jobs.finish(client.vms.start("guest", wait=60))
        self.begin_writing(host)

    def begin_writing(self, host: LabHost) -> None:
        """Let the guest, which has just booted, write its journal from the first block on."""

        async def begin(guest: GuestSerial) -> str:
            ping = await guest.wait_ready()
            await guest.wait_disk(self.disk_serial)
            await guest.pattern_start(self.disk_serial, SEED, SPAN)
            return ping.boot

        self.boot = self.ask(host, begin)

    def check(self, host: LabHost) -> tuple[Ping, JournalReading]:
        """Ask whether it is the same guest and everything it wrote is there; it goes on writing afterwards."""

        async def look(guest: GuestSerial) -> tuple[Ping, JournalReading]:
            ping = await guest.ping()
            await guest.pattern_stop()
            reading = await guest.pattern_verify(self.disk_serial, SEED, SPAN)
            await guest.pattern_start(self.disk_serial, SEED, SPAN)
            return ping, reading

        ping, reading = self.ask(host, look)
        assert ping.boot == self.boot, "the guest was restarted"
        assert reading.sound, f"the guest lost writes: {reading}"
        return ping, reading

    # moving

    def begin_move(self, source: LabHost, target: LabHost, **options: object) -> Job:
        """Begin to move it; returns the job at once."""
        with source.client() as client:
            return client.vms.migrate("guest", MigrateRequest.model_validate({"host": target.name, **options}))

    def move(self, source: LabHost, target: LabHost, **options: object) -> Job:
        """Move it and wait; raises what went wrong."""
        job = self.begin_move(source, target, **options)
        with source.client() as client:
            return client.jobs.finish(job, timeout=120)

    # judging

    def record(self, host: LabHost) -> VmRecord | None:
        """The VM as that host has it, or None."""
        with host.client() as client:
            try:
                return client.vms.get("guest")
            except NotFound:
                return None

    def owner(self) -> LabHost:
        """The host that runs it. AssertionError unless exactly one does."""
        found = [h for h in self.hosts if (r := self.record(h)) is not None and r.state is VmState.RUNNING]
        assert len(found) == 1, [(h.name, self.record(h)) for h in self.hosts]
        return found[0]

    def settled(self, timeout: float = 90.0) -> None:
        """Wait until no job is under way on any host, and no QEMU waits for a stream."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if all(self._is_settled(host) for host in self.hosts):
                return
            time.sleep(0.05)
        state = "\n".join(f"--- {h.name}: {h.processes()}\n{h.tail()}" for h in self.hosts)
        raise TimedOut("lab", f"has not settled within {timeout} s\n{state}")

    def _is_settled(self, host: LabHost) -> bool:
        try:
            with host.client(deadline=5) as client:
                busy = [j for j in client.jobs.list() if str(j.state) in UNFINISHED]
                mine = {r.id for r in client.vms.list() if r.state not in (VmState.OFF, VmState.SAVED)}
        except HostlerError:
            return False
        run_dirs = {p.name for p in (host.run_dir / "vms").iterdir()} if (host.run_dir / "vms").is_dir() else set()
        return not busy and run_dirs <= mine and len(host.qemus()) == len(mine)

    def close(self) -> None:
        """Nothing of its own is left when the lab ends."""
