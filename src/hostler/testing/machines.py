"""Small real machines for tests: no guest system, firmware only; up in a fraction of a second, gone at the end."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import HostlerError
from hostler.model.host import Accelerator, AcceleratorChoice
from hostler.model.machine import LaunchSpec
from hostler.model.units import MiB
from hostler.qemu.machine import QemuHypervisor, QemuMachine
from hostler.testing import vm_variants

CHOICE = AcceleratorChoice(kind=Accelerator.TCG, reason="tests run everywhere")


class Rig:
    """One directory, short enough for sockets, and the real machines that live in it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hq"))
        self.path.chmod(0o711)
        self.hypervisor = QemuHypervisor(vm_variants.FACTS.but(aio_io_uring=False), CHOICE)
        self._specs: list[LaunchSpec] = []
        self._machines: list[QemuMachine] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(machine.close() for machine in self._machines))
        for spec in self._specs:
            with suppress(HostlerError):
                await self.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
        shutil.rmtree(self.path, ignore_errors=True)

    def spec(self, place: str = "a", *, incoming: bool = False, **changes: object) -> LaunchSpec:
        """A machine of 64 MiB; `place` tells two of the same VM apart. `changes` are of its configuration."""
        base: dict[str, object] = {"id": str(uuid.uuid5(uuid.NAMESPACE_DNS, "rig")), "name": "rig", "memory": 64 * MiB}
        return LaunchSpec(
            config=vm_variants.config(**(base | changes)),
            accelerator=Accelerator.TCG,
            run_dir=str(self.path / f"{place}.run"),
            state_dir=str(self.path / f"{place}.state"),
            incoming=incoming,
        )

    async def launch(self, spec: LaunchSpec) -> QemuMachine:
        """Start it; it ends with the rig at the latest."""
        self._specs.append(spec)
        machine = await self.hypervisor.launch(spec)
        self._machines.append(machine)
        return machine

    async def start(self, place: str = "a", **changes: object) -> QemuMachine:
        """Start it and let its firmware run."""
        machine = await self.launch(self.spec(place, incoming=False, **changes))
        await machine.run()
        return machine

    async def adopt(self, spec: LaunchSpec) -> QemuMachine | None:
        """Adopt it; the session ends with the rig at the latest."""
        machine = await self.hypervisor.adopt(spec.config.id, spec.run_dir)
        if machine is not None:
            self._machines.append(machine)
        return machine

    async def image(self, name: str, format: ImageFormat = ImageFormat.RAW, size: int = 4 * MiB) -> DiskSource:
        """A new image, made by the real qemu-img."""
        path = self.path / name
        options = {ImageFormat.VHD_FIXED: ["subformat=fixed,force_size=on"], ImageFormat.VHD: ["force_size=on"]}
        driver = "vpc" if format in options else format.value
        extra = [word for option in options.get(format, []) for word in ("-o", option)]
        made = await asyncio.create_subprocess_exec(
            "qemu-img", "create", "-q", "-f", driver, *extra, str(path), str(size)
        )
        if await made.wait() != 0:
            raise RuntimeError(f"qemu-img could not make {path}")
        return DiskSource(path=str(path), format=format, size=size)

    async def disk(self, name: str, unit: int = 0, format: ImageFormat = ImageFormat.RAW) -> Disk:
        """A disk of a new image."""
        return Disk(id=name, source=await self.image(f"{name}.img", format), unit=unit)
