"""One running QEMU as the host agent sees it, and the maker of such machines.

Implements `Machine` and `Hypervisor` of hostler.host.hypervisor, whose docstrings hold here. The work is in the modules
beside this one; this one ties it to a process and a session.

    launch: process started --QMP answers--> machine;  QEMU ends, or does not answer --> killed, nothing left, error
    adopt:  found by its run directory --QMP answers--> machine;  none found --> None, once what hides is killed
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from hostler.model.disk import Disk, SourceKind
from hostler.model.errors import HostlerError, QemuFailed, TimedOut, WrongState
from hostler.model.host import AcceleratorChoice, QemuFacts
from hostler.model.machine import LaunchSpec, MachineEvent, MigrationResult, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.model.nic import Network
from hostler.model.vm import Process, VmConfig
from hostler.qemu import cgroup, checkpointing, commands, drives, hotplug, process, psk, saved, survivors, swtpm
from hostler.qemu.blockdev import Aio
from hostler.qemu.blocks import QemuBlocks
from hostler.qemu.checkpointing import AtStop
from hostler.qemu.cmdline import aio_for, nic_device_id
from hostler.qemu.failures import image_error, start_error
from hostler.qemu.guest_agent import GuestAgent
from hostler.qemu.launch import launch
from hostler.qemu.migration import Migrator, go_on
from hostler.qemu.paths import RunDir
from hostler.qemu.qmp import QmpSession

OnProgress = Callable[[MigrationProgress], None]

START_DEADLINE = 60.0
"""Seconds a new QEMU may take until it answers: it opens all disks first."""
ADOPT_DEADLINE = 10.0
QUIT_DEADLINE = 5.0
_SCREENSHOT_MAX = 64 * 1024**2


class QemuMachine:
    """A QEMU and its QMP session."""

    def __init__(
        self, vm_id: str, name: str, found: Process, qmp: QmpSession, aio: Aio, *, incoming: bool | None
    ) -> None:
        """`incoming`: whether it waits for a stream; None when that must be asked."""
        self._vm_id = vm_id
        self._name = name
        self._process = found
        self._qmp = qmp
        self._aio: Aio = aio
        self._may_run = incoming is False
        self._run_dir = RunDir(found.run_dir)
        self._agent = GuestAgent(self._run_dir.agent, name)
        self.blocks = QemuBlocks(qmp, aio, self._agent)
        self._migrator = Migrator(qmp, found.run_dir, _uid_of(found.pid))

    @property
    def process(self) -> Process:
        """The process."""
        return self._process

    async def status(self) -> RunStatus:
        """QEMU's run state."""
        return await commands.query_status(self._qmp)

    async def run(self) -> None:
        """Start or continue the guest. WrongState while a stream is awaited; InUse when a disk is locked elsewhere."""
        if not self._may_run:
            # `cont` would be taken as "run by yourself as soon as the stream has arrived".
            if await self.status() is RunStatus.INMIGRATE:
                raise WrongState(self._name, "its state has not arrived yet", "wait until it is loaded")
            self._may_run = True
        try:
            await go_on(self._qmp)
        except QemuFailed as error:
            if error.details.get("gone"):
                raise
            raise (image_error(self._name, error.cause) or error) from error

    async def stop(self) -> None:
        """Stop the guest."""
        await commands.stop(self._qmp)

    async def reset(self) -> None:
        """Press reset."""
        await commands.system_reset(self._qmp)

    async def power_down(self) -> None:
        """Press the power button."""
        await commands.system_powerdown(self._qmp)

    async def guest_shutdown(self) -> None:
        """Ask the guest agent."""
        await self._agent.shutdown()

    async def quit(self) -> None:
        """End QEMU: ask, wait 5 s, kill."""
        with suppress(HostlerError, TimeoutError):
            async with asyncio.timeout(QUIT_DEADLINE):
                await commands.quit_(self._qmp, QUIT_DEADLINE)
                await process.wait_gone(self._process)
        await _clear(self._vm_id, self._process)
        await self._qmp.close()

    async def wait_gone(self) -> str:
        """Wait for the process to end, and with it whatever it left behind; its last output."""
        await process.wait_gone(self._process)
        await survivors.end_machine_surely(self._process.run_dir)
        await self._qmp.close()
        return process.last_output(self._process.run_dir)

    def events(self) -> AsyncIterator[MachineEvent]:
        """Events from now on, until QEMU is gone."""
        return self._qmp.events()

    async def close(self) -> None:
        """Leave the session; QEMU runs on, and another daemon may adopt it."""
        await self._qmp.close()

    async def screenshot(self) -> bytes:
        """The screen as PNG."""
        path = f"{self._run_dir.path}/screen-{secrets.token_hex(8)}.png"
        try:
            await commands.screendump(self._qmp, path)
            return _read_picture(self._name, path)
        finally:
            with suppress(OSError):
                os.unlink(path)

    async def attach_disk(self, disk: Disk, export: str | None = None) -> None:
        """Hot add."""
        await hotplug.attach_disk(self._qmp, disk, export, self._aio)

    async def detach_disk(self, disk_id: str, timeout: float) -> None:
        """Hot remove."""
        await hotplug.detach_disk(self._qmp, disk_id, timeout)

    async def attached_disks(self) -> frozenset[str]:
        """Disks QEMU has."""
        return await hotplug.attached_disks(self._qmp)

    async def io_failed(self) -> dict[str, str]:
        """Disks whose I/O failed."""
        return await hotplug.io_failed(self._qmp)

    async def save_to(self, path: str, on_progress: OnProgress, at_stop: AtStop | None = None) -> MigrationResult:
        """Save to a file. Raises for every end but `completed`; then nothing is left and the guest runs on."""
        if at_stop is not None:
            return await checkpointing.checkpoint_to(self._qmp, self._migrator, path, at_stop, on_progress)
        return await saved.save_to(self._qmp, self._migrator, path, on_progress)

    async def load_from(self, path: str) -> None:
        """Read a saved state."""
        await saved.load_from(self._qmp, self._migrator, path)
        self._may_run = True

    async def listen(self, settings: MigrationSettings, secret: str, host: str) -> str:
        """Wait for a stream on a free port."""
        return await self._migrator.listen(settings, secret, host)

    async def loaded(self) -> bool:
        """Whether the stream has arrived."""
        arrived = await self._migrator.loaded()
        self._may_run = self._may_run or arrived
        return arrived

    async def migrate_to(
        self, address: str, settings: MigrationSettings, secret: str, on_progress: OnProgress
    ) -> MigrationResult:
        """Send the guest away."""
        return await self._migrator.migrate_to(address, settings, secret, on_progress)

    async def cancel_migration(self) -> None:
        """Stop sending."""
        await self._migrator.cancel()

    async def migration_state(self) -> MigrationProgress:
        """Counters."""
        return await self._migrator.state()

    async def announce(self) -> None:
        """Tell the switches where the guest is."""
        await commands.announce_self(self._qmp)


class QemuHypervisor:
    """Makes QEMU machines on this host and finds them again."""

    def __init__(self, facts: QemuFacts, accelerator: AcceleratorChoice) -> None:
        self._facts = facts
        self._accelerator = accelerator

    @property
    def accelerator(self) -> AcceleratorChoice:
        """What new VMs run on."""
        return self._accelerator

    @property
    def facts(self) -> QemuFacts:
        """What this host's QEMU can do."""
        return self._facts

    async def launch(self, spec: LaunchSpec) -> QemuMachine:
        """Start QEMU and connect. InUse, NotFound, BadImage, ... where its output names an image; else QemuFailed with
        `output`; nothing of it is left then."""
        name = f"vm {spec.config.name}"
        started = await launch(spec, self._facts)
        try:
            qmp = await _connect(name, started, START_DEADLINE)
            qmp.connections.update({connection.pool: connection for connection in spec.connections})
            await _unplug_cables(qmp, spec.config)
            await _limit_disks(qmp, spec.config)
            return QemuMachine(spec.config.id, name, started, qmp, aio_for(self._facts), incoming=spec.incoming)
        except QemuFailed as error:
            await _clear(spec.config.id, started)
            raise start_error(name, process.last_output(spec.run_dir)) from error
        except BaseException:
            await _clear(spec.config.id, started)
            raise

    async def adopt(self, vm_id: str, run_dir: str) -> QemuMachine | None:
        """The machine of that VM, None when it has no QEMU. QemuFailed when there is one that does not answer. A QEMU
        that is not what it was started as, or what it left, is killed first: None means that nothing is there."""
        found = process.find(run_dir)
        if found is None:
            await survivors.end_machine(run_dir)
            return None
        name = f"vm {vm_id}"
        try:
            qmp = await _connect(name, found, ADOPT_DEADLINE)
        except (QemuFailed, TimedOut) as error:
            if not process.is_alive(found):
                await survivors.end_machine(run_dir)
                return None
            raise QemuFailed(name, error.cause, error.advice, pid=found.pid) from error
        return QemuMachine(vm_id, name, found, qmp, aio_for(self._facts), incoming=None)

    async def last_output(self, run_dir: str) -> str:
        """What QEMU wrote last."""
        return process.last_output(run_dir)

    async def kill_leftovers(self, vm_id: str, run_dir: str) -> None:
        """End every process of that directory (where the VM has a user of its own: every one of this user) and wait
        until they are gone. TimedOut when some are left."""
        for _ in range(survivors.ROUNDS):  # bounded, since whoever forks quickly could keep us here
            found = process.find(run_dir)
            if found is None:
                break
            await process.kill(found)
        await swtpm.stop(run_dir)
        await survivors.end_all(run_dir)
        if found is not None and process.is_alive(found):
            raise TimedOut(f"process {found.pid}", "is started again as often as it is killed", "look at who does that")
        await _clear(vm_id, Process(pid=0, started=0, run_dir=run_dir))


async def _connect(name: str, found: Process, deadline: float) -> QmpSession:
    return await QmpSession.connect(
        RunDir(found.run_dir).qmp, deadline=deadline, name=name, alive=lambda: process.is_alive(found)
    )


async def _unplug_cables(qmp: QmpSession, config: VmConfig) -> None:
    """An adapter without a network has no carrier: QEMU gives it one all the same until it is told otherwise."""
    for nic in config.nics:
        if nic.network is Network.NONE:
            await commands.set_link(qmp, nic_device_id(nic), up=False)


async def _limit_disks(qmp: QmpSession, config: VmConfig) -> None:
    """Limits belong to QEMU's back end: neither a command line nor a migration stream brings them."""
    for disk in config.disks:
        if not disk.limits.unlimited and disk.source.kind is not SourceKind.EMPTY:
            await drives.limit(qmp, disk.id, disk.limits)


async def _clear(vm_id: str, found: Process) -> None:
    """Kill what is still there, and remove what only its processes needed."""
    if found.pid:
        await process.kill(found)
    await swtpm.stop(found.run_dir)
    psk.remove_keys(found.run_dir)
    cgroup.remove(vm_id)


def _uid_of(pid: int) -> int:
    """The user a process runs as, from its status: after a change of user the files in /proc belong to root."""
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Uid:"):
                return int(line.split()[2])
    return os.geteuid()


def _read_picture(name: str, path: str) -> bytes:
    """The file QEMU wrote. Its directory belongs to QEMU's user: no link is followed, and its size is limited."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise QemuFailed(name, "QEMU wrote no picture")
            return file.read(_SCREENSHOT_MAX)
    except OSError as error:
        raise QemuFailed(name, f"cannot read the picture QEMU wrote: {error.strerror}") from error
