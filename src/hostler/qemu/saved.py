"""A guest's whole state in a file: written while the guest is stopped, complete and on disk or not there at all.

The daemon opens the file and passes the descriptor, so QEMU needs no right to the directory and no helper program.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from hostler.model.errors import (
    BadImage,
    Cancelled,
    HostlerError,
    NoSpace,
    NotFound,
    NotPermitted,
    QemuFailed,
    TimedOut,
    WrongState,
)
from hostler.model.machine import MachineEvent, MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.qemu import commands
from hostler.qemu.migration import Migrator, go_on
from hostler.qemu.qmp import QmpSession
from hostler.removal import FEW, remove_tree

PARTIAL = ".partial"
"""Suffix of a saved state that is being written; one without a running save is a leftover."""

_FD = "saved-state"
_SLOWEST = 10 * 1024**2
"""Bytes per second below which reading a saved state counts as hanging."""


async def save_to(
    qmp: QmpSession, migrator: Migrator, path: str, on_progress: Callable[[MigrationProgress], None]
) -> MigrationResult:
    """Stop the guest, write its state to `path`; at return the file is complete and synced, the guest stopped.

    NoSpace, Cancelled, QemuFailed, ...: nothing of it is left, and the guest runs on if it ran before.
    """
    partial = path + PARTIAL
    async with AsyncExitStack() as undo:
        file = create(qmp.name, partial)
        undo.callback(remove_tree, partial, FEW)
        with os.fdopen(file, "wb", buffering=0):
            if await commands.query_status(qmp) is RunStatus.RUNNING:
                undo.push_async_callback(_run_again, qmp)
            await commands.stop(qmp)
            undo.push_async_callback(_close, qmp)
            result = await _write(qmp, migrator, file, path, on_progress)
            await asyncio.to_thread(sync_into_place, qmp.name, file, partial, path)
        undo.pop_all()
    return result


async def _write(
    qmp: QmpSession, migrator: Migrator, file: int, path: str, on_progress: Callable[[MigrationProgress], None]
) -> MigrationResult:
    await migrator.set_up({}, MigrationSettings())
    await commands.getfd(qmp, _FD, file)
    result = await migrator.send(lambda: commands.migrate(qmp, f"fd:{_FD}"), on_progress)
    if result.end is MigrationEnd.CANCELLED:
        raise Cancelled(qmp.name, "saving was cancelled")
    if result.end is MigrationEnd.FAILED:
        if os.strerror(errno.ENOSPC) in result.text:
            raise no_space(qmp.name, path)
        raise QemuFailed(qmp.name, f"QEMU could not save to {path}: {result.text}", path=path)
    return result


async def load_from(qmp: QmpSession, migrator: Migrator, path: str) -> None:
    """Read the state into a QEMU that waits for one; the guest is stopped afterwards.

    NotFound or NotPermitted for the file; WrongState when QEMU does not wait; BadImage when QEMU gave up over it (then
    it has ended). Nothing is removed.
    """
    status = await commands.query_status(qmp)
    if status is not RunStatus.INMIGRATE:
        raise WrongState(qmp.name, f"it is {status.value}, not waiting for a saved state", "start it for a restore")
    with os.fdopen(_open(qmp.name, path), "rb", buffering=0) as file:
        deadline = 60 + os.fstat(file.fileno()).st_size / _SLOWEST
        await migrator.set_up({"late-block-activate": True}, MigrationSettings())
        await commands.getfd(qmp, _FD, file.fileno())
        events = qmp.events()
        await commands.migrate_incoming(qmp, f"fd:{_FD}")
        event = await events.wait_for(_has_ended, deadline)
    if event is not None and event.data["status"] == "completed":
        return
    if event is None and not events.ended:
        raise TimedOut(qmp.name, f"QEMU did not read the saved state {path} within {deadline:.0f} s", path=path)
    raise BadImage(
        qmp.name,
        f"QEMU cannot read the saved state {path}",
        "it is damaged or of another configuration; discard it and start the VM afresh",
        path=path,
    )


def _has_ended(event: MachineEvent) -> bool:
    return event.name == "MIGRATION" and event.data.get("status") in ("completed", "failed")


async def _run_again(qmp: QmpSession) -> None:
    with suppress(HostlerError):
        await go_on(qmp)


async def _close(qmp: QmpSession) -> None:
    with suppress(HostlerError):
        await commands.closefd(qmp, _FD)


def create(name: str, path: str) -> int:
    """A new file to write. The directory belongs to the VM's user: what is there already, which may be a FIFO that
    blocks whoever opens it, is removed and not used."""
    remove_tree(path, FEW)
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _file_error(name, path, error) from error


def _open(name: str, path: str) -> int:
    """The file to read. Opened without waiting for a writer, in case that it is a FIFO."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _file_error(name, path, error) from error
    if stat.S_ISREG(os.fstat(file).st_mode):
        os.set_blocking(file, True)
        return file
    os.close(file)
    raise BadImage(name, f"{path} is not a file", "discard the saved state and start the VM afresh", path=path)


def sync_into_place(name: str, file: int, partial: str, path: str) -> None:
    """A file that is complete gets onto the disk, then its own name."""
    try:
        os.fsync(file)
        os.rename(partial, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _file_error(name, path, error) from error


def _file_error(name: str, path: str, error: OSError) -> HostlerError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(name, path)
    if isinstance(error, FileNotFoundError):
        return NotFound(name, f"{path} does not exist", path=path)
    if isinstance(error, PermissionError):
        return NotPermitted(name, f"Hostler may not open {path}", "look at its owner and access rights", path=path)
    return QemuFailed(name, f"cannot use {path}: {error.strerror}", path=path)


def no_space(name: str, path: str) -> NoSpace:
    """No room for a state at that path."""
    folder = os.path.dirname(path)
    return NoSpace(name, f"no space is left in {folder} for its saved state", "free some space there", path=path)
