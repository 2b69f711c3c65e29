"""A guest's whole state in a file while it runs: it is stopped for its last pages only, and goes on.

    guest runs --memory is written, round after round--> few pages are left: QEMU stops it, and waits
       --(whatever must be of that moment is done: the disks get their new layers)--> the rest is written
       --> guest runs;  the file is synced and gets its name

QEMU's `pause-before-switchover` is what makes memory and disks one moment: it stops the guest, with all its I/O done,
before it gives its images up and writes the state of the devices.

Why not QEMU's `background-snapshot`, which stops the guest even shorter: it needs userfaultfd with write protection,
which Linux gives to root only (vm.unprivileged_userfaultfd), and a VM's QEMU is not root.

Facts of QEMU 7.2 this rests on: the images, given up at the end, are taken again by `cont`; a second transfer from a
QEMU that was not continued in between ends it with an assertion, hence a paused guest is not taken.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

from hostler.model.errors import Cancelled, HostlerError, QemuFailed, WrongState
from hostler.model.machine import MigrationEnd, MigrationResult, RunStatus
from hostler.model.migration import MigrationProgress, MigrationSettings
from hostler.qemu import commands, saved
from hostler.qemu.migration import Migrator, go_on
from hostler.qemu.qmp import QmpSession
from hostler.removal import FEW, remove_tree

ROUNDS = 5
"""Rounds over the memory after which what is left is written while the guest stands still: one that writes faster than
the storage takes would never be done."""
AT_ONCE = 2_000_000
"""Milliseconds of `downtime-limit` that make QEMU stop the guest now; the most it takes."""
_FD = "checkpoint"

AtStop = Callable[[], Awaitable[None]]


async def checkpoint_to(
    qmp: QmpSession, migrator: Migrator, path: str, at_stop: AtStop, on_progress: Callable[[MigrationProgress], None]
) -> MigrationResult:
    """See `Machine.save_to`, with `at_stop`."""
    if await commands.query_status(qmp) is not RunStatus.RUNNING:
        raise WrongState(qmp.name, "its guest is not running", "resume it first")
    partial = path + saved.PARTIAL
    async with AsyncExitStack() as undo:
        file = saved.create(qmp.name, partial)
        undo.callback(remove_tree, partial, FEW)
        with os.fdopen(file, "wb", buffering=0):
            undo.push_async_callback(_close, qmp)
            try:
                result = await _write(qmp, migrator, file, at_stop, on_progress)
            finally:
                await asyncio.shield(_run_again(qmp))
            _refuse(qmp, result, path)
            await asyncio.to_thread(saved.sync_into_place, qmp.name, file, partial, path)
        undo.pop_all()
    return result


async def _write(
    qmp: QmpSession,
    migrator: Migrator,
    file: int,
    at_stop: AtStop,
    on_progress: Callable[[MigrationProgress], None],
) -> MigrationResult:
    await migrator.set_up({"pause-before-switchover": True}, MigrationSettings())
    await commands.getfd(qmp, _FD, file)
    forced = False

    async def look(progress: MigrationProgress) -> None:
        nonlocal forced
        on_progress(progress)
        if progress.rounds > ROUNDS and not forced:
            forced = True
            await commands.migrate_set_parameters(qmp, {"downtime-limit": AT_ONCE})

    async def switch() -> None:
        await at_stop()
        await commands.migrate_continue(qmp)

    return await migrator.send_with_stop(lambda: commands.migrate(qmp, f"fd:{_FD}"), look, switch)


def _refuse(qmp: QmpSession, result: MigrationResult, path: str) -> None:
    if result.end is MigrationEnd.CANCELLED:
        raise Cancelled(qmp.name, "writing its memory was cancelled")
    if result.end is MigrationEnd.FAILED:
        if os.strerror(errno.ENOSPC) in result.text:
            raise saved.no_space(qmp.name, path)
        raise QemuFailed(qmp.name, f"QEMU could not write its memory to {path}: {result.text}", path=path)


async def _run_again(qmp: QmpSession) -> None:
    with suppress(HostlerError):  # it is gone, or its images are: the actor sees how it is
        await go_on(qmp)


async def _close(qmp: QmpSession) -> None:
    with suppress(HostlerError):
        await commands.closefd(qmp, _FD)
