"""What the host agent needs of a hypervisor. `hostler.qemu` is the real one, `hostler.testing` has a simulated one;
the same contract tests run against both.

Every method that talks to QEMU has a deadline and raises QemuFailed (QEMU refused, or is gone), TimedOut (outcome
unknown) or a more precise HostlerError. All are safe to call again after the daemon was restarted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from hostler.host.blocks import Blocks
from hostler.model.disk import Disk
from hostler.model.host import AcceleratorChoice, QemuFacts
from hostler.model.machine import LaunchSpec, MachineEvent, MigrationResult, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.model.vm import Process

OnProgress = Callable[[MigrationProgress], None]
AtStop = Callable[[], Awaitable[None]]


class Machine(Protocol):
    """One running QEMU with its QMP session."""

    @property
    def process(self) -> Process: ...
    @property
    def blocks(self) -> Blocks:
        """What can be done to its disks beyond plugging them in and out."""

    async def status(self) -> RunStatus: ...
    async def run(self) -> None:
        """Start or continue the guest's processors. Harmless when already running."""

    async def stop(self) -> None:
        """Stop the guest's processors. Harmless when already stopped."""

    async def reset(self) -> None: ...
    async def power_down(self) -> None:
        """Press the ACPI power button. Returns at once; SHUTDOWN comes as an event if the guest obeys."""

    async def guest_shutdown(self) -> None:
        """Ask the guest agent to shut down. GuestRefused where no agent answers within 2 s."""

    async def quit(self) -> None:
        """End QEMU: asks it, then kills it after 5 s; returns when the process is gone. Harmless when gone."""

    async def wait_gone(self) -> str:
        """Waits until the process is gone; returns the last output it wrote (at most 4 KiB)."""

    def events(self) -> AsyncIterator[MachineEvent]:
        """Events from now on. The iterator ends when QEMU is gone, never hangs."""

    async def close(self) -> None:
        """Leave the session (the daemon stops): QEMU and its guest run on, and `adopt` finds them. Never raises."""

    async def screenshot(self) -> bytes:
        """The guest's screen as PNG."""

    # disks
    async def attach_disk(self, disk: Disk, export: str | None = None) -> None:
        """Hot add on SCSI. `export`: socket of the NBD export that serves it. Complete or nothing."""

    async def detach_disk(self, disk_id: str, timeout: float) -> None:
        """Hot remove: asks the guest and waits up to `timeout` seconds; GuestRefused when it does not let go.
        Harmless when the disk is not there."""

    async def attached_disks(self) -> frozenset[str]:
        """Ids of the disks QEMU has now, whatever our record says."""

    async def io_failed(self) -> dict[str, str]:
        """Disk id to QEMU's io-status ("failed", "nospace") for disks whose I/O stopped the guest."""

    # save and restore
    async def save_to(self, path: str, on_progress: OnProgress, at_stop: AtStop | None = None) -> MigrationResult:
        """Write the whole state to a file; it is complete and on disk at return. The guest is stopped first, and stays
        so. With `at_stop` it runs on: it is stopped only for its last pages, then `at_stop` is awaited, so that
        whatever that does is of the same moment, and goes on afterwards. When anything fails, also `at_stop`, nothing
        of the file is left and the guest runs on; what `at_stop` did stays done. WrongState for a guest that does not
        run and shall go on."""

    async def load_from(self, path: str) -> None:
        """For a machine launched incoming: read the state from a file, leave the guest stopped."""

    # migration
    async def listen(self, settings: MigrationSettings, secret: str, host: str) -> str:
        """For a machine launched incoming: listen for the stream on a free port of `host`; "host:port". It never runs
        by itself afterwards and does not open its disks for writing before `run`."""

    async def loaded(self) -> bool:
        """Whether the whole incoming state has arrived."""

    async def migrate_to(
        self, address: str, settings: MigrationSettings, secret: str, on_progress: OnProgress
    ) -> MigrationResult:
        """Send the guest to a listening QEMU; returns when that ended in whatever way. `completed` means that the other
        side has loaded everything and this guest is stopped. After `failed` or `cancelled` this guest runs on."""

    async def cancel_migration(self) -> None:
        """Stop an outgoing migration, if one is under way; returns at once."""

    async def migration_state(self) -> MigrationProgress:
        """Counters of the migration under way or of the last one."""

    async def announce(self) -> None:
        """Send gratuitous ARP/RARP for the guest's adapters, so that switches learn where it is now."""


class Hypervisor(Protocol):
    """Makes machines and finds them again."""

    @property
    def accelerator(self) -> AcceleratorChoice: ...
    @property
    def facts(self) -> QemuFacts: ...

    async def launch(self, spec: LaunchSpec) -> Machine:
        """Start QEMU with the guest stopped (or waiting for a stream), connect, return when it answers. On failure
        nothing of it is left, and the error carries its output."""

    async def adopt(self, vm_id: str, run_dir: str) -> Machine | None:
        """The machine of that VM if its QEMU is alive (found by run directory, also if its pid was never recorded).
        None: nothing of a QEMU is left there."""

    async def last_output(self, run_dir: str) -> str:
        """What the QEMU that ran there wrote last (at most 4 KiB), "" if unknown."""

    async def kill_leftovers(self, vm_id: str, run_dir: str) -> None:
        """End every process that belongs to that run directory (QEMU, swtpm, exports where the VM has a user of its
        own); returns when they are gone. TimedOut when some are left."""
