"""One guest through its whole life: after each action it is the same guest, nothing it wrote is lost, and it has its
disks as configured."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from userview import User

from hostler.model.errors import ErrorCode
from hostler.testing.bench_vm import SEED, SPAN, Bench
from hostler.testing.guestclient import GuestDisk, GuestSerial, JournalReading, JournalStatus, Ping
from hostler.testing.lab import LabHost

pytestmark = pytest.mark.e2e

BY_SERIAL = {
    "second": ("--serial", "SECOND", "--read-only"),
    "third": ("--serial", "THIRD", "--unit", "9", "--format", "vhdx"),
}
Action = Callable[[Bench, LabHost], None]


@pytest.fixture(scope="module")
def guest(guest: Bench) -> Bench:
    """With two more disks, so that there is something to confuse."""
    user = User(guest.hosts[0])
    for name, options in BY_SERIAL.items():
        path = str(guest.shared / name)
        user("disk", "add", "guest", "--new", "8M", "--volume", name, "--path", path, *options)
    return guest


def act(*words: str) -> Action:
    """The action is one command, with the name of the VM at its end."""
    return lambda _guest, host: User(host)(*words, "guest")


def in_turn(*actions: Action) -> Action:
    def do(guest: Bench, host: LabHost) -> None:
        for action in actions:
            action(guest, host)

    return do


def killed_daemon(_guest: Bench, host: LabHost) -> None:
    host.kill()
    host.start()


def restarted_daemon(_guest: Bench, host: LabHost) -> None:
    host.stop()
    host.start()


def moved(*options: str) -> Action:
    """To the other host, wherever it is now."""
    return lambda guest, host: User(host)("vm", "move", "guest", guest.other(host).name, *options)


def paused_and_back(_guest: Bench, host: LabHost) -> None:
    user = User(host)
    user("vm", "pause", "guest")
    assert user("vm", "show", "guest")["state"] == "paused"
    user("vm", "resume", "guest")


def paused_and_moved(guest: Bench, host: LabHost) -> None:
    """A paused VM stays paused where it arrives."""
    there = guest.other(host)
    User(host)("vm", "pause", "guest")
    moved()(guest, host)
    assert User(there)("vm", "show", "guest")["state"] == "paused"
    User(there)("vm", "resume", "guest")


def saved_under_new_daemon(guest: Bench, host: LabHost) -> None:
    act("vm", "save")(guest, host)
    assert host.processes() == []
    killed_daemon(guest, host)
    act("vm", "restore")(guest, host)


SAME_LIFE: dict[str, Action] = {
    "pause and resume": paused_and_back,
    "save and restore": in_turn(act("vm", "save"), act("vm", "restore")),
    "daemon restarted": restarted_daemon,
    "daemon killed": killed_daemon,
    "saved, daemon killed, restored": saved_under_new_daemon,
    "moved": moved(),
    "moved back": moved(),
    "moved quickly": moved("--quick"),
    "moved back while paused": paused_and_moved,
}
NEW_LIFE: dict[str, Action] = {
    "reset": act("vm", "reset"),
    "turned off and started": in_turn(act("vm", "turn-off"), act("vm", "start")),
    "shut down and started": in_turn(act("vm", "shutdown"), act("vm", "start")),
    "state discarded and started": in_turn(act("vm", "save"), act("vm", "discard-saved", "--yes"), act("vm", "start")),
}


def as_configured(guest: Bench, host: LabHost) -> None:
    """The guest sees exactly the disks of the configuration, where and as it says."""
    record = guest.record(host)
    assert record is not None

    async def look(serial: GuestSerial) -> list[GuestDisk]:
        return await serial.disks()

    seen = {d.serial: (d.size, int(d.hctl.split(":")[-1]), d.read_only, d.wwn) for d in guest.ask(host, look)}
    wanted = {d.serial: (d.source.size, d.unit, d.read_only, f"naa.{d.wwn:x}") for d in record.config.disks}
    assert seen == wanted and len(wanted) == 3


@pytest.mark.parametrize("action", SAME_LIFE)
def test_goes_on_after(guest: Bench, action: str) -> None:
    SAME_LIFE[action](guest, guest.owner())
    host = guest.owner()
    guest.check(host)
    as_configured(guest, host)
    assert len(host.qemus()) == 1 and guest.other(host).processes() == []


@pytest.mark.parametrize("action", NEW_LIFE)
def test_everything_it_had_written_is_there_after(guest: Bench, action: str) -> None:
    host = guest.owner()

    async def written(serial: GuestSerial) -> JournalStatus:
        return await serial.pattern_status()

    before = guest.ask(host, written)
    assert before.running and before.acked > 0
    NEW_LIFE[action](guest, host)

    async def read_back(serial: GuestSerial) -> tuple[Ping, JournalReading]:
        ping = await serial.wait_ready()
        await serial.wait_disk(guest.disk_serial)
        return ping, await serial.pattern_verify(guest.disk_serial, SEED, SPAN, before.acked)

    ping, reading = guest.ask(host, read_back)
    assert ping.boot != guest.boot, "it did not boot"
    assert reading.sound, reading
    guest.begin_writing(host)
    as_configured(guest, host)


def test_a_command_that_makes_no_sense_now_says_so(guest: Bench) -> None:
    user = User(guest.owner())
    for verb in ("start", "resume", "restore", "discard-saved"):
        problem = user.refused(ErrorCode.WRONG_STATE, 4, "vm", verb, "guest")
        assert problem["object"] == "vm guest" and "running" in problem["cause"]
    guest.check(guest.owner())


def test_the_screen_is_a_picture_of_its_size(guest: Bench) -> None:
    host = guest.owner()
    target = guest.shared / "screen.png"
    User(host).run("vm", "screenshot", "guest", str(target), "--force")
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR"
    assert struct.unpack(">II", content[16:24]) == (720, 400), "VGA text of 80 x 25 characters"


def test_the_console_on_a_terminal(guest: Bench) -> None:
    """What is typed reaches the guest, what it says is shown, and the escape leaves it running."""
    host = guest.owner()
    with User(host).on_terminal("vm", "console", "guest") as terminal:
        shown = terminal.read_until(guest.boot.encode(), ask=b"\nt1 ping\n")
        assert b"t1" in shown
        with User(host).on_terminal("vm", "console", "guest") as second:
            second.read_until(b"close the other console first")
            assert second.process.wait(30) == 4
        terminal.type(b"\x1d")
        assert terminal.process.wait(30) == 0
    guest.check(host)


def test_another_name_while_it_runs(guest: Bench) -> None:
    host = guest.owner()
    user = User(host)
    user("vm", "rename", "guest", "renamed")
    near = user.refused(ErrorCode.NOT_FOUND, 3, "vm", "show", "rename")
    assert "renamed" in near["advice"]
    user("vm", "rename", "renamed", "guest")
    guest.check(host)


def test_what_needs_a_stop_waits_for_the_next_start(guest: Bench) -> None:
    host = guest.owner()
    user = User(host)
    problem = user.refused(ErrorCode.WRONG_STATE, 4, "vm", "set", "guest", "--vcpus", "2")
    assert "vcpus" in problem["cause"] and "--when-off" in problem["advice"]
    user("vm", "set", "guest", "--vcpus", "2", "--when-off")
    user("vm", "set", "guest", "--notes", "at once")
    record = user("vm", "show", "guest")
    assert (record["config"]["vcpus"], record["config"]["notes"]) == (1, "at once")

    async def processors(serial: GuestSerial) -> int:
        return (await serial.mem()).cpus

    assert guest.ask(host, processors) == 1
    user("vm", "reset", "guest")  # a reset is no start: the machine stays what it is
    guest.begin_writing(host)
    assert guest.ask(host, processors) == 1
    user("vm", "turn-off", "guest")
    user("vm", "start", "guest")
    guest.begin_writing(host)
    assert guest.ask(host, processors) == 2
    assert user("vm", "show", "guest")["next_config"] is None
    assert user("vm", "show", "guest")["config"]["notes"] == "at once"


def test_deleted_with_its_disks_kept_unless_asked(guest: Bench) -> None:
    host = guest.owner()
    user = User(host)
    user.refused(ErrorCode.WRONG_STATE, 4, "vm", "delete", "guest", "--yes")
    user("vm", "turn-off", "guest")
    would = user("vm", "delete", "guest", "--dry-run")
    assert would["removed"] == [] and len(would["kept"]) == 3
    assert user("vm", "delete", "guest", "--yes")["kept"] == would["kept"]
    assert all((guest.shared / name).exists() for name in ("journal.qcow2", "second", "third"))

    user("vm", "create", "guest", "--disk", str(guest.shared / "journal.qcow2"), "--disk", str(guest.shared / "second"))
    assert sorted(user("vm", "delete", "guest", "--disks", "--yes")["removed"]) == [
        str(guest.shared / "journal.qcow2"),
        str(guest.shared / "second"),
    ]
    assert not (guest.shared / "journal.qcow2").exists() and (guest.shared / "third").exists()
    assert user("vm", "list") == [] and host.processes() == []
    assert not list((host.state_dir / "vms").glob("*")) and not list((host.run_dir / "vms").glob("*"))
