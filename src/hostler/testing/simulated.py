"""A hypervisor without processes: the same behaviour as QEMU's for everything above it, for tests with a hundred VMs
and for failures on request. tests/component/test_machine_contract.py holds it to what the real one does.

    world = World()
    one, two = SimulatedHypervisor(world=world), SimulatedHypervisor(world=world)   # two hosts, one process
    machine = await one.launch(spec)
    machine.faults.fail("attach_disk", NoSpace(...))      # or one.faults: each machine it makes has them too

What "runs" belongs to the world, not to a hypervisor: another one adopts it by its run directory, as a daemon does
after it was killed. Machines migrate over the world's wire, and lock images in the world's table of locks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from hostler.model.disk import Disk
from hostler.model.errors import HostlerError, InUse, QemuFailed
from hostler.model.host import Accelerator, AcceleratorChoice, QemuFacts
from hostler.model.machine import LaunchSpec, MachineEvent, MigrationResult, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.model.vm import Process
from hostler.testing import simulated_moves as moves
from hostler.testing.faults import Faults
from hostler.testing.simulated_blocks import SimulatedBlocks
from hostler.testing.simulated_world import SimulatedQemu, World
from hostler.testing.vm_variants import FACTS

__all__ = ["SimulatedHypervisor", "SimulatedMachine", "World"]

OnProgress = Callable[[MigrationProgress], None]

CHOICE = AcceleratorChoice(kind=Accelerator.TCG, reason="simulated: nothing is executed")
EVERYWHERE = World()
"""The world of hypervisors that were given none."""

PNG = b"\x89PNG\r\n\x1a\n"


class SimulatedMachine:
    """A session with a simulated QEMU; see hostler.host.hypervisor.Machine.

    `qemu` is what a test manipulates: its guest (`agent`, `obeys_power_button`, `lets_go_of_disks`), its end (`die`).
    """

    def __init__(self, qemu: SimulatedQemu, faults: Faults) -> None:
        self.qemu = qemu
        self.faults = faults
        self.blocks = SimulatedBlocks(qemu, faults)

    @property
    def process(self) -> Process:
        """A process number no real process has."""
        return self.qemu.process

    async def status(self) -> RunStatus:
        """The run state."""
        await _enter(self, "status")
        return self.qemu.status

    async def run(self) -> None:
        """Run the guest."""
        await _enter(self, "run")
        self.qemu.run()

    async def stop(self) -> None:
        """Stop the guest."""
        await _enter(self, "stop")
        self.qemu.stop()

    async def reset(self) -> None:
        """Press reset."""
        await _enter(self, "reset")
        self.qemu.emit("RESET", guest=False, reason="host-qmp-system-reset")

    async def power_down(self) -> None:
        """Press the power button."""
        await _enter(self, "power_down")
        self.qemu.power_down()

    async def guest_shutdown(self) -> None:
        """Ask the agent."""
        await _enter(self, "guest_shutdown")
        self.qemu.guest_shutdown()

    async def quit(self) -> None:
        """End it."""
        if self.qemu.alive:
            await self.faults.enter("quit")
            self.qemu.emit("SHUTDOWN", guest=False, reason="host-qmp-quit")
            self.qemu.die("")

    async def wait_gone(self) -> str:
        """Wait for its end."""
        await self.qemu.gone.wait()
        return self.qemu.output

    def events(self) -> AsyncIterator[MachineEvent]:
        """Events from now on."""
        return self.qemu.events()

    async def close(self) -> None:
        """Leave the session."""

    async def screenshot(self) -> bytes:
        """The beginning of a picture."""
        await _enter(self, "screenshot")
        return PNG

    async def attach_disk(self, disk: Disk, export: str | None = None) -> None:
        """Hot add."""
        await _enter(self, "attach_disk")
        self.qemu.attach(disk, export)

    async def detach_disk(self, disk_id: str, timeout: float) -> None:
        """Hot remove."""
        await _enter(self, "detach_disk")
        await self.qemu.detach(disk_id, timeout)

    async def attached_disks(self) -> frozenset[str]:
        """Disks."""
        await _enter(self, "attached_disks")
        return frozenset(self.qemu.disks)

    async def io_failed(self) -> dict[str, str]:
        """What a test put there."""
        await _enter(self, "io_failed")
        return dict(self.qemu.io_status)

    async def save_to(
        self, path: str, on_progress: OnProgress, at_stop: Callable[[], Awaitable[None]] | None = None
    ) -> MigrationResult:
        """Save."""
        await _enter(self, "save_to")
        if at_stop is not None:
            return await moves.checkpoint(self.qemu, path, at_stop, on_progress)
        return await moves.save(self.qemu, path, on_progress)

    async def load_from(self, path: str) -> None:
        """Load."""
        await _enter(self, "load_from")
        moves.load(self.qemu, path)

    async def listen(self, settings: MigrationSettings, secret: str, host: str) -> str:
        """Listen on the world's wire."""
        await _enter(self, "listen")
        return moves.listen(self.qemu, settings, secret, host)

    async def loaded(self) -> bool:
        """Whether the state has arrived."""
        await _enter(self, "loaded")
        return self.qemu.loaded

    async def migrate_to(
        self, address: str, settings: MigrationSettings, secret: str, on_progress: OnProgress
    ) -> MigrationResult:
        """Send over the world's wire."""
        await _enter(self, "migrate_to")
        return await moves.migrate(self.qemu, address, settings, secret, on_progress)

    async def cancel_migration(self) -> None:
        """Stop sending."""
        await _enter(self, "cancel_migration")
        if self.qemu.progress.status in ("setup", "active"):
            self.qemu.set_progress(status="cancelling")

    async def migration_state(self) -> MigrationProgress:
        """Counters."""
        await _enter(self, "migration_state")
        return self.qemu.progress

    async def announce(self) -> None:
        """Nothing hears it."""
        await _enter(self, "announce")


async def _enter(machine: SimulatedMachine, method: str) -> None:
    await machine.faults.enter(method)
    if not machine.qemu.alive:
        raise QemuFailed(machine.qemu.name, f"QEMU is gone, {method} was not answered", gone=True)


class SimulatedHypervisor:
    """Makes simulated machines and finds them again; see hostler.host.hypervisor.Hypervisor."""

    def __init__(
        self, facts: QemuFacts = FACTS, accelerator: AcceleratorChoice = CHOICE, world: World = EVERYWHERE
    ) -> None:
        self.world = world
        self.faults = Faults()
        self._facts = facts
        self._accelerator = accelerator

    @property
    def accelerator(self) -> AcceleratorChoice:
        """As given."""
        return self._accelerator

    @property
    def facts(self) -> QemuFacts:
        """As given."""
        return self._facts

    async def launch(self, spec: LaunchSpec) -> SimulatedMachine:
        """Start one."""
        await self.faults.enter("launch")
        running = self.world.find(spec.run_dir)
        if running is not None:
            raise InUse(f"vm {spec.config.name}", "a QEMU of it is running already", holder=f"process {running.pid}")
        qemu = SimulatedQemu(self.world, spec)
        try:
            qemu.open_disks()
        except HostlerError as error:
            qemu.die(error.cause)
            raise
        return SimulatedMachine(qemu, self.faults)

    async def adopt(self, vm_id: str, run_dir: str) -> SimulatedMachine | None:
        """Find one."""
        await self.faults.enter("adopt")
        qemu = self.world.find(run_dir)
        return None if qemu is None else SimulatedMachine(qemu, self.faults)

    async def last_output(self, run_dir: str) -> str:
        """What it wrote last."""
        return self.world.outputs.get(run_dir, "")

    async def kill_leftovers(self, vm_id: str, run_dir: str) -> None:
        """Kill it."""
        await self.faults.enter("kill_leftovers")
        qemu = self.world.find(run_dir)
        if qemu is not None:
            qemu.die("")
