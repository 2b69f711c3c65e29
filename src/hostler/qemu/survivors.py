"""Processes of a VM's user that hide: found by what the kernel says about them, never by what they say themselves.

A guest that broke out of QEMU may write over its command line, remove its pid file, fork a child and end. Then it must
neither outlive the VM nor be taken for none, or the next start makes a second writer. What cannot be faked is the user
(each VM has its own) and the mark that every process of a VM got when it was started (see hostler.model.mark).

Only where the daemon is root and the run directory belongs to a user of VMs; else there is nothing to go by, and
nothing is touched.
"""

from __future__ import annotations

import asyncio
import os
import resource
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from hostler.model.errors import HostlerError, TimedOut
from hostler.model.mark import Part, is_mark, mark
from hostler.model.vm import Process
from hostler.qemu import process
from hostler.qemu.access import UID_BASE, UID_SPAN

log = structlog.get_logger()

GRACE: Final = 10.0
"""Seconds they get to end by themselves: a storage daemon flushes its image, a TPM writes its state."""
ROUNDS: Final = 50
"""Looks for what was forked meanwhile. What was seen once can fork no more, so two are enough as a rule."""
_AGAIN: Final = 5.0
_SENDER: Final = 20.0
"""Seconds the sender of a signal may take; long, because the machine may be busy with what it is to kill."""


async def end_all(run_dir: str) -> None:
    """End every process of that VM's user but those that work in another run directory, and wait until they are gone.
    TimedOut when some are left all the same."""
    await _end(run_dir, everything=True)


async def end_machine(run_dir: str) -> bool:
    """The same for what QEMU left, exports not included; whether there was anything."""
    return await _end(run_dir, everything=False)


async def end_machine_surely(run_dir: str) -> None:
    """The same, and again until it has succeeded: as long as anything is left, the VM is not off."""
    while True:
        try:
            await _end(run_dir, everything=False)
        except HostlerError as error:
            log.error("vm.survivors-stay", run_dir=run_dir, why=str(error))
            await asyncio.sleep(_AGAIN)
        else:
            return


async def _end(run_dir: str, everything: bool) -> bool:
    uid = _vm_user(run_dir)
    if uid is None:
        return False
    first = seen = await _look(uid, run_dir, everything)
    if first.ours:
        log.info("vm.survivors", run_dir=run_dir, pids=[one.pid for one in first.ours])
        await _ask(first.ours)
    for _ in range(ROUNDS):
        swept = everything and not seen.others and await _sweep(uid, run_dir)
        seen = await _look(uid, run_dir, everything)
        if not seen.ours and (swept or seen.others or not everything):
            return bool(first.ours)
        for one in seen.ours:
            _no_children(one)
        await asyncio.gather(*(process.kill(one) for one in seen.ours))
    raise TimedOut(
        f"user {uid}",
        "starts processes quicker than they can be killed",
        "look at what runs as this user; restart the host if nothing else helps",
    )


def _vm_user(run_dir: str) -> int | None:
    """The user of the VM: whoever owns its run directory, which lies in one of root's, so that only root gives it away.
    None where that is no VM's own."""
    if os.geteuid() != 0:
        return None
    try:
        uid = os.lstat(run_dir).st_uid
    except OSError:
        return None
    return uid if UID_BASE <= uid < UID_BASE + UID_SPAN else None


@dataclass(frozen=True, slots=True)
class _Seen:
    """Living processes of one user: `ours` of this run directory, `others` (whether there are any) of another one."""

    ours: list[Process]
    others: bool


async def _look(uid: int, run_dir: str, everything: bool) -> _Seen:
    return await asyncio.to_thread(_look_now, uid, run_dir, everything)


def _look_now(uid: int, run_dir: str, everything: bool) -> _Seen:
    machine, export = (mark(run_dir, part) for part in (Part.MACHINE, Part.EXPORT))
    ours, others = [], False
    for pid, marks in _of_user(uid):
        if machine in marks or (everything and (export in marks or not marks)):
            started = process.first_tick(pid)
            ours += [] if started is None else [Process(pid=pid, started=started, run_dir=run_dir)]
        elif export not in marks and marks:
            others = True
    return _Seen(ours, others)


def _of_user(uid: int) -> Iterator[tuple[int, set[int]]]:
    """Pid and marks of the living processes that are this user's in any way."""
    for name in os.listdir("/proc"):
        fields = _status(name) if name.isdigit() else {}
        # One whose first thread has ended is a zombie by its state, and may well run on in its other threads.
        dead = fields.get("State", "X")[:1] in "ZX" and int(fields.get("Threads", "0")) < 2
        if not dead and str(uid) in fields["Uid"].split():
            yield int(name), {int(group) for group in fields["Groups"].split() if is_mark(int(group))}


def _status(pid: str) -> dict[str, str]:
    """Fields of /proc/PID/status (proc(5)); none of a process that is gone."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/status", "rb") as file:
        text = file.read().decode("utf-8", "replace")
        return {key: value.strip() for key, _, value in (line.partition(":") for line in text.split("\n"))}
    return {}


async def _sweep(uid: int, run_dir: str) -> bool:
    """Kill all of a user's processes in one system call, which none escapes by forking: kill(2) with pid -1, sent as
    this user, who has the right to signal nobody else. False when the sender was killed itself before."""
    prefix = process.as_user(uid, [mark(run_dir, Part.EXPORT)])
    shell = ["/bin/sh", "-c", f'test "$(id -u)" = {uid} && kill -s KILL -- -1']
    sender = await asyncio.create_subprocess_exec(
        *(*prefix, *shell), stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, cwd="/", env=process.ENVIRONMENT
    )
    try:
        async with asyncio.timeout(_SENDER):
            return await sender.wait() in (0, 1)  # 1: there was none
    except TimeoutError:
        return False
    finally:
        with suppress(ProcessLookupError):
            sender.kill()
        await asyncio.shield(sender.wait())


async def _ask(found: list[Process]) -> None:
    for one in found:
        process.ask_to_end(one)
    with suppress(TimeoutError):
        async with asyncio.timeout(GRACE):
            await asyncio.gather(*(process.wait_gone(one) for one in found))


def _no_children(one: Process) -> None:
    """It may fork no more, nor may the children it has just forked (setrlimit(2): both are inherited)."""
    with suppress(OSError):
        resource.prlimit(one.pid, resource.RLIMIT_NPROC, (0, 0))
