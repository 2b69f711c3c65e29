"""Hot add: from the call until it is done, until the guest sees the disk, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from bench import libvirt
from bench.bare import by_hand, scsi_bus
from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import disk_seen, guest_in, ms, now, serial_line, workplace
from bench.subject import WAIT, Host
from hostler.client import calls
from hostler.model.disk import ImageFormat
from hostler.model.requests import DiskAdd
from hostler.model.units import MiB
from hostler.model.vm import VmRecord
from hostler.testing.guestclient import GuestSerial
from hostler.testing.guestlink import Message
from hostler.testing.microguest import MicroGuest
from hostler.testing.qemu_raw import RawQemu

MEMORY_MIB = 256
SIZE = 64 * MiB
FORMATS = {ImageFormat.RAW: "raw", ImageFormat.QCOW2: "qcow2", ImageFormat.VHDX: "vhdx", ImageFormat.VHD: "vpc"}
"""Ours to QEMU's. libvirt takes part with the first two."""
ADDED = "{} call to done"
SEEN = "{} call to guest sees it"
REMOVED = "{} removal"
Heard = asyncio.Queue[Message]


@dataclass(frozen=True, slots=True)
class Times:
    begun: float
    done: float
    seen: float
    removal_begun: float
    removed: float

    def sample(self, format: ImageFormat) -> dict[str, float]:
        return {
            ADDED.format(format.value): ms(self.done - self.begun),
            SEEN.format(format.value): ms(self.seen - self.begun),
            REMOVED.format(format.value): ms(self.removed - self.removal_begun),
        }


@dataclass(frozen=True, slots=True)
class Hostler:
    host: Host
    vm: VmRecord
    images: Mapping[ImageFormat, Path]
    heard: Heard

    async def run(self) -> Sample:
        found: dict[str, float] = {}
        for format in FORMATS:
            found |= (await self._one(format)).sample(format)
        return found

    async def _one(self, format: ImageFormat) -> Times:
        client, id = self.host.client, self.vm.config.id
        disk = DiskAdd(volume=str(self.images[format]), format=format, serial=f"h-{format.value}")
        begun = now()
        await client.finish(await client.send(calls.disk_add(id, disk, wait=WAIT)), WAIT)
        done = now()
        seen = await disk_seen(self.heard, serial=disk.serial)
        attached = next(d for d in (await self.host.vm(id)).config.disks if d.serial == disk.serial)
        removal = now()
        await client.finish(await client.send(calls.disk_remove(id, attached.id, wait=WAIT)), WAIT)
        return Times(begun, done, seen, removal, now())


@dataclass(frozen=True, slots=True)
class Bare:
    machine: RawQemu
    bus: str
    images: Mapping[ImageFormat, Path]
    heard: Heard

    async def run(self) -> Sample:
        found: dict[str, float] = {}
        for format in FORMATS:
            found |= (await self._one(format)).sample(format)
        return found

    async def _one(self, format: ImageFormat) -> Times:
        id = f"q-{format.value}"
        file: dict[str, JsonValue] = {"driver": "file", "filename": str(self.images[format]), "cache": {"direct": True}}
        begun = now()
        await self.machine.cmd("blockdev-add", driver=FORMATS[format], node_name=f"n-{id}", file=file)
        await self.machine.cmd(
            "device_add", driver="scsi-hd", id=id, bus=self.bus, channel=0, lun=9, drive=f"n-{id}", serial=id
        )
        done = now()
        seen = await disk_seen(self.heard, serial=id)
        removal = now()
        await self.machine.cmd("device_del", id=id)
        await self.machine.event("DEVICE_DELETED")
        await self.machine.cmd("blockdev-del", node_name=f"n-{id}")
        return Times(begun, done, seen, removal, now())


@dataclass(frozen=True, slots=True)
class Virsh:
    libvirtd: libvirt.Libvirtd
    images: Mapping[ImageFormat, Path]
    heard: Heard

    async def run(self) -> Sample:
        found: dict[str, float] = {}
        for format in (ImageFormat.RAW, ImageFormat.QCOW2):
            found |= (await self._one(format)).sample(format)
        return found

    async def _one(self, format: ImageFormat) -> Times:
        options = ("--driver", "qemu", "--subdriver", format.value, "--cache", "none", "--targetbus", "scsi")
        begun = now()
        await self.libvirtd.virsh(
            "attach-disk", libvirt.DOMAIN, str(self.images[format]), "sda", *options, "--serial", "v", "--live"
        )
        done = now()
        seen = await disk_seen(self.heard, serial="v")
        removal = now()
        await self.libvirtd.virsh("detach-disk", libvirt.DOMAIN, "sda", "--live")
        # virsh returns before the guest has let go; the way back is over when it has.
        removed = await disk_seen(self.heard, "disk-removed")
        return Times(begun, done, seen, removal, max(removed, now()))


async def make_images(place: Path, who: str) -> dict[ImageFormat, Path]:
    """One image of each format."""
    images: dict[ImageFormat, Path] = {}
    for format, driver in FORMATS.items():
        path = place / f"{who}.{driver}"
        made = await asyncio.create_subprocess_exec("qemu-img", "create", "-q", "-f", driver, str(path), str(SIZE))
        await made.wait()
        images[format] = path
    return images


async def run(rounds: int) -> Result:
    """The whole comparison, on guests that run all the time."""
    result = Result("hotadd")
    async with contextlib.AsyncExitStack() as stack:
        place = stack.enter_context(workplace())
        guest = guest_in(place)
        host = await stack.enter_async_context(Host("a", place / "a").running())
        vm = await host.create("guest", guest, MEMORY_MIB, guest.cmdline)
        await host.act(vm.config.id, "start")
        line = by_hand(host.qemu_command_line(await host.vm(vm.config.id)), host.serial(vm).parent, place / "q")
        (place / "q").mkdir()
        machine = await stack.enter_async_context(await RawQemu.start(line, place / "q/qmp.sock"))
        bare_heard = await _boot(stack, place / "q/serial.sock")
        hostler_heard = await _boot(stack, host.serial(vm))
        contenders = [
            Contender("qemu", Bare(machine, scsi_bus(line), await make_images(place, "q"), bare_heard).run),
            Contender("hostler", Hostler(host, vm, await make_images(place, "h"), hostler_heard).run),
        ]
        contenders += await _virsh(stack, result, place, guest)
        return await in_turns(result, contenders, rounds)


async def _boot(stack: contextlib.AsyncExitStack, serial: Path) -> Heard:
    """Wait until the guest is up; what it says from then on."""
    async with GuestSerial.unix(serial) as guest:
        await guest.wait_ready(120)
    return await stack.enter_async_context(serial_line(serial))


async def _virsh(stack: contextlib.AsyncExitStack, result: Result, place: Path, guest: MicroGuest) -> list[Contender]:
    reason = libvirt.missing()
    if reason:
        result.skipped["virsh"] = reason
        return []
    libvirtd = await stack.enter_async_context(libvirt.Libvirtd("a", place / "v").running())
    await libvirtd.virsh("create", str(libvirt.domain(place / "v", guest, MEMORY_MIB, guest.cmdline)))
    heard = await _boot(stack, place / "v/serial.sock")
    return [Contender("virsh", Virsh(libvirtd, await make_images(place, "v"), heard).run, optional=True)]
