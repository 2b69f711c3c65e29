"""SCSI-3 persistent reservations: a guest's reservation reaches the device behind its disk and keeps others out."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from writing_guest import WAIT, run, until, writing_guest

from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import InvalidInput
from hostler.model.units import MiB
from hostler.qemu import blockdev, commands
from hostler.qemu.qmp import QmpSession

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("tgtd") is None, reason="needs an iSCSI target of its own (tgt), as root"
    ),
]

TARGET = "iqn.2026-11.test:lun"


@asynccontextmanager
async def target(image: Path) -> AsyncIterator[str]:
    """An iSCSI target on a free port with one LUN, 1; its portal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control = ["-C", str(port % 32768)]  # its own limit
    daemon = await asyncio.create_subprocess_exec(
        "tgtd",
        "-f",
        *control,
        "--iscsi",
        f"portal=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:

        async def answers() -> bool:
            assert daemon.returncode is None
            return await status(["tgtadm", *control, "--op", "show", "--mode", "sys"]) == 0

        await until(answers)
        ask = ["tgtadm", *control, "--lld", "iscsi", "--tid", "1"]
        await run(*ask, "--op", "new", "--mode", "target", "-T", TARGET)
        await run(*ask, "--op", "new", "--mode", "logicalunit", "--lun", "1", "-b", str(image))
        await run(*ask, "--op", "bind", "--mode", "target", "-I", "ALL")
        yield f"127.0.0.1:{port}"
    finally:
        if daemon.returncode is None:
            daemon.kill()
        await daemon.wait()
        for left in Path("/var/run/tgtd").glob(f"socket.{control[1]}*"):
            left.unlink()


async def status(argv: Sequence[str]) -> int:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


def initiator(portal: str, name: str) -> dict[str, str | int]:
    return {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": portal,
        "target": TARGET,
        "lun": 1,
        "initiator-name": f"iqn.2026-11.test:{name}",
    }


async def may_write(portal: str, name: str) -> bool:
    """Whether an initiator of that name can write to the LUN."""
    options = ",".join(f"{key}={value}" for key, value in initiator(portal, name).items())
    return await status(["qemu-io", "--image-opts", options, "-c", "write 8M 4k"]) == 0


async def test_a_guests_reservation_keeps_others_out() -> None:
    async with writing_guest() as guest:
        image = guest.rig.path / "lun"
        with image.open("wb") as file:
            file.truncate(16 * MiB)
        source = DiskSource(kind=SourceKind.ISCSI, path="iscsi://somewhere/lun/1", size=16 * MiB)
        disk = Disk(id="lun", source=source, unit=5, reservations=True)
        async with target(image) as portal:
            await guest.machine.close()
            session = await QmpSession.connect(f"{guest.spec.run_dir}/qmp.sock", deadline=30)
            node = {"driver": "raw", "node-name": "lun", "file": initiator(portal, "guest")}
            await commands.blockdev_add(session, node)
            await commands.device_add(session, blockdev.device_options(disk))
            await session.close()

            async def seen() -> bool:
                return any(found.vendor == "IET" for found in await guest.serial.disks())

            await until(seen)
            name = next(found.name for found in await guest.serial.disks() if found.vendor == "IET")
            assert await may_write(portal, "other")
            await guest.serial.reserve(name, 0x1234)
            assert not await may_write(portal, "other")
            await guest.serial.write(name, 5, 1 * MiB)
            assert (await guest.serial.verify(name, 5, 1 * MiB)).bad_sectors == 0
            await guest.serial.reserve(name, 0)
            assert await may_write(portal, "other")
            found = await guest.rig.adopt(guest.spec)
            assert found is not None
            with pytest.raises(InvalidInput, match="does not see"):
                await found.blocks.mirror("move", disk, await guest.image())
            await found.detach_disk("lun", WAIT)
            guest.machine = found
