"""What the simulated hypervisors of one process share, and one simulated QEMU: its guest, its disks, its end."""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from collections.abc import Callable

from pydantic import JsonValue

from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.disk import Bus, Disk, DiskSource, SourceKind
from hostler.model.errors import AlreadyExists, Busy, GuestRefused, InUse, NotFound, WrongState
from hostler.model.machine import LaunchSpec, MachineEvent, RunStatus
from hostler.model.migration import MigrationProgress
from hostler.model.vm import Process
from hostler.qemu.qmp import EventStream

FIRST_PID = 2**22 + 1
"""Above the kernel's highest process number (PID_MAX_LIMIT is 2**22): never a real process."""


class World:
    """Everything simulated hosts share as real ones share a machine, a storage and a network."""

    def __init__(self) -> None:
        self.running: dict[str, SimulatedQemu] = {}
        """By run directory."""
        self.outputs: dict[str, str] = {}
        self.wire: dict[str, SimulatedQemu] = {}
        """Who listens, by address."""
        self.locks: dict[str, SimulatedQemu] = {}
        """Who writes an image, by real path."""
        self._pids = itertools.count(FIRST_PID)
        self._ports = itertools.count(49152)

    def find(self, run_dir: str) -> SimulatedQemu | None:
        """The one that runs there."""
        return self.running.get(run_dir)

    def next_pid(self) -> int:
        """A process number nobody has had."""
        return next(self._pids)

    def next_address(self, host: str) -> str:
        """An address nobody has had."""
        return f"{host}:{next(self._ports)}"


class SimulatedJob:
    """A block job. `switch` is what it does to its disk at a good end."""

    def __init__(
        self, job: str, kind: str, disk_id: str, total: int, switch: Callable[[], None], becomes_ready: bool
    ) -> None:
        self.id = job
        self.kind = kind
        self.disk_id = disk_id
        self.state = BlockJobState.RUNNING
        self.error = ""
        self._total = total
        self._steps = 0
        self._done = 0
        self._switch = switch
        self._becomes_ready = becomes_ready

    def step(self, steps: int, error: str) -> None:
        """Go on: one of so many steps, or the error."""
        self._steps += 1
        self._done = self._total * min(self._steps, steps) // steps
        if error or (self._steps >= steps and not self._becomes_ready):
            self.end(error)
        elif self._steps >= steps:
            self.state = BlockJobState.READY

    def end(self, error: str) -> None:
        """The end, with the switch unless there is an error."""
        self.error = error
        self.state = BlockJobState.FAILED if error else BlockJobState.DONE
        if not error:
            self._switch()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in (BlockJobState.DONE, BlockJobState.FAILED)

    def seen(self) -> BlockJob:
        """As the contract tells it."""
        return BlockJob(
            id=self.id, kind=self.kind, state=self.state, done=self._done, total=self._total, error=self.error
        )


class SimulatedQemu:
    """One simulated QEMU. The public attributes of its guest are for tests to set."""

    def __init__(self, world: World, spec: LaunchSpec) -> None:
        pid = world.next_pid()
        self.world = world
        self.spec = spec
        self.name = f"vm {spec.config.name}"
        self.process = Process(pid=pid, started=pid, run_dir=spec.run_dir)
        self.status = RunStatus.INMIGRATE if spec.incoming else RunStatus.PRELAUNCH
        self.disks: dict[str, Disk] = {}
        self.io_status: dict[str, str] = {}
        self.connections = {connection.pool: connection for connection in spec.connections}
        self.progress = MigrationProgress()
        self.loaded = False
        self.secret = ""
        self.address: str | None = None
        self.active = not spec.incoming
        self.alive = True
        self.gone = asyncio.Event()
        self.output = ""
        self.agent = False
        """Whether a guest agent answers."""
        self.obeys_power_button = True
        self.lets_go_of_disks = True
        self.move_steps = 4
        """How many times a move gives progress (and may be cancelled) on its way."""
        self.jobs: dict[str, SimulatedJob] = {}
        self.job_steps = 4
        """How many looks a block job takes."""
        self.jobs_stand = False
        """Whether block jobs get no further."""
        self.job_error = ""
        """What QEMU says about block jobs that fail from now on."""
        self.bitmaps: dict[str, set[str]] = {}
        """Names of the dirty bitmaps of each node."""
        self.moments: dict[str, bytes] = {}
        """What is kept of disks for a backup."""
        self.frozen = False
        """Whether the guest's file systems are frozen."""
        self.locked_trays: set[str] = set()
        """Drives whose medium the guest holds."""
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        world.running[spec.run_dir] = self

    @property
    def pid(self) -> int:
        """Its process number."""
        return self.process.pid

    def events(self) -> EventStream:
        """Events from now on."""
        stream = EventStream()
        if self.alive:
            self._streams.add(stream)
        else:
            stream.end()
        return stream

    def emit(self, event: str, **data: JsonValue) -> None:
        """Tell everyone who listens."""
        for stream in list(self._streams):
            stream.put(MachineEvent(name=event, data=data))

    def set_progress(self, **changes: object) -> None:
        """Change the counters; a new status is told."""
        before = self.progress.status
        self.progress = self.progress.but(**changes)
        if self.progress.status != before:
            self.emit("MIGRATION", status=self.progress.status)

    def die(self, output: str = "killed") -> None:
        """End at once, as after `kill -9`. Harmless when it has ended."""
        if not self.alive:
            return
        self.alive = False
        self.output = output
        self.world.outputs[self.spec.run_dir] = output
        del self.world.running[self.spec.run_dir]
        self.deactivate()
        if self.address is not None:
            self.world.wire.pop(self.address, None)
        for stream in list(self._streams):
            stream.end()
        self.gone.set()

    # the guest

    def run(self) -> None:
        """Run the guest; takes the locks of its disks where they are not taken."""
        if self.status is RunStatus.INMIGRATE:
            raise WrongState(self.name, "its state has not arrived yet", "wait until it is loaded")
        if self.status is not RunStatus.RUNNING:
            self.activate()
            self.status = RunStatus.RUNNING
            self.emit("RESUME")

    def stop(self, into: RunStatus = RunStatus.PAUSED) -> None:
        """Stop the guest."""
        if self.status is RunStatus.RUNNING:
            self.status = into
            self.emit("STOP")

    def power_down(self) -> None:
        """Press the power button: a running guest that obeys ends QEMU."""
        self.emit("POWERDOWN")
        if self.obeys_power_button and self.status is RunStatus.RUNNING:
            self.guest_ends()

    def guest_shutdown(self) -> None:
        """Ask the guest agent."""
        if not (self.agent and self.status is RunStatus.RUNNING):
            raise GuestRefused(self.name, "no guest agent answered within 2 s", "shut down by ACPI")
        self.guest_ends()

    def guest_ends(self) -> None:
        """The guest shuts itself down."""
        self.emit("SHUTDOWN", guest=True, reason="guest-shutdown")
        self.die("")

    # disks

    def open_disks(self) -> None:
        """Open the disks of the configuration."""
        for disk in self.spec.config.disks:
            self._open(disk, self.spec.exports.get(disk.id))

    def attach(self, disk: Disk, export: str | None) -> None:
        """Hot add."""
        if disk.bus is not Bus.SCSI:
            raise WrongState(f"disk {disk.id}", f"{disk.bus} takes no disk while the VM runs", "turn the VM off")
        if self.disks.get(disk.id) == disk:
            return
        self._open(disk, export)

    async def detach(self, disk_id: str, timeout: float) -> None:
        """Hot remove. A guest that does not let go is waited for, as the real one is."""
        disk = self.disks.get(disk_id)
        if disk is None:
            return
        if any(job.disk_id == disk_id and not job.over for job in self.jobs.values()):
            raise Busy(f"disk {disk_id}", "other work on it is under way", "wait for it, or cancel it")
        if not self.lets_go_of_disks:
            await asyncio.sleep(timeout)
            raise GuestRefused(f"disk {disk_id}", f"the guest did not let go of it within {timeout:g} s")
        del self.disks[disk_id]
        self.io_status.pop(disk_id, None)
        self._unlock(disk)
        self.emit("DEVICE_DELETED", device=f"disk-{disk_id}", path=f"/machine/peripheral/disk-{disk_id}")

    def replace_chain(self, disk: Disk, source: DiskSource) -> None:
        """Put other layers behind a disk; who writes the new top one has its lock."""
        self._unlock(disk)
        new = disk.but(source=source)
        self.disks[disk.id] = new
        if self.active:
            self._lock(new)

    def activate(self) -> None:
        """Take the locks of all disks; all or none."""
        if self.active:
            return
        for disk in self.disks.values():
            self._refuse_if_locked(disk)
        self.active = True
        for disk in self.disks.values():
            self._lock(disk)

    def deactivate(self) -> None:
        """Free the locks of all disks."""
        self.active = False
        for disk in self.disks.values():
            self._unlock(disk)

    def _open(self, disk: Disk, export: str | None) -> None:
        empty = disk.source.kind is SourceKind.EMPTY
        for layer in disk.source.layers():
            if layer.local and export is None and not os.path.exists(layer.path):
                raise NotFound(f"disk {disk.id}", f"{layer.path} does not exist", path=layer.path)
        if any(other.address == disk.address or other.id == disk.id for other in self.disks.values()):
            raise AlreadyExists(f"disk {disk.id}", "its id or its address is taken", "choose another unit")
        if self.active and not empty:
            if disk.writes and any(o.source.path == disk.source.path and o.writes for o in self.disks.values()):
                raise self._locked(disk)
            self._refuse_if_locked(disk)
            self._lock(disk)
        self.disks[disk.id] = disk

    def _refuse_if_locked(self, disk: Disk) -> None:
        if disk.writes and self.world.locks.get(_real(disk), self) is not self:
            raise self._locked(disk)

    def _locked(self, disk: Disk) -> InUse:
        path = disk.source.path
        return InUse(f"disk {disk.id}", f"{path} is open for writing in another VM or program", path=path)

    def _lock(self, disk: Disk) -> None:
        if disk.writes and disk.source.kind is not SourceKind.EMPTY:
            self.world.locks[_real(disk)] = self

    def _unlock(self, disk: Disk) -> None:
        if self.world.locks.get(_real(disk)) is self:
            del self.world.locks[_real(disk)]


def _real(disk: Disk) -> str:
    return os.path.realpath(disk.source.path)
