"""How simulated machines move and are saved: the states and results of the real thing, in a few turns of the loop."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from hostler.model.errors import (
    BadImage,
    Cancelled,
    HostlerError,
    NoSpace,
    NotFound,
    PeerUnreachable,
    QemuFailed,
    WrongState,
)
from hostler.model.machine import MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import MigrationMode, MigrationProgress, MigrationSettings
from hostler.testing.simulated_world import SimulatedQemu

OnProgress = Callable[[MigrationProgress], None]

BANDWIDTH = 1024**3
"""Bytes per second a simulated move takes where no limit is set; only counters show it."""


class _End(Exception):
    """A move ended before it was complete."""

    def __init__(self, end: MigrationEnd, text: str) -> None:
        self.end = end
        self.text = text


def listen(qemu: SimulatedQemu, settings: MigrationSettings, secret: str, host: str) -> str:
    """Listen; again with the new secret."""
    if qemu.status is not RunStatus.INMIGRATE:
        raise QemuFailed(qemu.name, "QEMU refused migrate-incoming: '-incoming' was not specified on the command line")
    if qemu.address is None:
        qemu.address = qemu.world.next_address(host)
        qemu.set_progress(status="setup")
        qemu.world.wire[qemu.address] = qemu
    qemu.secret = secret if settings.encrypted else ""
    return qemu.address


async def migrate(
    qemu: SimulatedQemu, address: str, settings: MigrationSettings, secret: str, on_progress: OnProgress
) -> MigrationResult:
    """Send the guest over the wire. The other side has it at the end, stopped and with no lock."""
    target = qemu.world.wire.get(address)
    _refuse_second(qemu)
    if target is None:
        raise PeerUnreachable(qemu.name, f"cannot connect to the other host's QEMU at {address}: Connection refused")
    was_running = qemu.status is RunStatus.RUNNING
    if settings.mode is MigrationMode.QUICK:
        qemu.stop()
    try:
        _start(qemu)
        if target.secret != (secret if settings.encrypted else ""):
            raise _End(MigrationEnd.FAILED, "TLS handshake failed: The TLS connection was non-properly terminated.")
        target.set_progress(status="active")
        await _pump(qemu, on_progress, lambda: target.alive)
        qemu.stop(RunStatus.FINISH_MIGRATE)
    except _End as end:
        return _broken_off(qemu, target, was_running, end)
    except asyncio.CancelledError:
        _broken_off(qemu, target, was_running, _End(MigrationEnd.CANCELLED, ""))
        raise
    except QemuFailed:
        target.die("load of migration failed: Input/output error")
        raise
    _arrive(target)
    return _complete(qemu)


async def save(qemu: SimulatedQemu, path: str, on_progress: OnProgress) -> MigrationResult:
    """Write a small file that stands for the state."""
    _refuse_second(qemu)
    was_running = qemu.status is RunStatus.RUNNING
    partial = Path(f"{path}.partial")
    try:
        content = json.dumps({"simulated": qemu.spec.config.id})
        partial.write_text(content)
        qemu.stop()
        _start(qemu)
        await _pump(qemu, on_progress, lambda: True)
        partial.replace(path)
    except (OSError, _End, QemuFailed, asyncio.CancelledError) as error:
        with suppress(OSError):
            partial.unlink()
        _carry_on(qemu, was_running)
        if isinstance(error, QemuFailed | asyncio.CancelledError):
            raise
        raise _save_error(qemu, path, error) from None
    return _complete(qemu)


async def checkpoint(
    qemu: SimulatedQemu, path: str, at_stop: Callable[[], Awaitable[None]], on_progress: OnProgress
) -> MigrationResult:
    """As `save`, but the guest is stopped at the end only, and goes on."""
    if qemu.status is not RunStatus.RUNNING:
        raise WrongState(qemu.name, "its guest is not running", "resume it first")
    _refuse_second(qemu)
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps({"simulated": qemu.spec.config.id}))
        _start(qemu)
        await _pump(qemu, on_progress, lambda: True)
        qemu.stop()
        qemu.set_progress(status="pre-switchover")
        await at_stop()
        result = _complete(qemu)
        partial.replace(path)
    except (OSError, _End, HostlerError, asyncio.CancelledError) as error:
        with suppress(OSError):
            partial.unlink()
        _carry_on(qemu, True)
        if isinstance(error, HostlerError | asyncio.CancelledError):
            raise
        raise _save_error(qemu, path, error) from None
    qemu.run()
    return result


def _carry_on(qemu: SimulatedQemu, run: bool) -> None:
    """After a save that did not happen."""
    if qemu.alive and qemu.progress.status not in ("none", "completed"):
        qemu.set_progress(status="cancelled")
    if run and qemu.alive:
        qemu.run()


def load(qemu: SimulatedQemu, path: str) -> None:
    """Read it back."""
    if qemu.status is not RunStatus.INMIGRATE:
        raise WrongState(qemu.name, f"it is {qemu.status.value}, not waiting for a saved state")
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise NotFound(qemu.name, f"{path} does not exist", path=path) from None
    except (ValueError, OSError):
        content = {}
    if content != {"simulated": qemu.spec.config.id}:
        qemu.die("load of migration failed: Invalid argument")
        raise BadImage(qemu.name, f"QEMU cannot read the saved state {path}", path=path)
    _arrive(qemu)


def _refuse_second(qemu: SimulatedQemu) -> None:
    if qemu.progress.status in ("setup", "active", "cancelling"):
        raise QemuFailed(qemu.name, "QEMU refused migrate-set-capabilities: There's a migration process in progress")


def _start(qemu: SimulatedQemu) -> None:
    qemu.progress = MigrationProgress(total=qemu.spec.config.memory)
    qemu.set_progress(status="setup")


async def _pump(qemu: SimulatedQemu, on_progress: OnProgress, other_side: Callable[[], bool]) -> None:
    total = qemu.spec.config.memory
    qemu.set_progress(status="active", rate=BANDWIDTH, remaining=total, rounds=1)
    for step in range(1, qemu.move_steps + 1):
        await asyncio.sleep(0)
        if not qemu.alive:
            raise QemuFailed(qemu.name, "QEMU ended during the migration", gone=True)
        if qemu.progress.status == "cancelling":
            raise _End(MigrationEnd.CANCELLED, "")
        if not other_side():
            raise _End(MigrationEnd.FAILED, "Unable to write to socket: Broken pipe")
        done = total * step // qemu.move_steps
        qemu.set_progress(transferred=done, remaining=total - done, expected_pause=20)
        on_progress(qemu.progress)


def _broken_off(qemu: SimulatedQemu, target: SimulatedQemu, was_running: bool, end: _End) -> MigrationResult:
    """The guest runs on here; the other side ends itself once anything had reached it."""
    qemu.set_progress(status=end.end.value)
    if target.progress.status == "active":
        target.die("load of migration failed: Input/output error")
    if was_running:
        qemu.run()
    return MigrationResult(end=end.end, text=end.text, transferred=qemu.progress.transferred)


def _arrive(qemu: SimulatedQemu) -> None:
    qemu.status = RunStatus.PAUSED
    qemu.loaded = True
    qemu.set_progress(status="completed")
    if qemu.address is not None:
        qemu.world.wire.pop(qemu.address, None)


def _complete(qemu: SimulatedQemu) -> MigrationResult:
    qemu.deactivate()
    qemu.status = RunStatus.POSTMIGRATE
    total = qemu.spec.config.memory
    qemu.set_progress(status="completed", transferred=total, remaining=0, downtime=20)
    return MigrationResult(
        end=MigrationEnd.COMPLETED, downtime=20, total_time=1000 * total // BANDWIDTH, transferred=total
    )


def _save_error(qemu: SimulatedQemu, path: str, error: OSError | _End) -> Exception:
    if isinstance(error, _End):
        return Cancelled(qemu.name, "saving was cancelled")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(qemu.name, f"no space is left in {os.path.dirname(path)} for its saved state", path=path)
    if isinstance(error, FileNotFoundError):
        return NotFound(qemu.name, f"{path} does not exist", path=path)
    return QemuFailed(qemu.name, f"cannot use {path}: {error.strerror}", path=path)
