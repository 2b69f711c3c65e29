"""Running an outside program for storage: bounded in time, memory, processor time and output; dead when we are done.

Children are wrapped in `prlimit` and `setpriv` (util-linux, essential on Debian) instead of a preexec_fn, which may
deadlock in a process with threads. The parent-death signal makes sure that a killed daemon leaves no writer behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from hostler.model.errors import HostLacks, TimedOut
from hostler.storage.guard import Admitted

NOT_RUN = (126, 127)
"""How util-linux ends when it cannot execute a program: 127 not found, 126 otherwise (also when it was not found, and a
directory in PATH may not be searched)."""

MAX_OUTPUT = 1024 * 1024
"""Bytes kept of each stream; what comes after is read and dropped, so that the child never blocks on us."""

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a child may take at most; None: as much as it likes. Bytes and seconds (of processor time)."""

    memory: int | None = None
    cpu: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended. `status`: exit status, negative for a signal."""

    status: int
    out: str
    err: str


class Failed(Exception):
    """A program whose output was being read ended with an error; its user knows what that means."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        super().__init__(outcome.err)


async def run(
    argv: Sequence[str],
    subject: str,
    deadline: float | None,
    bounds: Bounds = Bounds(),
    on_text: OnText | None = None,
    as_user: Admitted | None = None,
) -> Outcome:
    """Run to the end. `subject` names in errors what it is about; `on_text` gets standard output as it comes.

    HostLacks if the program is missing, TimedOut after `deadline` seconds. The child is dead when this returns or
    raises, also on cancellation.
    """
    process = await _spawn(argv, bounds, as_user)
    try:
        async with asyncio.timeout(deadline):
            assert process.stdout is not None
            assert process.stderr is not None
            out, err, status = await asyncio.gather(
                _read(process.stdout, on_text), _read(process.stderr, None), process.wait()
            )
    except TimeoutError as error:
        raise TimedOut(subject, f"{argv[0]} took longer than {deadline:.0f} s", "look at the disk it is on") from error
    finally:
        await asyncio.shield(_end(process))
    if status in NOT_RUN and "failed to execute" in err:
        raise _lacks(argv[0])
    return Outcome(status, out, _said(err, as_user))


def _said(text: str, as_user: Admitted | None) -> str:
    return text if as_user is None else as_user.restored(text)


async def lines(
    argv: Sequence[str], subject: str, bounds: Bounds = Bounds(), as_user: Admitted | None = None
) -> AsyncGenerator[str, None]:
    """Its standard output, line by line as it is read; whoever stops reading ends it. At its end Failed when it did not
    succeed. A line has at most 64 KiB. Errors and guarantees as `run`; close the iterator (aclosing) to be sure."""
    process = await _spawn(argv, bounds, as_user)
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(_read(process.stderr, None))
    try:
        while line := await process.stdout.readline():
            yield line.decode("utf-8", "replace")
        status, err = await process.wait(), await errors
    except ValueError as error:
        raise Failed(Outcome(1, "", f"{argv[0]} wrote a line without an end")) from error
    finally:
        errors.cancel()
        await asyncio.gather(errors, return_exceptions=True)
        await asyncio.shield(_end(process))
    if status in NOT_RUN and "failed to execute" in err:
        raise _lacks(argv[0])
    if status:
        raise Failed(Outcome(status, "", _said(err, as_user)))


@asynccontextmanager
async def running(
    argv: Sequence[str], bounds: Bounds = Bounds(), as_user: Admitted | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The program while the block runs; dead afterwards."""
    process = await _spawn(argv, bounds, as_user)
    try:
        yield process
    finally:
        await asyncio.shield(_end(process))


async def _spawn(argv: Sequence[str], bounds: Bounds, as_user: Admitted | None = None) -> asyncio.subprocess.Process:
    wrapper = ["setpriv", "--pdeathsig", "KILL"]
    if as_user is not None:
        wrapper += ["--reuid", str(as_user.uid), "--regid", str(as_user.uid), "--clear-groups"]
        wrapper += ["--bounding-set=-all", "--no-new-privs"]
        argv = as_user.rewritten(argv)
    wrapper += ["prlimit", "--core=0"]
    if bounds.memory is not None:
        wrapper.append(f"--as={bounds.memory}")
    if bounds.cpu is not None:
        wrapper.append(f"--cpu={bounds.cpu}")
    try:
        return await asyncio.create_subprocess_exec(
            *wrapper,
            "--",
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=() if as_user is None else as_user.fds,
            # One heap for all threads: glibc reserves 64 MiB of address space for each further one, which is bounded.
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
        )
    except (FileNotFoundError, PermissionError) as error:
        raise _lacks("setpriv") from error


async def _read(stream: asyncio.StreamReader, on_text: OnText | None) -> str:
    kept = bytearray()
    while piece := await stream.read(65_536):
        if len(kept) < MAX_OUTPUT:
            kept += piece[: MAX_OUTPUT - len(kept)]
        if on_text is not None:
            on_text(piece.decode("utf-8", "replace"))
    return kept.decode("utf-8", "replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it if it still runs, and wait until it is gone: it must not write once its file was removed."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        # Also reads what is left in the pipes: asyncio lets go of a process only when they have ended.
        await process.communicate()


def _lacks(program: str) -> HostLacks:
    return HostLacks(
        f"program {program}", "is not installed on this host", "install it (Debian: qemu-utils, util-linux)"
    )
