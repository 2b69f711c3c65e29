"""A real QEMU, from launch to its end: answers, deadlines, death, adoption."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.model.errors import GuestRefused, HostlerError, InUse, NotFound, QemuFailed, TimedOut, WrongState
from hostler.model.machine import RunStatus
from hostler.model.nic import Network, Nic
from hostler.model.vm import KernelBoot
from hostler.qemu import commands, pci, process
from hostler.qemu.machine import QemuMachine
from hostler.qemu.qmp import QmpSession
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as made:
        yield made


async def test_a_guest_is_started_stopped_and_reset(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    events = machine.events()
    assert await machine.status() is RunStatus.PRELAUNCH
    for _ in range(2):  # harmless when repeated
        await machine.run()
    assert await machine.status() is RunStatus.RUNNING
    await machine.reset()
    await machine.power_down()
    for _ in range(2):
        await machine.stop()
    assert await machine.status() is RunStatus.PAUSED
    await machine.announce()
    await machine.quit()
    names = [event.name async for event in events]
    assert names[0] == "RESUME"
    assert [name for name in names if name in ("RESET", "POWERDOWN", "STOP")] == ["RESET", "POWERDOWN", "STOP"]
    assert names[-1] == "SHUTDOWN"
    assert not process.is_alive(machine.process)
    await machine.quit()


async def test_the_screen_is_a_picture_and_leaves_no_file(rig: Rig) -> None:
    machine = await rig.start()
    assert (await machine.screenshot()).startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(Path(machine.process.run_dir).glob("*.png"))


async def test_a_stopped_qemu_is_a_deadline_and_not_a_wait(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    await machine.close()
    session = await QmpSession.connect(f"{machine.process.run_dir}/qmp.sock", deadline=30, name="vm rig")
    os.kill(machine.process.pid, signal.SIGSTOP)
    with pytest.raises(TimedOut) as caught:
        await commands.query_status(session, deadline=0.2)
    assert "query-status" in caught.value.cause
    os.kill(machine.process.pid, signal.SIGCONT)
    # The late answer to the first question is not taken for the answer to the second.
    assert await session.execute("query-name") == {"name": "rig"}
    os.kill(machine.process.pid, signal.SIGSTOP)
    await session.close()
    assert session.closed
    os.kill(machine.process.pid, signal.SIGCONT)


async def test_a_killed_qemu_ends_events_and_pending_commands(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    events = machine.events()
    os.kill(machine.process.pid, signal.SIGSTOP)
    pending = asyncio.create_task(machine.status())
    await asyncio.sleep(0)
    os.kill(machine.process.pid, signal.SIGKILL)
    with pytest.raises(QemuFailed) as caught:
        await pending
    assert caught.value.details["gone"] is True
    assert [event async for event in events] == []
    assert [event async for event in machine.events()] == []
    await machine.wait_gone()
    with pytest.raises(QemuFailed):
        await machine.status()
    await machine.quit()


async def test_a_second_client_is_told_that_the_monitor_is_taken(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    path = f"{machine.process.run_dir}/qmp.sock"
    with pytest.raises(TimedOut):
        await QmpSession.connect(path, deadline=0.3)
    assert await machine.status() is RunStatus.PRELAUNCH
    await machine.close()
    second = await QmpSession.connect(path, deadline=30)
    await second.close()


async def test_nobody_at_the_socket_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(TimedOut):
        await QmpSession.connect(f"{tmp_path}/none", deadline=0.05)
    with pytest.raises(QemuFailed):
        await QmpSession.connect(f"{tmp_path}/none", deadline=60, alive=lambda: False)


async def test_commands_may_overlap(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    answers = await asyncio.gather(*(machine.status() for _ in range(50)))
    assert set(answers) == {RunStatus.PRELAUNCH}


@pytest.mark.parametrize("after", ["close", "nothing"])
async def test_a_running_machine_is_adopted(rig: Rig, after: str) -> None:
    spec = rig.spec(disks=(await rig.disk("one"),))
    machine = await rig.launch(spec)
    await machine.run()
    if after == "close":
        await machine.close()
        adopted = await rig.adopt(spec)
        assert adopted is not None
        assert adopted.process == machine.process
        assert await adopted.status() is RunStatus.RUNNING
        assert await adopted.attached_disks() == {"one"}
        await adopted.run()
        await adopted.quit()
    else:
        os.kill(machine.process.pid, signal.SIGKILL)
        await machine.wait_gone()
    assert await rig.adopt(spec) is None


async def test_a_machine_that_does_not_answer_is_not_adopted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostler.qemu.machine.ADOPT_DEADLINE", 0.3)
    spec = rig.spec()
    machine = await rig.launch(spec)
    await machine.close()
    os.kill(machine.process.pid, signal.SIGSTOP)
    with pytest.raises(QemuFailed) as caught:
        await rig.adopt(spec)
    assert caught.value.details["pid"] == machine.process.pid
    await rig.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert not process.is_alive(machine.process)


async def test_a_qemu_that_ends_at_its_start_leaves_its_words_and_nothing_else(rig: Rig) -> None:
    spec = rig.spec(kernel=KernelBoot(kernel=__file__))
    with pytest.raises(QemuFailed) as caught:
        await rig.launch(spec)
    assert "invalid kernel header" in caught.value.cause
    assert "invalid kernel header" in str(caught.value.details["output"])
    assert process.find(spec.run_dir) is None
    assert "invalid kernel header" in await rig.hypervisor.last_output(spec.run_dir)


async def test_a_missing_image_is_named(rig: Rig) -> None:
    disk = await rig.disk("one")
    Path(disk.source.path).unlink()
    with pytest.raises(NotFound) as caught:
        await rig.launch(rig.spec(disks=(disk,)))
    assert disk.source.path in caught.value.cause


async def test_one_image_in_two_machines_is_refused_by_its_lock(rig: Rig) -> None:
    disk = await rig.disk("one")
    first = await rig.launch(rig.spec("a", disks=(disk,)))
    with pytest.raises(InUse) as caught:
        await rig.launch(rig.spec("b", disks=(disk,)))
    assert disk.source.path in caught.value.cause
    assert await first.status() is RunStatus.PRELAUNCH


async def test_a_machine_that_waits_for_its_state_does_not_run(rig: Rig) -> None:
    machine = await rig.launch(rig.spec(incoming=True))
    assert not await machine.loaded()
    with pytest.raises(WrongState):
        await machine.run()
    assert await machine.status() is RunStatus.INMIGRATE


async def test_quit_ends_a_qemu_that_does_not_listen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostler.qemu.machine.QUIT_DEADLINE", 0.2)
    machine = await rig.launch(rig.spec())
    os.kill(machine.process.pid, signal.SIGSTOP)
    await machine.quit()
    assert not process.is_alive(machine.process)


async def test_a_cancelled_launch_leaves_nothing(rig: Rig) -> None:
    spec = rig.spec()
    task = asyncio.create_task(rig.launch(spec))
    async with asyncio.timeout(60):
        while process.find(spec.run_dir) is None:  # noqa: ASYNC110 - nothing tells of a new process
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.find(spec.run_dir) is None


async def test_a_guest_without_an_agent_refuses_to_shut_down(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostler.qemu.guest_agent.DEADLINE", 0.2)
    machine = await rig.start()
    with pytest.raises(GuestRefused):
        await machine.guest_shutdown()
    assert await machine.status() is RunStatus.RUNNING


@pytest.mark.parametrize("command", ["no-such-command", "blockdev-del"])
async def test_a_refusal_names_the_command(rig: Rig, command: str) -> None:
    machine = await rig.launch(rig.spec())
    await machine.close()
    session = await QmpSession.connect(f"{machine.process.run_dir}/qmp.sock", deadline=30, name="vm rig")
    with pytest.raises(HostlerError) as caught:
        await session.execute(command)
    assert caught.value.details["command"] == command
    assert not caught.value.cause.endswith(".")
    await session.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a QEMU a user of its own")
async def test_a_machine_runs_as_its_own_user(rig: Rig) -> None:
    machine = await rig.launch(rig.spec(run_as=1_900_000_123))
    status = Path(f"/proc/{machine.process.pid}/status").read_text()
    assert "Uid:\t1900000123\t1900000123\t1900000123\t1900000123" in status
    assert (await machine.screenshot()).startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/usr/bin/swtpm").exists(), reason="swtpm is not installed")
async def link_is_up(machine: QemuMachine, slot: int) -> bool:
    """What the guest sees: the status word (offset 6, virtio 1.1 section 5.1.4) in the device configuration, which QEMU
    has at 0x2000 of the adapter's BAR 4."""
    bar = ""
    while not bar:  # until the firmware has given it an address
        found = str(await machine._qmp.execute("human-monitor-command", {"command-line": "info pci"}))
        part = re.search(rf"device +{pci.nic(slot).slot}, function 0:.*?BAR4: [^\n]* at 0x([0-9a-f]+) ", found, re.S)
        bar = part[1] if part is not None and int(part[1], 16) + 1 & 0xFFFF_FFFF else ""
    line = f"xp /1hx 0x{int(bar, 16) + 0x2006:x}"
    said = str(await machine._qmp.execute("human-monitor-command", {"command-line": line}))
    return bool(int(said.split(":")[1], 16) & 1)


async def test_an_adapter_without_a_network_has_no_carrier(rig: Rig) -> None:
    nics = (
        Nic(id="none", mac="52:54:00:00:00:01", network=Network.NONE, slot=0),
        Nic(id="user", mac="52:54:00:00:00:02", slot=1),
    )
    machine = await rig.start(nics=nics)
    async with asyncio.timeout(60):
        assert not await link_is_up(machine, 0)
        assert await link_is_up(machine, 1)


async def test_a_machine_with_a_tpm(rig: Rig) -> None:
    spec = rig.spec(tpm=True)
    machine = await rig.start(tpm=True)
    assert await machine.status() is RunStatus.RUNNING
    await machine.quit()
    again = await rig.launch(spec)
    await again.quit()
