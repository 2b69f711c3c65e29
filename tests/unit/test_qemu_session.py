"""The session, hot plug and migration against a fake QEMU that fails on request."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue

from hostler.model.disk import Disk
from hostler.model.errors import GuestRefused, HostlerError, QemuFailed, TimedOut
from hostler.model.machine import MachineEvent, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.qemu import commands, hotplug, psk, qmp, saved
from hostler.qemu.migration import Migrator
from hostler.qemu.qmp import EVENTS_LOST, EventStream, QmpSession
from hostler.testing.fake_blocks import LOCKS
from hostler.testing.fake_qmp import Failure, FakeQmp

pytestmark = pytest.mark.unit

WAIT = 30.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="hq"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def fake(place: Path) -> AsyncIterator[FakeQmp]:
    async with FakeQmp(f"{place}/qmp.sock") as made:
        yield made


@pytest.fixture
async def session(fake: FakeQmp) -> AsyncIterator[QmpSession]:
    made = await QmpSession.connect(fake.path, deadline=WAIT, name="vm a")
    yield made
    await made.close()


@pytest.fixture
def disk(place: Path) -> Disk:
    path = place / "a.img"
    path.write_bytes(bytes(4096))
    return Disk.model_validate({"id": "data", "source": {"path": str(path)}})


def ignore(_progress: MigrationProgress) -> None:
    """For moves nobody watches."""


# events


def _event(number: int) -> MachineEvent:
    return MachineEvent(name="E", data={"n": number})


async def test_a_slow_subscriber_is_told_what_it_missed() -> None:
    stream = EventStream(limit=3)
    for number in range(5):
        stream.put(_event(number))
    stream.end()
    assert [event async for event in stream] == [
        MachineEvent(name=EVENTS_LOST, data={"count": 2}),
        *(_event(number) for number in (2, 3, 4)),
    ]


async def test_a_waiting_subscriber_is_woken_by_an_event_and_by_the_end() -> None:
    stream = EventStream()
    waiting = asyncio.create_task(stream.wait_for(lambda event: event.data["n"] == 2, WAIT))
    await asyncio.sleep(0)
    for number in range(4):
        stream.put(_event(number))
    assert await waiting == _event(2)
    assert await anext(stream) == _event(3)
    ended = asyncio.create_task(stream.wait_for(lambda _: True, WAIT))
    await asyncio.sleep(0)
    stream.end()
    assert await ended is None
    assert stream.ended


async def test_each_subscriber_gets_every_event_from_its_beginning(fake: FakeQmp, session: QmpSession) -> None:
    first = session.events()
    fake.emit("ONE")
    assert await first.wait_for(lambda event: event.name == "ONE", WAIT) is not None
    second = session.events()
    fake.emit("TWO")
    for stream in (first, second):
        event = await stream.wait_for(lambda _: True, WAIT)
        assert event == MachineEvent(name="TWO")


async def test_a_subscriber_that_went_away_costs_nothing(session: QmpSession) -> None:
    for _ in range(100):
        session.events()
    assert len(session._streams) == 0


async def test_events_end_when_the_session_is_closed(session: QmpSession) -> None:
    stream = session.events()
    await session.close()
    assert [event async for event in stream] == []
    await session.wait_closed()
    await session.close()


# deadlines and death


@pytest.mark.parametrize("failure", [Failure.DIE_BEFORE, Failure.DIE_AFTER])
async def test_a_death_in_a_command_is_told_at_once(fake: FakeQmp, session: QmpSession, failure: Failure) -> None:
    fake.inject("query-status", failure)
    with pytest.raises(QemuFailed) as caught:
        await session.execute("query-status", deadline=WAIT)
    assert caught.value.details["gone"] is True
    await session.wait_closed()


async def test_an_answer_that_does_not_come(fake: FakeQmp, session: QmpSession) -> None:
    fake.inject("stop", Failure.HANG)
    with pytest.raises(TimedOut):
        await session.execute("stop", deadline=0.05)
    assert await commands.query_status(session) is RunStatus.PRELAUNCH


async def test_a_session_that_never_begins(place: Path) -> None:
    async with FakeQmp(f"{place}/x.sock") as fake:
        fake.inject("qmp_capabilities", Failure.HANG)
        with pytest.raises(TimedOut):
            await QmpSession.connect(fake.path, deadline=0.05)
    async with FakeQmp(f"{place}/y.sock") as fake:
        fake.inject("qmp_capabilities", Failure.DIE_BEFORE)
        with pytest.raises(QemuFailed):
            await QmpSession.connect(fake.path, deadline=WAIT)


async def test_something_else_at_the_socket(place: Path) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-whatever\r\n")
        writer.close()

    server = await asyncio.start_unix_server(talk, f"{place}/x.sock")
    async with server:
        with pytest.raises(QemuFailed):
            await QmpSession.connect(f"{place}/x.sock", deadline=WAIT)


async def test_a_link_to_another_monitor_is_not_followed(fake: FakeQmp, place: Path) -> None:
    (place / "link.sock").symlink_to(fake.path)
    (place / "file.sock").write_text("")
    for name in ("link.sock", "file.sock"):
        with pytest.raises(QemuFailed, match=r"not a socket|non-socket"):
            await QmpSession.connect(f"{place}/{name}", deadline=WAIT)


@pytest.mark.parametrize("answer", [None, 3, "x", [], ["x"], {}, {"status": []}, [{"x": 1}]])
async def test_a_qemu_that_answers_nonsense(
    session: QmpSession, monkeypatch: pytest.MonkeyPatch, answer: JsonValue
) -> None:
    async def execute(*_: object, **__: object) -> JsonValue:
        return answer

    monkeypatch.setattr(session, "execute", execute)
    asked = (
        commands.query_status,
        commands.peripherals,
        commands.block_nodes,
        hotplug.io_failed,
        commands.query_migrate,
    )
    for ask in asked:
        try:
            await ask(session)
        except QemuFailed as error:
            assert "not understood" in error.cause
    with pytest.raises(QemuFailed):
        await commands.query_status(session)


# disks


@pytest.mark.parametrize("failure", [Failure.REFUSE, Failure.HANG])
@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_an_attach_that_fails_leaves_nothing(
    fake: FakeQmp, session: QmpSession, disk: Disk, command: str, failure: Failure, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = command == "blockdev-add" and failure is Failure.REFUSE  # a refusal is looked into by the careful way
    fake.inject(command, failure, times=2 if again else 1)
    monkeypatch.setattr(commands, "BLOCK_DEADLINE", 0.1)
    with pytest.raises(HostlerError):
        await hotplug.attach_disk(session, disk)
    monkeypatch.undo()
    assert await commands.block_nodes(session) == {}
    assert await hotplug.attached_disks(session) == frozenset()
    assert not LOCKS.taken(disk.source.path)
    await hotplug.attach_disk(session, disk)
    assert LOCKS.taken(disk.source.path)


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
async def test_an_attach_that_is_cancelled_leaves_nothing(
    fake: FakeQmp, session: QmpSession, disk: Disk, command: str
) -> None:
    fake.inject(command, Failure.HANG)
    task = asyncio.create_task(hotplug.attach_disk(session, disk))
    async with asyncio.timeout(WAIT):
        while fake.pending(command):  # noqa: ASYNC110 - a counter
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await commands.block_nodes(session) == {}


async def test_a_guest_that_does_not_let_go(fake: FakeQmp, session: QmpSession, disk: Disk) -> None:
    await hotplug.attach_disk(session, disk)
    fake.machine.blocks.unplug_ignored = True
    with pytest.raises(GuestRefused):
        await hotplug.detach_disk(session, "data", 0.05)
    fake.machine.blocks.unplug_ignored, fake.machine.blocks.unplug_refused = False, True
    with pytest.raises(GuestRefused):
        await hotplug.detach_disk(session, "data", WAIT)
    assert await hotplug.attached_disks(session) == {"data"}
    fake.machine.blocks.unplug_refused = False
    await hotplug.detach_disk(session, "data", WAIT)
    assert await hotplug.attached_disks(session) == frozenset()


async def test_a_detach_that_failed_halfway_is_finished(fake: FakeQmp, session: QmpSession, disk: Disk) -> None:
    await hotplug.attach_disk(session, disk)
    fake.inject("blockdev-del", Failure.REFUSE, "something")
    with pytest.raises(QemuFailed):
        await hotplug.detach_disk(session, "data", WAIT)
    await hotplug.detach_disk(session, "data", WAIT)
    assert await commands.block_nodes(session) == {}


async def test_a_node_that_is_let_go_of_late(fake: FakeQmp, session: QmpSession, disk: Disk) -> None:
    await hotplug.attach_disk(session, disk)
    fake.inject("blockdev-del", Failure.REFUSE, "Node data is in use", times=3)
    await hotplug.detach_disk(session, "data", WAIT)
    assert await commands.block_nodes(session) == {}


async def test_failed_io(fake: FakeQmp, session: QmpSession, disk: Disk) -> None:
    await hotplug.attach_disk(session, disk)
    fake.machine.blocks.io_status["disk-data"] = "nospace"
    assert await hotplug.io_failed(session) == {"data": "nospace"}


# moves

STEPS = ("migrate-set-capabilities", "migrate-set-parameters", "object-del", "object-add", "getfd", "migrate")


@pytest.mark.parametrize("command", STEPS)
async def test_a_move_that_is_refused_at_any_step_can_be_repeated(
    fake: FakeQmp, session: QmpSession, place: Path, command: str
) -> None:
    await commands.cont(session)
    (place / "b").mkdir()
    async with FakeQmp(f"{place}/b/qmp.sock", incoming=True) as other:
        target = await QmpSession.connect(other.path, deadline=WAIT)
        address = await Migrator(target, f"{place}/b", os.geteuid()).listen(MigrationSettings(), "ab" * 32, "127.0.0.1")
        migrator = Migrator(session, str(place), os.geteuid())
        fake.inject(command, Failure.REFUSE)
        with pytest.raises(QemuFailed):
            await migrator.migrate_to(address, MigrationSettings(), "ab" * 32, ignore)
        assert await commands.query_status(session) is RunStatus.RUNNING
        assert not list(place.glob("psk-*"))
        result = await migrator.migrate_to(address, MigrationSettings(), "ab" * 32, ignore)
        assert result.end == "completed"
        await target.close()


@pytest.mark.parametrize("command", ["getfd", "migrate", "migrate-set-capabilities", "stop"])
async def test_a_save_that_is_refused_at_any_step_can_be_repeated(
    fake: FakeQmp, session: QmpSession, place: Path, command: str
) -> None:
    await commands.cont(session)
    migrator = Migrator(session, str(place), os.geteuid())
    fake.inject(command, Failure.REFUSE)
    with pytest.raises(QemuFailed):
        await saved.save_to(session, migrator, f"{place}/state", ignore)
    assert await commands.query_status(session) is RunStatus.RUNNING
    assert not list(place.glob("state*"))
    await saved.save_to(session, migrator, f"{place}/state", ignore)
    assert (place / "state").stat().st_size > 0


async def test_keys_come_and_go(place: Path) -> None:
    one = psk.write_key(str(place), "ab", os.geteuid())
    two = psk.write_key(str(place), "cd", os.geteuid())
    assert not Path(one).exists()
    assert Path(f"{two}/keys.psk").read_text() == "hostler:cd\n"
    psk.remove_keys(str(place))
    psk.remove_keys(str(place))
    assert not list(place.glob("psk-*"))


def test_the_group_is_the_one_of_the_rfc() -> None:
    """First and last words as printed in RFC 7919, and the property that makes it one: p and (p - 1) / 2 are prime."""
    prime = psk.ffdhe2048()
    assert f"{prime:X}".startswith("FFFFFFFFFFFFFFFFADF85458A2BB4A9AAFDC5620273D3CF1")
    assert f"{prime:X}".endswith("886B423861285C97FFFFFFFFFFFFFFFF")
    for number in (prime, (prime - 1) // 2):
        assert number.bit_length() in (2047, 2048)
        assert all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7))
    assert psk.dh_group().startswith(b"-----BEGIN DH PARAMETERS-----\nMIIBCAKCAQEA////")


def test_the_library_does_not_log() -> None:
    assert not qmp.logging.getLogger("qemu.qmp.protocol").isEnabledFor(qmp.logging.ERROR)
