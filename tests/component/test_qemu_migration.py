"""Moves between two real QEMUs, and states saved to files. Whatever fails, the guest runs on where it was."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hostler.model.disk import Disk
from hostler.model.errors import (
    BadImage,
    Cancelled,
    HostlerError,
    InUse,
    NoSpace,
    NotFound,
    PeerUnreachable,
    QemuFailed,
    WrongState,
)
from hostler.model.machine import MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import MigrationMode, MigrationProgress, MigrationSettings
from hostler.qemu import migration, psk
from hostler.qemu.machine import QemuMachine
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component

PLAIN = MigrationSettings(encrypted=False)
SLOW = MigrationSettings(bandwidth=200_000)
"""Slow enough that a move is still under way after any number of steps of a test."""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as made:
        yield made


@pytest.fixture
async def disk(rig: Rig) -> Disk:
    return await rig.disk("data")


def ignore(_progress: MigrationProgress) -> None:
    """For moves nobody watches."""


def locked(disk: Disk) -> bool:
    """Whether somebody has the image open for writing."""
    opened = subprocess.run(["qemu-io", "-f", "raw", "-c", "q", disk.source.path], capture_output=True, check=False)
    return opened.returncode != 0


async def target(rig: Rig, place: str, settings: MigrationSettings, secret: str, disk: Disk) -> tuple[QemuMachine, str]:
    """A machine that listens, and where."""
    machine = await rig.launch(rig.spec(place, incoming=True, disks=(disk,)))
    return machine, await machine.listen(settings, secret, "127.0.0.1")


async def move(
    rig: Rig, source: QemuMachine, place: str, disk: Disk, settings: MigrationSettings
) -> tuple[QemuMachine, MigrationResult]:
    secret = secrets.token_hex(32)
    machine, address = await target(rig, place, settings, secret, disk)
    result = await source.migrate_to(address, settings, secret, ignore)
    return machine, result


async def runs_and_can_still_move(rig: Rig, source: QemuMachine, disk: Disk) -> None:
    """What must hold after each move that did not happen."""
    assert await source.status() is RunStatus.RUNNING
    assert locked(disk)
    assert no_keys(source)
    machine, result = await move(rig, source, "later", disk, MigrationSettings())
    assert result.end is MigrationEnd.COMPLETED
    await machine.run()
    assert await machine.status() is RunStatus.RUNNING


def no_keys(machine: QemuMachine) -> bool:
    return not list(Path(machine.process.run_dir).glob("psk-*"))


async def until_active(source: QemuMachine) -> None:
    """Return when bytes move."""
    async with asyncio.timeout(60):
        while (await source.migration_state()).transferred == 0:  # noqa: ASYNC110 - a counter of QEMU has no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "settings",
    [MigrationSettings(), PLAIN, MigrationSettings(streams=2), MigrationSettings(mode=MigrationMode.QUICK)],
    ids=["encrypted", "plain", "two streams", "quick"],
)
async def test_there_and_back_again(rig: Rig, disk: Disk, settings: MigrationSettings) -> None:
    machine = await rig.start("p0", disks=(disk,))
    for place in ("p1", "p2"):
        moved, result = await move(rig, machine, place, disk, settings)
        assert result.end is MigrationEnd.COMPLETED
        assert result.transferred > 0
        assert result.total_time is not None
        # The other side has everything, does not run, and holds no disk: the source could still take over again.
        assert await moved.loaded()
        assert await moved.status() is RunStatus.PAUSED
        assert not locked(disk)
        await moved.run()
        await moved.announce()
        assert await moved.status() is RunStatus.RUNNING
        assert locked(disk)
        with pytest.raises(InUse):
            await machine.run()
        assert no_keys(machine)
        assert no_keys(moved)
        await machine.quit()
        machine = moved


async def test_a_disk_attached_before_the_move_is_detached_after_it(rig: Rig, disk: Disk) -> None:
    machine = await rig.start("p0")
    await machine.attach_disk(disk)
    moved, result = await move(rig, machine, "p1", disk, MigrationSettings())
    assert result.end is MigrationEnd.COMPLETED
    await moved.run()
    await moved.detach_disk("data", 30)
    assert await moved.attached_disks() == frozenset()


async def test_after_a_completed_move_the_source_can_take_over_instead(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    moved, _ = await move(rig, source, "p1", disk, MigrationSettings())
    await source.run()
    assert await source.status() is RunStatus.RUNNING
    with pytest.raises(InUse):
        await moved.run()
    assert await moved.status() is not RunStatus.RUNNING
    await moved.quit()
    await runs_and_can_still_move(rig, source, disk)


async def test_a_paused_guest_moves_and_stays_paused(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    await source.stop()
    moved, result = await move(rig, source, "p1", disk, MigrationSettings())
    assert result.end is MigrationEnd.COMPLETED
    assert await moved.status() is RunStatus.PAUSED


@pytest.mark.parametrize("mode", list(MigrationMode))
async def test_cancelled_on_the_way(rig: Rig, disk: Disk, mode: MigrationMode) -> None:
    source = await rig.start("p0", disks=(disk,))
    settings = SLOW.but(mode=mode)
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", settings, secret, disk)
    seen: list[MigrationProgress] = []
    task = asyncio.create_task(source.migrate_to(address, settings, secret, seen.append))
    await until_active(source)
    await source.cancel_migration()
    assert (await task).end is MigrationEnd.CANCELLED
    assert {progress.status for progress in seen} <= {"setup", "active", "cancelling", "cancelled"}
    await moved.quit()
    await source.cancel_migration()  # harmless now
    await runs_and_can_still_move(rig, source, disk)


async def test_a_daemon_that_stops_does_not_leave_a_move_alone(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", SLOW, secret, disk)
    task = asyncio.create_task(source.migrate_to(address, SLOW, secret, ignore))
    await until_active(source)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await moved.quit()
    await runs_and_can_still_move(rig, source, disk)


@pytest.mark.parametrize("mode", list(MigrationMode))
async def test_the_target_is_killed_on_the_way(rig: Rig, disk: Disk, mode: MigrationMode) -> None:
    source = await rig.start("p0", disks=(disk,))
    settings = SLOW.but(mode=mode)
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", settings, secret, disk)
    task = asyncio.create_task(source.migrate_to(address, settings, secret, ignore))
    await until_active(source)
    os.kill(moved.process.pid, signal.SIGKILL)
    result = await task
    assert result.end is MigrationEnd.FAILED
    assert result.text
    await runs_and_can_still_move(rig, source, disk)


async def test_the_source_is_killed_on_the_way(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", SLOW, secret, disk)
    task = asyncio.create_task(source.migrate_to(address, SLOW, secret, ignore))
    await until_active(source)
    os.kill(source.process.pid, signal.SIGKILL)
    with pytest.raises(QemuFailed):
        await task
    # QEMU 7.2 ends itself when the stream breaks off, so nothing half-loaded can ever run.
    await moved.wait_gone()
    with pytest.raises(HostlerError):
        await moved.loaded()


@pytest.mark.parametrize(("settings", "status"), [(MigrationSettings(), "setup"), (PLAIN, "active")])
async def test_a_target_that_stands_still_is_given_up(
    rig: Rig, disk: Disk, settings: MigrationSettings, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen before the handshake; or, without one, once the guest has been stopped for the last round."""
    monkeypatch.setattr(migration, "STALL", 0.5)
    source = await rig.start("p0", disks=(disk,))
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", settings, secret, disk)
    os.kill(moved.process.pid, signal.SIGSTOP)
    seen: list[MigrationProgress] = []
    result = await source.migrate_to(address, settings, secret, seen.append)
    assert status in {progress.status for progress in seen}
    assert result.end is not MigrationEnd.COMPLETED
    assert "taken nothing" in result.text
    os.kill(moved.process.pid, signal.SIGKILL)
    monkeypatch.undo()
    await runs_and_can_still_move(rig, source, disk)


async def test_several_streams_to_a_target_that_stands_still(
    rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU itself would connect, wait in its main loop for ever, and its guest with it."""
    monkeypatch.setattr(migration, "CONNECT_DEADLINE", 0.5)
    source = await rig.start("p0", disks=(disk,))
    settings, secret = MigrationSettings(streams=2), secrets.token_hex(32)
    moved, address = await target(rig, "p1", settings, secret, disk)
    os.kill(moved.process.pid, signal.SIGSTOP)
    with pytest.raises(PeerUnreachable, match="does not react"):
        await source.migrate_to(address, settings, secret, ignore)
    assert await source.status() is RunStatus.RUNNING
    os.kill(moved.process.pid, signal.SIGCONT)
    monkeypatch.undo()
    result = await source.migrate_to(address, settings, secret, ignore)
    assert result.end is MigrationEnd.COMPLETED


async def test_a_wrong_secret_is_refused_and_does_not_disturb_the_target(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    secret = secrets.token_hex(32)
    moved, address = await target(rig, "p1", MigrationSettings(), secret, disk)
    result = await source.migrate_to(address, MigrationSettings(), secrets.token_hex(32), ignore)
    assert result.end is MigrationEnd.FAILED
    assert "TLS" in result.text
    assert await source.status() is RunStatus.RUNNING
    assert not await moved.loaded()
    # Nor does an unencrypted stream get in.
    result = await source.migrate_to(address, PLAIN, "", ignore)
    assert result.end is MigrationEnd.FAILED
    assert not await moved.loaded()
    result = await source.migrate_to(address, MigrationSettings(), secret, ignore)
    assert result.end is MigrationEnd.COMPLETED
    assert await moved.loaded()


async def test_listening_again_takes_the_new_secret(rig: Rig, disk: Disk) -> None:
    """A daemon that was killed after `listen` asks again."""
    source = await rig.start("p0", disks=(disk,))
    moved, address = await target(rig, "p1", MigrationSettings(), secrets.token_hex(32), disk)
    secret = secrets.token_hex(32)
    assert await moved.listen(MigrationSettings(), secret, "127.0.0.1") == address
    result = await source.migrate_to(address, MigrationSettings(), secret, ignore)
    assert result.end is MigrationEnd.COMPLETED


async def test_the_secret_is_nowhere_to_be_seen(rig: Rig, disk: Disk) -> None:
    secret = secrets.token_hex(32)
    moved, _ = await target(rig, "p1", MigrationSettings(), secret, disk)
    key = next(Path(moved.process.run_dir).glob("psk-*/keys.psk"))
    assert key.stat().st_mode & 0o777 == 0o400
    assert key.parent.stat().st_mode & 0o777 == 0o700
    assert secret.encode() not in Path(f"/proc/{moved.process.pid}/cmdline").read_bytes()
    assert secret not in Path(f"{moved.process.run_dir}/qemu.log").read_text()
    await rig.hypervisor.kill_leftovers("x", moved.process.run_dir)
    assert no_keys(moved)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a QEMU a user of its own")
async def test_a_qemu_with_its_own_user_reads_its_key_and_a_planted_link_is_not_followed(rig: Rig) -> None:
    source = await rig.start("p0", run_as=1_900_000_123)
    moved = await rig.launch(rig.spec("p1", incoming=True, run_as=1_900_000_123))
    victim = rig.path / "victim"
    victim.mkdir()
    (Path(moved.process.run_dir) / "psk-planted").symlink_to(victim)
    secret = secrets.token_hex(32)
    address = await moved.listen(MigrationSettings(), secret, "127.0.0.1")
    key = next(Path(moved.process.run_dir).glob("psk-*/keys.psk"))
    assert key.stat().st_uid == 1_900_000_123
    assert victim.is_dir()
    result = await source.migrate_to(address, MigrationSettings(), secret, ignore)
    assert result.end is MigrationEnd.COMPLETED
    await moved.run()


async def test_nobody_listens(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PeerUnreachable) as caught:
            await source.migrate_to(address, MigrationSettings(), "ab" * 32, ignore)
    assert address in caught.value.cause
    await runs_and_can_still_move(rig, source, disk)


async def test_a_second_move_at_the_same_time_is_refused_and_does_not_disturb_the_first(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    secret = secrets.token_hex(32)
    _, address = await target(rig, "p1", SLOW, secret, disk)
    task = asyncio.create_task(source.migrate_to(address, SLOW, secret, ignore))
    await until_active(source)
    with pytest.raises(QemuFailed):
        await source.migrate_to(address, SLOW, secret, ignore)
    with pytest.raises(QemuFailed):
        await source.save_to(str(rig.path / "state"), ignore)
    assert (await source.migration_state()).status == "active"
    assert await source.status() is RunStatus.RUNNING
    await source.cancel_migration()
    assert (await task).end is MigrationEnd.CANCELLED


# saved states


async def test_saved_and_restored(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    path = rig.path / "state"
    seen: list[MigrationProgress] = []
    result = await source.save_to(str(path), seen.append)
    assert result.end is MigrationEnd.COMPLETED
    assert path.stat().st_mode & 0o777 == 0o600
    assert not locked(disk)
    await source.quit()
    restored = await rig.launch(rig.spec("p1", incoming=True, disks=(disk,)))
    await restored.load_from(str(path))
    assert await restored.status() is RunStatus.PAUSED
    assert not locked(disk)
    await restored.run()
    assert await restored.status() is RunStatus.RUNNING
    assert locked(disk)
    await runs_and_can_still_move(rig, restored, disk)


async def test_a_saved_guest_can_run_on_here(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    for name in ("one", "one", "two"):
        await source.save_to(str(rig.path / name), ignore)
        await source.run()
    await runs_and_can_still_move(rig, source, disk)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")
async def test_a_full_disk_while_saving(rig: Rig, disk: Disk) -> None:
    small = rig.path / "small"
    small.mkdir()
    mounted = await asyncio.to_thread(
        subprocess.run,
        ["mount", "-t", "tmpfs", "-o", "size=256k", "small", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        source = await rig.start("p0", disks=(disk,))
        with pytest.raises(NoSpace) as caught:
            await source.save_to(str(small / "state"), ignore)
        assert str(small) in caught.value.cause
        assert list(small.iterdir()) == []
        await runs_and_can_still_move(rig, source, disk)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", str(small)], check=True)


async def test_a_device_that_is_full(rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for everyone: the file that is saved to is /dev/full."""
    partial, really = rig.path / "state.partial", os.open

    def full(path: str, *how: Any, **where: Any) -> int:
        opened = really(path, *how, **where)
        if path == str(partial):
            device = really("/dev/full", os.O_WRONLY)
            os.dup2(device, opened)
            os.close(device)
        return opened

    monkeypatch.setattr(os, "open", full)
    source = await rig.start("p0", disks=(disk,))
    with pytest.raises(NoSpace):
        await source.save_to(str(rig.path / "state"), ignore)
    assert not partial.exists()
    await runs_and_can_still_move(rig, source, disk)


async def test_saving_is_cancelled(rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "UNLIMITED", 100_000)
    source = await rig.start("p0", disks=(disk,))
    task = asyncio.create_task(source.save_to(str(rig.path / "state"), ignore))
    await until_active(source)
    assert await source.status() is not RunStatus.RUNNING
    await source.cancel_migration()
    with pytest.raises(Cancelled):
        await task
    assert not list(rig.path.glob("state*"))
    monkeypatch.undo()
    await runs_and_can_still_move(rig, source, disk)


async def test_qemu_is_killed_while_saving(rig: Rig, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "UNLIMITED", 100_000)
    source = await rig.start("p0", disks=(disk,))
    task = asyncio.create_task(source.save_to(str(rig.path / "state"), ignore))
    await until_active(source)
    os.kill(source.process.pid, signal.SIGKILL)
    with pytest.raises(QemuFailed):
        await task
    assert not list(rig.path.glob("state*"))


async def test_saving_to_nowhere_does_not_stop_the_guest(rig: Rig, disk: Disk) -> None:
    source = await rig.start("p0", disks=(disk,))
    with pytest.raises(NotFound):
        await source.save_to(str(rig.path / "none" / "state"), ignore)
    assert await source.status() is RunStatus.RUNNING


@pytest.mark.parametrize("damage", ["empty", "text", "half"])
async def test_a_damaged_state_is_refused(rig: Rig, disk: Disk, damage: str) -> None:
    path = rig.path / "state"
    source = await rig.start("p0", disks=(disk,))
    await source.save_to(str(path), ignore)
    await source.quit()
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no state\n" * 1000, "half": content[: len(content) // 2]}[damage])
    restored = await rig.launch(rig.spec("p1", incoming=True, disks=(disk,)))
    with pytest.raises(BadImage) as caught:
        await restored.load_from(str(path))
    assert str(path) in caught.value.cause
    with suppress(HostlerError):
        assert await restored.status() is not RunStatus.RUNNING
    await restored.quit()
    assert path.exists()


async def test_a_state_needs_a_machine_that_waits_for_it(rig: Rig) -> None:
    source = await rig.start("p0")
    with pytest.raises(WrongState):
        await source.load_from(str(rig.path / "state"))
    waiting = await rig.launch(rig.spec("p1", incoming=True))
    with pytest.raises(NotFound):
        await waiting.load_from(str(rig.path / "state"))
    assert psk.USERNAME
