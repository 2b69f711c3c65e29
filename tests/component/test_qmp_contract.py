"""What Hostler relies on in QEMU 7.2, checked against the real one and against the fake that stands in for it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hostler.model.disk import Disk
from hostler.model.errors import AlreadyExists, BadImage, HostlerError, InUse, NoSpace, NotFound, QemuFailed
from hostler.model.machine import MachineEvent, MigrationEnd, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.qemu import blockdev, commands, hotplug, process, saved
from hostler.qemu.migration import Migrator
from hostler.qemu.qmp import EventStream, QmpSession
from hostler.testing.fake_qmp import FakeQmp
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component

WAIT = 30.0
HANDED_OVER = (RunStatus.FINISH_MIGRATE, RunStatus.POSTMIGRATE)
"""The first for some milliseconds after the end."""


class Makers(ABC):
    """Makes machines, real or fake, and sessions with them."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.sessions: list[QmpSession] = []

    @abstractmethod
    async def start(self, place: str, incoming: bool) -> None: ...

    @abstractmethod
    async def kill(self, place: str) -> None: ...

    async def session(self, place: str = "a", incoming: bool = False) -> QmpSession:
        """A new machine."""
        await self.start(place, incoming)
        return await self.connect(place)

    async def connect(self, place: str = "a", deadline: float = WAIT) -> QmpSession:
        session = await QmpSession.connect(f"{self.run_dir(place)}/qmp.sock", deadline=deadline, name=place)
        self.sessions.append(session)
        return session

    def run_dir(self, place: str) -> str:
        return str(self.rig.path / f"{place}.run")

    def migrator(self, session: QmpSession) -> Migrator:
        return Migrator(session, self.run_dir(session.name), os.geteuid())


class RealMakers(Makers):
    async def start(self, place: str, incoming: bool) -> None:
        machine = await self.rig.launch(self.rig.spec(place, incoming=incoming))
        await machine.close()

    async def kill(self, place: str) -> None:
        found = process.find(self.run_dir(place))
        assert found is not None
        await process.kill(found)


class FakeMakers(Makers):
    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.fakes: dict[str, FakeQmp] = {}

    async def start(self, place: str, incoming: bool) -> None:
        Path(self.run_dir(place)).mkdir()
        self.fakes[place] = FakeQmp(f"{self.run_dir(place)}/qmp.sock", incoming=incoming)
        await self.fakes[place].start()

    async def kill(self, place: str) -> None:
        await self.fakes[place].stop()


@pytest.fixture(params=[FakeMakers, RealMakers], ids=["fake", "real"])
async def makers(request: pytest.FixtureRequest) -> AsyncIterator[Makers]:
    async with Rig() as rig:
        made: Makers = request.param(rig)
        try:
            yield made
        finally:
            for session in made.sessions:
                await session.close()
            for fake in getattr(made, "fakes", {}).values():
                await fake.stop()


def ignore(_progress: MigrationProgress) -> None:
    """For moves nobody watches."""


async def names_until_end(events: EventStream) -> list[str]:
    async with asyncio.timeout(WAIT):
        return [event.name async for event in events]


async def test_run_states_and_their_events(makers: Makers) -> None:
    qmp = await makers.session()
    events = qmp.events()
    assert await commands.query_status(qmp) is RunStatus.PRELAUNCH
    for _ in range(2):
        await commands.cont(qmp)
    assert await commands.query_status(qmp) is RunStatus.RUNNING
    await commands.system_powerdown(qmp)
    await commands.system_reset(qmp)
    for _ in range(2):
        await commands.stop(qmp)
    assert await commands.query_status(qmp) is RunStatus.PAUSED
    await commands.cont(qmp)
    await commands.quit_(qmp, WAIT)
    names = [name for name in await names_until_end(events) if name != "NIC_RX_FILTER_CHANGED"]
    assert names[0] == "RESUME"
    assert names[-3:] == ["STOP", "RESUME", "SHUTDOWN"]
    assert {"POWERDOWN", "RESET"} <= set(names)


async def test_an_event_comes_before_the_reply_that_follows_it(makers: Makers) -> None:
    qmp = await makers.session()
    events = qmp.events()
    await commands.cont(qmp)
    first = await events.wait_for(lambda _: True, WAIT)
    assert first == MachineEvent(name="RESUME")


@pytest.mark.parametrize(
    ("command", "arguments", "error_class", "words"),
    [
        ("no-such-command", {}, "CommandNotFound", "has not been found"),
        ("blockdev-del", {}, "GenericError", "'node-name' is missing"),
        ("query-status", {"x": 1}, "GenericError", "'x' is unexpected"),
        ("blockdev-del", {"node-name": "x"}, "GenericError", "Failed to find node with node-name='x'"),
        ("device_del", {"id": "x"}, "DeviceNotFound", "Device 'x' not found"),
        ("object-del", {"id": "x"}, "GenericError", "object 'x' not found"),
        ("closefd", {"fdname": "x"}, "GenericError", "named 'x' not found"),
        ("getfd", {"fdname": "x"}, "GenericError", "No file descriptor supplied"),
        ("migrate", {"uri": "fd:x"}, "GenericError", "named 'x' has not been found"),
        ("migrate", {"uri": "x:"}, "GenericError", "valid migration protocol"),
        ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}, "GenericError", "'-incoming' was not specified"),
        ("screendump", {"filename": "/none/x"}, "GenericError", "No such file or directory"),
    ],
)
async def test_refusals(
    makers: Makers, command: str, arguments: dict[str, object], error_class: str, words: str
) -> None:
    qmp = await makers.session()
    with pytest.raises(QemuFailed) as caught:
        await qmp.execute(command, arguments)
    assert caught.value.details["error_class"] == error_class
    assert words in caught.value.cause
    assert await commands.query_status(qmp) is RunStatus.PRELAUNCH


async def test_one_client_after_the_other(makers: Makers) -> None:
    qmp = await makers.session()
    with pytest.raises(HostlerError):
        await makers.connect(deadline=0.2)
    await qmp.close()
    second = await makers.connect()
    assert await commands.query_status(second) is RunStatus.PRELAUNCH


async def test_commands_overlap(makers: Makers) -> None:
    qmp = await makers.session()
    found = await asyncio.gather(*(commands.query_status(qmp) for _ in range(20)))
    assert set(found) == {RunStatus.PRELAUNCH}


async def test_death_ends_everything(makers: Makers) -> None:
    qmp = await makers.session()
    events = qmp.events()
    await makers.kill("a")
    assert await names_until_end(events) == []
    await asyncio.wait_for(qmp.wait_closed(), WAIT)
    with pytest.raises(QemuFailed) as caught:
        await commands.query_status(qmp)
    assert caught.value.details["gone"] is True
    await qmp.close()


async def test_a_disk_comes_and_goes(makers: Makers) -> None:
    qmp = await makers.session()
    events = qmp.events()
    disk = await makers.rig.disk("data", unit=3)
    for _ in range(2):
        await hotplug.attach_disk(qmp, disk)
    assert await hotplug.attached_disks(qmp) == {"data"}
    assert await hotplug.io_failed(qmp) == {}
    with pytest.raises(QemuFailed, match="in use"):
        await commands.blockdev_del(qmp, "data")
    for _ in range(2):
        await hotplug.detach_disk(qmp, "data", WAIT)
    assert await hotplug.attached_disks(qmp) == frozenset()
    assert await commands.block_nodes(qmp) == {}
    deleted = await events.wait_for(lambda event: event.name == "DEVICE_DELETED", WAIT)
    assert deleted is not None
    assert deleted.data["device"] == "disk-data"


async def test_half_made_disks_are_finished_or_removed(makers: Makers) -> None:
    qmp = await makers.session()
    disk = await makers.rig.disk("data")
    await commands.blockdev_add(qmp, blockdev.blockdev_options(disk))
    await hotplug.attach_disk(qmp, disk)
    await commands.device_del(qmp, "disk-data")
    await hotplug.detach_disk(qmp, "data", WAIT)
    assert await commands.block_nodes(qmp) == {}


async def test_refused_disks_leave_nothing(makers: Makers) -> None:
    first, second = await makers.session("a"), await makers.session("b")
    disk, other = await makers.rig.disk("data"), await makers.rig.disk("other")
    await hotplug.attach_disk(first, disk)
    with pytest.raises(InUse, match="open for writing"):
        await hotplug.attach_disk(second, disk)
    with pytest.raises(AlreadyExists):
        await hotplug.attach_disk(first, other)
    with pytest.raises(AlreadyExists):
        await hotplug.attach_disk(first, other.but(id="data", unit=1))
    with pytest.raises(QemuFailed, match="not found"):
        await hotplug.attach_disk(first, other.but(controller=2))
    with pytest.raises(BadImage):
        await hotplug.attach_disk(
            second, Disk.model_validate({"id": "x", "source": {**dict(other.source), "format": "qcow2"}})
        )
    with pytest.raises(NotFound):
        await hotplug.attach_disk(second, Disk.model_validate({"id": "x", "source": {"path": "/none/x"}}))
    assert set(await commands.block_nodes(first)) == {"data", "data.file"}
    assert await commands.block_nodes(second) == {}


@pytest.mark.parametrize("encrypted", [True, False])
async def test_a_move_hands_over_everything_but_the_right_to_run(makers: Makers, encrypted: bool) -> None:
    source, target = await makers.session("a"), await makers.session("b", incoming=True)
    assert await commands.query_status(target) is RunStatus.INMIGRATE
    assert await commands.query_migrate(source) == {}
    settings, secret = MigrationSettings(encrypted=encrypted), secrets.token_hex(32)
    address = await makers.migrator(target).listen(settings, secret, "127.0.0.1")
    await commands.cont(source)
    events = source.events()
    result = await makers.migrator(source).migrate_to(address, settings, secret, ignore)
    assert result.end is MigrationEnd.COMPLETED
    assert result.downtime is not None
    assert result.transferred > 0
    assert await commands.query_status(source) in HANDED_OVER
    assert await makers.migrator(target).loaded()
    assert await commands.query_status(target) is RunStatus.PAUSED
    seen = [await events.wait_for(lambda e: e.name in ("MIGRATION", "STOP"), WAIT) for _ in range(4)]
    assert [event.data.get("status", event.name) for event in seen if event] == ["setup", "active", "STOP", "completed"]
    await commands.cont(target)
    assert await commands.query_status(target) is RunStatus.RUNNING


async def test_a_disk_is_locked_by_one_side_only(makers: Makers) -> None:
    source = await makers.session("a")
    disk = await makers.rig.disk("data")
    await hotplug.attach_disk(source, disk)
    await commands.cont(source)
    target = await makers.session("b", incoming=True)
    # A target is started with the source's disks; here they are added while it waits, which takes no lock either.
    await hotplug.attach_disk(target, disk)
    secret = secrets.token_hex(32)
    address = await makers.migrator(target).listen(MigrationSettings(), secret, "127.0.0.1")
    result = await makers.migrator(source).migrate_to(address, MigrationSettings(), secret, ignore)
    assert result.end is MigrationEnd.COMPLETED
    await commands.cont(target)
    with pytest.raises(QemuFailed, match="lock"):
        await commands.cont(source)
    await commands.quit_(target, WAIT)
    await target.wait_closed()
    async with asyncio.timeout(WAIT):  # its locks are free when it has ended, not when it has said goodbye
        while await commands.query_status(source) is not RunStatus.RUNNING:
            with suppress(QemuFailed):
                await commands.cont(source)


async def test_a_wrong_secret(makers: Makers) -> None:
    source, target = await makers.session("a"), await makers.session("b", incoming=True)
    await commands.cont(source)
    settings = MigrationSettings()
    address = await makers.migrator(target).listen(settings, secrets.token_hex(32), "127.0.0.1")
    result = await makers.migrator(source).migrate_to(address, settings, secrets.token_hex(32), ignore)
    assert result.end is MigrationEnd.FAILED
    assert "TLS" in result.text
    assert await commands.query_status(source) is RunStatus.RUNNING
    assert not await makers.migrator(target).loaded()


@pytest.mark.parametrize("how", ["cancel", "kill"])
async def test_a_move_that_breaks_off(makers: Makers, how: str) -> None:
    source, target = await makers.session("a"), await makers.session("b", incoming=True)
    await commands.cont(source)
    settings, secret = MigrationSettings(bandwidth=200_000), secrets.token_hex(32)
    address = await makers.migrator(target).listen(settings, secret, "127.0.0.1")
    migrator = makers.migrator(source)
    moving = asyncio.Event()
    task = asyncio.create_task(
        migrator.migrate_to(address, settings, secret, lambda p: moving.set() if p.transferred else None)
    )
    await asyncio.wait_for(moving.wait(), WAIT)
    with pytest.raises(QemuFailed, match="in progress"):
        await commands.migrate(source, "fd:x")
    events = target.events()
    if how == "cancel":
        await migrator.cancel()
    else:
        await makers.kill("b")
    assert (await task).end is (MigrationEnd.CANCELLED if how == "cancel" else MigrationEnd.FAILED)
    assert await commands.query_status(source) is RunStatus.RUNNING
    await names_until_end(events)  # the target ends itself


async def test_saved_and_loaded(makers: Makers) -> None:
    source = await makers.session("a")
    await commands.cont(source)
    path = str(makers.rig.path / "state")
    result = await saved.save_to(source, makers.migrator(source), path, ignore)
    assert result.end is MigrationEnd.COMPLETED
    assert await commands.query_status(source) in HANDED_OVER
    await commands.cont(source)
    assert await commands.query_status(source) is RunStatus.RUNNING
    target = await makers.session("b", incoming=True)
    await saved.load_from(target, makers.migrator(target), path)
    assert await commands.query_status(target) is RunStatus.PAUSED
    await commands.cont(target)


async def test_saving_to_a_full_disk(makers: Makers, monkeypatch: pytest.MonkeyPatch) -> None:
    source = await makers.session("a")
    await commands.cont(source)
    partial, really = makers.rig.path / "state.partial", os.open

    def full(path: str, *how: Any, **where: Any) -> int:
        opened = really(path, *how, **where)
        if path == str(partial):
            device = really("/dev/full", os.O_WRONLY)
            os.dup2(device, opened)
            os.close(device)
        return opened

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(NoSpace):
        await saved.save_to(source, makers.migrator(source), str(makers.rig.path / "state"), ignore)
    assert await commands.query_status(source) is RunStatus.RUNNING
    assert not [path for path in makers.rig.path.iterdir() if path.name.startswith("state")]


async def test_a_damaged_state(makers: Makers) -> None:
    path = makers.rig.path / "state"
    path.write_text(json.dumps({"no": "state"}))
    target = await makers.session("a", incoming=True)
    with pytest.raises(BadImage):
        await saved.load_from(target, makers.migrator(target), str(path))
    await asyncio.wait_for(target.wait_closed(), WAIT)


async def test_cont_before_the_state_has_arrived_is_taken_as_run_at_once(makers: Makers) -> None:
    """Why `Machine.run` refuses while the state is awaited."""
    source, target = await makers.session("a"), await makers.session("b", incoming=True)
    await commands.cont(source)
    await commands.cont(target)
    assert await commands.query_status(target) is RunStatus.INMIGRATE
    secret = secrets.token_hex(32)
    address = await makers.migrator(target).listen(MigrationSettings(), secret, "127.0.0.1")
    events = target.events()
    await makers.migrator(source).migrate_to(address, MigrationSettings(), secret, ignore)
    assert await events.wait_for(lambda event: event.name == "RESUME", WAIT) is not None
    assert await commands.query_status(target) is RunStatus.RUNNING
