"""The moment of a backup with the real QEMU: what was is copied, whatever the guest writes meanwhile, all at once or by
changes; and a scratch image without room costs the backup, never the guest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hostler.model.backup import BLOCK, BackedDisk
from hostler.model.disk import Disk, ImageFormat
from hostler.model.errors import QemuFailed
from hostler.model.machine import RunStatus
from hostler.qemu.machine import QemuMachine
from hostler.storage.backups.copying import DiskSink
from hostler.storage.backups.reading import Chain, Link
from hostler.storage.nbd import serving
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=60)


async def write(machine: QemuMachine, disk: Disk, fill: int, block: int, blocks: int = 1) -> None:
    """As the guest would, through the device."""
    line = f'qemu-io -d /machine/peripheral/disk-{disk.id} "write -P {fill} {block * BLOCK} {blocks * BLOCK}"'
    answer = await machine._qmp.execute("human-monitor-command", {"command-line": line})
    assert "rror" not in str(answer), answer


def scratch(directory: Path, disks: Sequence[Disk]) -> dict[str, str]:
    made = {disk.id: str(directory / f"{disk.id}.scratch") for disk in disks}
    for disk in disks:
        Path(made[disk.id]).unlink(missing_ok=True)
        size = str(disk.source.size)
        run("qemu-img", "create", "-q", "-f", "qcow2", made[disk.id], size)
    return made


async def copied(rig: Rig, machine: QemuMachine, disk: Disk, since: Mapping[str, str]) -> dict[int, int]:
    """The fill of each block that is copied."""
    path = rig.path / "copy.qcow2"
    sink = DiskSink(path, disk.source.size, bool(since), False, lambda _: None)
    try:
        async with serving(str(rig.path / "nbd"), {disk.id: sink}):
            await machine.blocks.moments.copy([disk], since, str(rig.path / "nbd"), 0)
        made = await sink.finish()
    finally:
        sink.close()
    shown = BackedDisk(id=disk.id, size=disk.source.size, format=ImageFormat.RAW, blocks=made.blocks, sums=made.sums)
    with Chain([Link("x", shown, path)]) as chain:
        return {index: data[0] if data else 0 for index, data in chain.content()}


@pytest.mark.parametrize("format", [ImageFormat.QCOW2, ImageFormat.RAW])
async def test_what_was_is_copied_while_the_guest_writes_on(format: ImageFormat) -> None:
    async with Rig() as rig:
        disk = await rig.disk("disk0", 0, format)
        machine = await rig.start(disks=(disk,))
        moments = machine.blocks.moments
        await write(machine, disk, 1, 1, 3)
        await machine.blocks.add_bitmaps([disk], "one")
        await write(machine, disk, 2, 2)
        files = scratch(rig.path, [disk])
        for _ in range(2):
            await moments.begin([disk], files)
        assert await machine.status() is RunStatus.RUNNING
        await write(machine, disk, 9, 0, 8)
        assert await copied(rig, machine, disk, {}) == {1: 1, 2: 2, 3: 1}
        changed = await copied(rig, machine, disk, {disk.id: "one"})
        assert changed.items() >= {2: 2}.items()
        assert changed.items() <= {0: 0, 1: 1, 2: 2, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0}.items()
        for _ in range(2):
            await moments.end([disk])
        assert await machine.blocks.layers() == {"disk0": ("disk0",)}
        await machine.detach_disk("disk0", 30)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
async def test_a_full_scratch_costs_the_backup_and_not_the_guest() -> None:
    async with Rig() as rig:
        small = rig.path / "small"
        small.mkdir(mode=0o755)
        run("mount", "-t", "tmpfs", "-o", "size=512k,mode=755", "none", str(small))
        try:
            disk = await rig.disk("disk0", 0, ImageFormat.QCOW2)
            machine = await rig.start(disks=(disk,))
            await write(machine, disk, 1, 0, 32)
            await machine.blocks.moments.begin([disk], scratch(small, [disk]))
            await write(machine, disk, 2, 0, 32)
            assert await machine.status() is RunStatus.RUNNING
            with pytest.raises(QemuFailed, match="copy of disk disk0 failed"):
                await copied(rig, machine, disk, {})
            await machine.blocks.moments.end([disk])
            await write(machine, disk, 3, 0, 32)
            assert await machine.status() is RunStatus.RUNNING
            await machine.quit()
        finally:
            run("umount", str(small))
