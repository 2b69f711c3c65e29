"""Hostler as a contender: real daemons on temporary directories, driven through their REST API."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from hostler.client import calls
from hostler.client.async_client import AsyncClient
from hostler.model.errors import HostlerError, InternalError, TimedOut
from hostler.model.job import Job
from hostler.model.migration import MigrationMode
from hostler.model.nic import Network
from hostler.model.requests import JoinRequest, MigrateRequest, NicAdd, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import KernelBoot, VmRecord
from hostler.testing.microguest import MicroGuest

READY = 60.0
WAIT = 120.0
DAEMON = ("-m", "hostler.daemon.main")


class Host:
    """One daemon and a connection to it."""

    def __init__(self, name: str, place: Path, program: Sequence[str] = DAEMON) -> None:
        self.name = name
        self.place = place
        self.run_dir = place / "r"
        self.program = program
        self.client: AsyncClient
        self.process: asyncio.subprocess.Process

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Host]:
        """The daemon, until the block is left; its VMs are ended first."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.place.chmod(0o711)
        with (self.place / "log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self.program,
                *(f"--state-dir={self.place / 's'}", f"--run-dir={self.run_dir}"),
                *("--listen=127.0.0.1:0", f"--name={self.name}", "--log-level=warning"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with AsyncClient(f"unix:{self.run_dir / 'api.sock'}") as self.client:
                try:
                    await self._wait_ready()
                    yield self
                finally:
                    await self._end_vms()
        finally:
            self.process.terminate()
            await self.process.wait()

    async def _wait_ready(self) -> None:
        end = time.monotonic() + READY
        while time.monotonic() < end and self.process.returncode is None:
            with contextlib.suppress(HostlerError):
                await self.client.send(calls.version())
                return
            await asyncio.sleep(0.02)
        raise TimedOut(f"host {self.name}", f"is not ready:\n{(self.place / 'log').read_text()[-2000:]}")

    async def _end_vms(self) -> None:
        """Nothing stays, whatever went wrong before: VMs outlive their daemon."""
        with contextlib.suppress(HostlerError):  # the daemon is gone
            for vm in await self.client.send(calls.vms()):
                with contextlib.suppress(HostlerError):  # it is off already
                    await self.act(vm.config.id, "turn-off")

    async def act(self, vm: str, action: str) -> Job:
        """Do it and wait until it is done."""
        return await self.client.finish(await self.client.send(calls.vm_act(vm, action, wait=WAIT)), WAIT)

    async def create(self, name: str, guest: MicroGuest, memory_mib: int, cmdline: str) -> VmRecord:
        """A VM of the micro guest with one adapter behind QEMU's own NAT."""
        kernel = KernelBoot(kernel=str(guest.kernel), initrd=str(guest.initrd), cmdline=cmdline)
        nics = (NicAdd(network=Network.USER),)
        request = VmCreate(name=name, memory=memory_mib * MiB, kernel=kernel, nics=nics)
        return await self.client.send(calls.vm_create(request))

    async def vm(self, ref: str) -> VmRecord:
        """The VM as it is now."""
        return await self.client.send(calls.vm(ref))

    def serial(self, vm: VmRecord) -> Path:
        """The socket of its serial line."""
        return self.run_dir / "vms" / vm.config.id / "serial.sock"

    async def migrate(self, vm: str, target: Host) -> Job:
        """Live, with unlimited bandwidth; returns when the job is done."""
        request = MigrateRequest(host=target.name, mode=MigrationMode.LIVE, bandwidth=0)
        return await self.client.finish(await self.client.send(calls.vm_migrate(vm, request, wait=WAIT)), WAIT)

    def qemu_command_line(self, vm: VmRecord) -> list[str]:
        """The command line of the VM's running QEMU, as the kernel has it."""
        if vm.process is None:
            raise InternalError(f"vm {vm.config.name}", "does not run")
        return Path(f"/proc/{vm.process.pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


async def introduce(first: Host, second: Host) -> None:
    """Make two hosts trust each other."""
    invitation = await first.client.send(calls.host_invite())
    await second.client.send(calls.host_join(JoinRequest(invitation=invitation.token)))
