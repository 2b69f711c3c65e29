"""The simulated hypervisor: many machines, and failures on request. What it does is in the contract tests."""

from __future__ import annotations

import asyncio
import os

import pytest

from hostler.model.errors import GuestRefused, NoSpace, QemuFailed, TimedOut
from hostler.model.machine import LaunchSpec, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.testing.simulated import SimulatedHypervisor, SimulatedMachine, World
from hostler.testing.vm_variants import config

pytestmark = pytest.mark.unit


def spec(number: int = 0, place: str = "one", *, incoming: bool = False) -> LaunchSpec:
    directory = f"/none/{place}/{number}"
    return LaunchSpec.model_validate(
        {
            "config": config(name=f"vm{number}"),
            "accelerator": "tcg",
            "run_dir": directory,
            "state_dir": directory,
            "incoming": incoming,
        }
    )


def ignore(_progress: MigrationProgress) -> None:
    """For moves nobody watches."""


async def test_a_hundred_machines_move_to_another_host() -> None:
    world = World()
    one, two = SimulatedHypervisor(world=world), SimulatedHypervisor(world=world)

    async def move(number: int) -> SimulatedMachine:
        source = await one.launch(spec(number))
        await source.run()
        target = await two.launch(spec(number, "two", incoming=True))
        address = await target.listen(MigrationSettings(), "ab", "host2")
        await source.migrate_to(address, MigrationSettings(), "ab", ignore)
        assert await target.status() is RunStatus.PAUSED  # never by itself
        await target.run()
        await source.quit()
        return target

    moved = await asyncio.gather(*(move(number) for number in range(100)))
    assert len({machine.process.pid for machine in moved}) == 100
    assert not any(os.path.exists(f"/proc/{machine.process.pid}") for machine in moved)
    assert len(world.running) == 100
    assert world.wire == {}


async def test_failures_on_request() -> None:
    hypervisor = SimulatedHypervisor(world=World())
    hypervisor.faults.fail("launch", NoSpace("x", "full"))
    with pytest.raises(NoSpace):
        await hypervisor.launch(spec())
    machine = await hypervisor.launch(spec())
    machine.faults.fail("status", TimedOut("x", "slow"), times=2)
    for _ in range(2):
        with pytest.raises(TimedOut):
            await machine.status()
    assert await machine.status() is RunStatus.PRELAUNCH
    hang = machine.faults.hang("run")
    task = asyncio.create_task(machine.run())
    await hang.reached.wait()
    assert await machine.status() is RunStatus.PRELAUNCH
    hang.release.set()
    await task
    assert await machine.status() is RunStatus.RUNNING
    machine.faults.fail("stop", TimedOut("x", "slow"))
    machine.faults.clear()
    await machine.stop()
    assert machine.faults.calls.count("stop") == 1


async def test_a_killed_machine() -> None:
    world = World()
    machine = await SimulatedHypervisor(world=world).launch(spec())
    events = machine.events()
    waiting = asyncio.create_task(machine.wait_gone())
    await asyncio.sleep(0)
    machine.qemu.die("out of memory")
    assert await waiting == "out of memory"
    assert [event async for event in events] == []
    with pytest.raises(QemuFailed):
        await machine.status()
    other = SimulatedHypervisor(world=world)
    assert await other.adopt("x", spec().run_dir) is None
    assert await other.last_output(spec().run_dir) == "out of memory"


@pytest.mark.parametrize("obeys", [True, False])
async def test_guests_that_obey_and_that_do_not(obeys: bool) -> None:
    machine = await SimulatedHypervisor(world=World()).launch(spec())
    machine.qemu.obeys_power_button = machine.qemu.agent = obeys
    await machine.run()
    events = machine.events()
    await machine.power_down()
    if obeys:
        assert [event.name async for event in events] == ["POWERDOWN", "SHUTDOWN"]
    else:
        with pytest.raises(GuestRefused):
            await machine.guest_shutdown()
        assert await machine.status() is RunStatus.RUNNING


async def test_the_source_dies_on_the_way() -> None:
    world = World()
    hypervisor = SimulatedHypervisor(world=world)
    source = await hypervisor.launch(spec())
    target = await hypervisor.launch(spec(place="two", incoming=True))
    address = await target.listen(MigrationSettings(), "ab", "host2")
    with pytest.raises(QemuFailed):
        await source.migrate_to(address, MigrationSettings(), "ab", lambda _: source.qemu.die())
    assert "Input/output" in await target.wait_gone()
    assert world.running == {}
