"""The contract of host.hypervisor, kept by the real hypervisor and by the simulated one alike."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest

from hostler.host.hypervisor import Hypervisor, Machine
from hostler.model.errors import (
    AlreadyExists,
    BadImage,
    Cancelled,
    GuestRefused,
    InUse,
    NotFound,
    PeerUnreachable,
    QemuFailed,
    WrongState,
)
from hostler.model.machine import LaunchSpec, MigrationEnd, RunStatus
from hostler.model.migration import MigrationMode, MigrationProgress, MigrationSettings
from hostler.qemu import migration
from hostler.qemu.machine import QemuHypervisor
from hostler.testing.machines import Rig
from hostler.testing.simulated import SimulatedHypervisor, World

pytestmark = pytest.mark.component

WAIT = 30.0
HANDED_OVER = (RunStatus.FINISH_MIGRATE, RunStatus.POSTMIGRATE)
"""The first for some milliseconds after the end."""
SLOW = MigrationSettings(bandwidth=200_000)


class Host:
    """A hypervisor and what a test needs around it."""

    def __init__(self, rig: Rig, hypervisor: Hypervisor) -> None:
        self.rig = rig
        self.hypervisor = hypervisor
        self._launched: list[LaunchSpec] = []
        self._machines: list[Machine] = []

    async def launch(self, place: str = "a", *, incoming: bool = False, **changes: object) -> Machine:
        spec = self.rig.spec(place, incoming=incoming, **changes)
        self._launched.append(spec)
        machine = await self.hypervisor.launch(spec)
        self._machines.append(machine)
        return machine

    async def adopt(self, place: str = "a") -> Machine | None:
        spec = self.rig.spec(place)
        machine = await self.hypervisor.adopt(spec.config.id, spec.run_dir)
        self._machines += [machine] if machine is not None else []
        return machine

    async def start(self, place: str = "a", **changes: object) -> Machine:
        machine = await self.launch(place, incoming=False, **changes)
        await machine.run()
        return machine

    async def clear(self) -> None:
        for machine in self._machines:
            await machine.close()
        for spec in self._launched:
            await self.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)


@pytest.fixture(params=["simulated", "real"])
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    async with Rig() as rig:
        simulated = request.param == "simulated"
        made = Host(rig, SimulatedHypervisor(world=World()) if simulated else rig.hypervisor)
        try:
            yield made
        finally:
            await made.clear()


def ignore(_progress: MigrationProgress) -> None:
    """For moves nobody watches."""


async def test_run_and_stop(host: Host) -> None:
    machine = await host.launch()
    events = machine.events()
    assert await machine.status() is RunStatus.PRELAUNCH
    for _ in range(2):
        await machine.run()
    assert await machine.status() is RunStatus.RUNNING
    for _ in range(2):
        await machine.stop()
    assert await machine.status() is RunStatus.PAUSED
    await machine.reset()
    await machine.announce()
    assert (await machine.screenshot()).startswith(b"\x89PNG")
    await machine.quit()
    await machine.quit()
    names = [event.name async for event in events]
    assert [name for name in names if name in ("RESUME", "STOP", "RESET", "SHUTDOWN")] == [
        "RESUME",
        "STOP",
        "RESET",
        "SHUTDOWN",
    ]
    assert isinstance(await machine.wait_gone(), str)
    assert [event async for event in machine.events()] == []
    with pytest.raises(QemuFailed):
        await machine.status()


async def test_one_machine_in_a_run_directory(host: Host) -> None:
    await host.start()
    with pytest.raises(InUse):
        await host.launch()


async def test_adoption(host: Host) -> None:
    spec = host.rig.spec()
    assert await host.adopt() is None
    machine = await host.start()
    await machine.close()
    adopted = await host.adopt()
    assert adopted is not None
    assert adopted.process == machine.process
    assert await adopted.status() is RunStatus.RUNNING
    await host.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    await asyncio.wait_for(adopted.wait_gone(), WAIT)
    assert await host.adopt() is None
    await host.hypervisor.kill_leftovers(spec.config.id, spec.run_dir)
    assert isinstance(await host.hypervisor.last_output(spec.run_dir), str)


async def test_a_guest_without_an_agent(host: Host) -> None:
    machine = await host.start()
    with pytest.raises(GuestRefused):
        await machine.guest_shutdown()
    assert await machine.status() is RunStatus.RUNNING


async def test_disks(host: Host) -> None:
    first, second = await host.rig.disk("first"), await host.rig.disk("second", unit=1)
    machine = await host.start(disks=(first,))
    for _ in range(2):
        await machine.attach_disk(second)
    assert await machine.attached_disks() == {"first", "second"}
    assert await machine.io_failed() == {}
    third = await host.rig.disk("third")
    with pytest.raises(AlreadyExists):
        await machine.attach_disk(third)
    with pytest.raises(AlreadyExists):
        await machine.attach_disk(third.but(id="second", unit=2))
    with pytest.raises(InUse):
        await machine.attach_disk(second.but(id="again", unit=2))
    with pytest.raises(NotFound):
        await machine.attach_disk(third.but(unit=2, source=third.source.but(path="/none/x")))
    with pytest.raises(WrongState):
        await machine.attach_disk(third.but(bus="ide"))
    for _ in range(2):
        await machine.detach_disk("second", WAIT)
    await machine.stop()
    await machine.detach_disk("first", WAIT)
    assert await machine.attached_disks() == frozenset()


async def test_an_image_is_written_by_one_machine_only(host: Host) -> None:
    disk = await host.rig.disk("data")
    first = await host.start("a", disks=(disk,))
    with pytest.raises(InUse) as caught:
        await host.launch("b", disks=(disk,))
    assert disk.source.path in caught.value.cause
    await first.quit()
    await host.launch("b", disks=(disk,))


async def test_a_missing_image(host: Host) -> None:
    disk = await host.rig.disk("data")
    with pytest.raises(NotFound):
        await host.launch(disks=(disk.but(source=disk.source.but(path=f"{disk.source.path}.none")),))
    assert await host.adopt() is None


@pytest.mark.parametrize("mode", list(MigrationMode))
@pytest.mark.parametrize("encrypted", [True, False])
async def test_a_move(host: Host, mode: MigrationMode, encrypted: bool) -> None:
    disk = await host.rig.disk("data")
    settings, secret = MigrationSettings(mode=mode, encrypted=encrypted), secrets.token_hex(32)
    source = await host.start("a", disks=(disk,))
    target = await host.launch("b", incoming=True, disks=(disk,))
    assert await target.status() is RunStatus.INMIGRATE
    assert not await target.loaded()
    with pytest.raises(WrongState):
        await target.run()
    address = await target.listen(settings, secret, "127.0.0.1")
    assert address.startswith("127.0.0.1:")
    assert await target.listen(settings, secret, "127.0.0.1") == address
    result = await source.migrate_to(address, settings, secret, ignore)
    assert result.end is MigrationEnd.COMPLETED
    assert result.transferred > 0
    assert (await source.migration_state()).status == "completed"
    assert await source.status() in HANDED_OVER
    assert await target.loaded()
    assert await target.status() is RunStatus.PAUSED
    await target.run()
    with pytest.raises(InUse):
        await source.run()
    await source.quit()
    assert await target.status() is RunStatus.RUNNING
    assert await target.attached_disks() == {"data"}


async def test_a_completed_move_taken_back(host: Host) -> None:
    disk = await host.rig.disk("data")
    source = await host.start("a", disks=(disk,))
    target = await host.launch("b", incoming=True, disks=(disk,))
    address = await target.listen(MigrationSettings(), "ab" * 32, "127.0.0.1")
    await source.migrate_to(address, MigrationSettings(), "ab" * 32, ignore)
    await source.run()
    with pytest.raises(InUse):
        await target.run()
    assert await source.status() is RunStatus.RUNNING
    assert await target.status() is not RunStatus.RUNNING


async def test_a_wrong_secret_and_nobody_there(host: Host) -> None:
    source, target = await host.start("a"), await host.launch("b", incoming=True)
    address = await target.listen(MigrationSettings(), "ab" * 32, "127.0.0.1")
    result = await source.migrate_to(address, MigrationSettings(), "cd" * 32, ignore)
    assert result.end is MigrationEnd.FAILED
    assert "TLS" in result.text
    await target.quit()
    with pytest.raises(PeerUnreachable):
        await source.migrate_to(address, MigrationSettings(), "ab" * 32, ignore)
    assert await source.status() is RunStatus.RUNNING


@pytest.mark.parametrize("how", ["cancel", "target dies", "task is cancelled"])
async def test_a_move_that_does_not_happen(host: Host, how: str) -> None:
    disk = await host.rig.disk("data")
    source = await host.start("a", disks=(disk,))
    target = await host.launch("b", incoming=True, disks=(disk,))
    address = await target.listen(SLOW, "ab" * 32, "127.0.0.1")
    moving = asyncio.Event()
    task = asyncio.create_task(
        source.migrate_to(address, SLOW, "ab" * 32, lambda p: moving.set() if p.transferred else None)
    )
    await asyncio.wait_for(moving.wait(), WAIT)
    if how == "cancel":
        await source.cancel_migration()
        assert (await task).end is MigrationEnd.CANCELLED
    elif how == "target dies":
        await target.quit()
        assert (await task).end is MigrationEnd.FAILED
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.wait_for(target.wait_gone(), WAIT)
    await source.cancel_migration()
    assert await source.status() is RunStatus.RUNNING
    assert await source.attached_disks() == {"data"}


async def test_saved_and_restored(host: Host) -> None:
    disk = await host.rig.disk("data")
    machine = await host.start("a", disks=(disk,))
    path = str(host.rig.path / "state")
    assert (await machine.save_to(path, ignore)).end is MigrationEnd.COMPLETED
    await machine.quit()
    restored = await host.launch("b", incoming=True, disks=(disk,))
    await restored.load_from(path)
    assert await restored.status() is RunStatus.PAUSED
    await restored.run()
    assert await restored.status() is RunStatus.RUNNING


async def test_saving_that_does_not_happen(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "UNLIMITED", 200_000)
    machine = await host.start()
    with pytest.raises(NotFound):
        await machine.save_to("/none/state", ignore)
    moving = asyncio.Event()
    task = asyncio.create_task(
        machine.save_to(str(host.rig.path / "state"), lambda p: moving.set() if p.transferred else None)
    )
    await asyncio.wait_for(moving.wait(), WAIT)
    await machine.cancel_migration()
    with pytest.raises(Cancelled):
        await task
    assert await machine.status() is RunStatus.RUNNING
    assert not [path for path in host.rig.path.iterdir() if path.name.startswith("state")]


async def test_restoring_what_is_none(host: Host) -> None:
    running, waiting = await host.start("a"), await host.launch("b", incoming=True)
    with pytest.raises(WrongState):
        await running.load_from("/none/state")
    with pytest.raises(NotFound):
        await waiting.load_from("/none/state")
    path = host.rig.path / "text"
    path.write_text("no state")
    with pytest.raises(BadImage):
        await waiting.load_from(str(path))
    await asyncio.wait_for(waiting.wait_gone(), WAIT)


def test_both_are_hypervisors() -> None:
    """The type checker holds them to the protocol; this names them."""
    kinds: tuple[type[Hypervisor], ...] = (QemuHypervisor, SimulatedHypervisor)
    assert len(kinds) == 2
