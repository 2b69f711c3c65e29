"""What a guest that broke out leaves under its VM's user: a QEMU that hides, children, and who forks without end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.model.disk import Disk, ImageFormat
from hostler.model.machine import LaunchSpec, RunStatus
from hostler.model.mark import Part, mark
from hostler.model.vm import Process
from hostler.qemu import process, survivors
from hostler.storage.export_process import find_process
from hostler.storage.exports import Exports
from hostler.testing.machines import Rig

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a QEMU a user of its own"),
]

UID = 1_900_000_000 + 500_000 + os.getpid() % 400_000
"""Of this test run alone: what is tested kills everything of a user."""
GONE = 60.0


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as made:
        yield made


def hide(pid: int) -> None:
    """Write over its command line, as the process itself could (the addresses are fields 48 and 49 of proc(5)'s
    stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    fd = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
    try:
        os.pwrite(fd, b"x" * (end - begin - 1), begin)
    finally:
        os.close(fd)
    assert b"pidfile" not in Path(f"/proc/{pid}/cmdline").read_bytes()


async def left(spec: LaunchSpec, *argv: str) -> Process:
    """A process as the VM's QEMU could have left it."""
    child = process.spawn(argv, spec.run_dir, f"{spec.run_dir}/left.log", UID)
    async with asyncio.timeout(GONE):
        while f"Uid:\t{UID}" not in Path(f"/proc/{child.pid}/status").read_text():  # noqa: ASYNC110 - setpriv does it
            await asyncio.sleep(0.01)
    return child


def running_as(uid: int) -> list[str]:
    """Command lines of the living processes of a user."""
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"Uid:\t{uid}" in (entry / "status").read_text():
                lines += [line for line in [(entry / "cmdline").read_bytes().decode("latin-1")] if line]
        except OSError:
            continue
    return lines


async def test_a_qemu_that_hides_is_not_taken_for_none(rig: Rig) -> None:
    spec = rig.spec(run_as=UID)
    machine = await rig.launch(spec)
    await machine.close()
    Path(f"{spec.run_dir}/qemu.pid").unlink()
    hide(machine.process.pid)
    assert process.find(spec.run_dir) is None
    assert await rig.adopt(spec) is None
    assert not process.is_alive(machine.process)


async def test_a_qemu_that_hides_does_not_outlive_its_vm_and_the_one_on_the_other_side_does(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two daemons on one machine have the same VM, of the same user, during a move."""
    monkeypatch.setattr(survivors, "GRACE", 0.5)
    spec = rig.spec(run_as=UID)
    machine, moved = await rig.launch(spec), await rig.launch(rig.spec("b", run_as=UID))
    hide(machine.process.pid)
    child = await left(spec, "sh", "-c", "trap '' TERM; setsid sleep 600 & wait")
    await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert not process.is_alive(machine.process)
    assert not process.is_alive(child)
    assert await moved.status() is RunStatus.PRELAUNCH
    await rig.hypervisor.kill_leftovers(spec.config.id, moved.process.run_dir)
    assert running_as(UID) == []


async def test_a_machine_is_gone_only_when_its_children_are(rig: Rig) -> None:
    spec = rig.spec(run_as=UID)
    machine = await rig.launch(spec)
    child = await left(spec, "sleep", "600")
    os.kill(machine.process.pid, signal.SIGKILL)
    await machine.wait_gone()
    assert not process.is_alive(child)


async def test_who_forks_without_end_comes_to_one(rig: Rig) -> None:
    spec = rig.spec(run_as=UID)
    machine = await rig.launch(spec)
    script = rig.path / "chain"
    script.write_text("#!/bin/sh\ntrap '' TERM\nsh $0 &\n")
    script.chmod(0o755)
    await asyncio.to_thread(process.spawn, ["sh", str(script)], spec.run_dir, f"{spec.run_dir}/left.log", UID)
    async with asyncio.timeout(GONE):
        await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert not process.is_alive(machine.process)
    for _ in range(20):
        assert running_as(UID) == []


HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of this thread only
"""


async def test_a_process_without_its_first_thread_is_found(rig: Rig) -> None:
    spec = rig.spec(run_as=UID)
    await rig.launch(spec)
    child = process.spawn(["python3", "-c", HEADLESS], spec.run_dir, f"{spec.run_dir}/left.log", UID)
    async with asyncio.timeout(GONE):
        while process.is_alive(child):  # noqa: ASYNC110 - another program does it
            await asyncio.sleep(0.01)
    assert len(os.listdir(f"/proc/{child.pid}/task")) == 2
    await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert not os.path.exists(f"/proc/{child.pid}")


async def test_an_export_outlives_its_qemu_but_not_its_vm(rig: Rig) -> None:
    disk = Disk(id="scsi0-0", source=await rig.image("one.vhdx", ImageFormat.VHDX))
    os.chown(disk.source.path, UID, UID)
    spec = rig.spec(run_as=UID)
    machine = await rig.launch(spec)
    await Exports().start(spec.run_dir, disk, UID)
    control = f"{spec.run_dir}/x-{disk.id}.qmp"
    pid = find_process(control)
    assert pid is not None
    groups = Path(f"/proc/{pid}/status").read_text()
    assert f"Groups:\t{mark(spec.run_dir, Part.EXPORT)}" in groups
    os.kill(machine.process.pid, signal.SIGKILL)
    await machine.wait_gone()
    assert await rig.adopt(spec) is None
    assert find_process(control) == pid
    hide(pid)
    await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert running_as(UID) == []
    assert (await Exports().start(spec.run_dir, disk.but(read_only=True), UID)).endswith(".nbd"), "it was not closed"
    await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
