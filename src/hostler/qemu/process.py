"""The process of a QEMU (or of its swtpm): started so that it outlives the daemon, found again, waited for, killed.

- Own session, own log file, no inherited descriptor, working directory `/`, umask 077: nothing ties it to us.
- The user is changed by setpriv(1) in the child instead of by us before exec: a fork that changes users cannot be a
  vfork, and copying the page tables of a 150 MB daemon costs 6 ms (measured), setpriv costs 1.5 ms.
- A process is known by pid and start time together, and acted on through a pidfd, so that a reused pid is never
  mistaken for it. It is found by an exact argument of its command line, which holds also when the daemon died between
  starting it and recording it.
- Its end is waited for on the pidfd: works for processes that are not our children (adopted ones) and needs no polling.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from hostler.model.errors import HostLacks, NotPermitted, TimedOut
from hostler.model.mark import Part, mark
from hostler.model.vm import Process
from hostler.qemu.paths import RunDir

LAST_OUTPUT: Final = 4096
"""Bytes of the log that are read back; the log itself is QEMU's and may have grown to any size."""

_KILL_DEADLINE: Final = 20.0
_LOOKS, _LOOK_AGAIN = 20, 0.001
"""Looks at a process in the middle of execve(2), and seconds between them; it takes microseconds as a rule."""
"""Seconds a killed process may take to go: long, because freeing a large memory takes time on a loaded machine."""

_FILES: Final = 16_384
"""Descriptors a QEMU may have open."""

ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def spawn(
    argv: Sequence[str],
    run_dir: str,
    log: str,
    uid: int | None = None,
    group: int | None = None,
    fds: Sequence[int] = (),
) -> Process:
    """Start a program detached from us; returns once it is on its way (a fifth of a millisecond).

    `uid`: run as this user (group of the same number, beside it `group` and the VM's mark); None: as ourselves.
    `fds`: descriptors it inherits under the same numbers. Output goes to the file `log`, made anew. HostLacks when the
    program is not there; what happens after exec shows in the log and in `wait_gone`.
    """
    program = shutil.which(argv[0], path=ENVIRONMENT["PATH"])
    if program is None:
        raise HostLacks(f"program {argv[0]}", "is not installed on this host", "install it and try again")
    output = _new_log(log)
    try:
        child = subprocess.Popen(
            [*as_user(uid, [group, mark(run_dir, Part.MACHINE)]), program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=fds,
            start_new_session=True,
            cwd="/",
            umask=0o077,
            env=ENVIRONMENT,
        )
    except OSError as error:
        raise HostLacks(
            f"program {program}", f"cannot be started: {error.strerror}", "check its permissions"
        ) from error
    finally:
        os.close(output)
    # From here on the pid is watched and reaped through its pidfd; Popen must neither wait for it nor warn about it.
    child.returncode = 0
    _allow_files(child.pid)
    # Until it is reaped the pid is its own, so its start time can be read also when it is dead already.
    return Process(pid=child.pid, started=first_tick(child.pid) or 0, run_dir=run_dir)


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which the process started (proc(5), stat field 22); None when there is no such process
    or when it is dead and only waits to be reaped."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def first_tick(pid: int) -> int | None:
    """The same for the dead too, as long as they are not reaped. A process whose first thread has ended shows as dead
    though the others run on."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def is_alive(process: Process) -> bool:
    """Whether it is still running; harmless for reused pids and for the dead."""
    return start_time(process.pid) == process.started


def find(run_dir: str) -> Process | None:
    """The QEMU of a run directory, whoever started it."""
    return find_by_arguments(("-pidfile", RunDir(run_dir).pid), run_dir, RunDir(run_dir).pid)


def find_by_arguments(arguments: Sequence[str], run_dir: str, pid_file: str) -> Process | None:
    """The running process with these consecutive arguments: the one its pid file names when that is it, else by
    looking at all of them (a killed daemon may leave a QEMU that has not written its pid file yet).

    Anybody can start a program with such arguments, so only our own processes and those of the owner of the run
    directory count: others could keep a VM from starting."""
    hint = _read_pid(pid_file)
    candidates = ([hint] if hint else []) + [int(name) for name in os.listdir("/proc") if name.isdigit()]
    wanted = "\0".join(["", *arguments, ""]).encode()
    trusted = _trusted_users(run_dir)
    for pid in candidates:
        started = start_time(pid) if wanted in _settled_line(pid) and _is_of(pid, trusted) else None
        if started is not None and pid != os.getpid():
            return Process(pid=pid, started=started, run_dir=run_dir)
    return None


def _settled_line(pid: int) -> bytes:
    """Its command line. One that is just executing another program shows an empty one for a moment, as kernel threads
    always do; those have no program."""
    for _ in range(_LOOKS):
        line = _command_line(pid)
        if line or not _has_program(pid):
            return line
        time.sleep(_LOOK_AGAIN)
    return b""


def _has_program(pid: int) -> bool:
    try:
        return bool(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


async def wait_gone(process: Process) -> None:
    """Return when the process has ended (at once when it is gone already). Our own children are reaped."""
    with _pidfd(process) as fd:
        if fd is None:
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(fd, lambda: None if ended.done() else ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(fd)
        _reap(fd)


async def kill(process: Process, deadline: float = _KILL_DEADLINE) -> None:
    """End it at once and wait until it is gone. Harmless when it is. TimedOut when it hangs in the kernel (its
    storage does not answer): then it may still hold its files."""
    with _pidfd(process) as fd:
        if fd is not None:
            _step_back(process.pid)
            _signal(fd, process, signal.SIGKILL)
    try:
        async with asyncio.timeout(deadline):
            await wait_gone(process)
    except TimeoutError as error:
        raise TimedOut(
            f"process {process.pid}",
            f"was killed but is still there after {deadline:g} s, most likely waiting for storage that does not answer",
            "look at its state in /proc and at the storage it uses",
        ) from error


def ask_to_end(process: Process) -> None:
    """Send it SIGTERM. Harmless when it is gone."""
    with _pidfd(process) as fd:
        if fd is not None:
            _signal(fd, process, signal.SIGTERM)


def _step_back(pid: int) -> None:
    """Give way to everybody: giving back a guest's memory takes a processor for a tenth of a second per GiB, just when
    the same guest begins to run elsewhere, perhaps on this machine."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)


def last_output(run_dir: str) -> str:
    """What the QEMU of a run directory wrote last, at most 4 KiB; "" when nothing is known."""
    return tail(RunDir(run_dir).log)


def tail(path: str) -> str:
    """The last 4 KiB of a log. The directory belongs to the VM's user, so links and pipes in it are not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return ""
        file.seek(max(0, status.st_size - LAST_OUTPUT))
        return file.read(LAST_OUTPUT).decode("utf-8", "replace").strip()


def _allow_files(pid: int) -> None:
    """Services get 1,024 descriptors unless they ask for more; a VM with 4 x 64 disks and their locks comes near."""
    with suppress(OSError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, hard))


def as_user(uid: int | None, groups: Sequence[int | None]) -> list[str]:
    """The prefix that gives up every right for good. Empty where we are that user already."""
    if uid is None or uid == os.geteuid():
        return []
    beside = ",".join(str(group) for group in groups if group is not None)
    rights = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    setpriv = shutil.which("setpriv", path=ENVIRONMENT["PATH"])
    if setpriv is None:
        raise HostLacks("program setpriv", "is not installed on this host", "install the package util-linux")
    return [setpriv, f"--reuid={uid}", f"--regid={uid}", f"--groups={beside}", *rights, "--"]


def _new_log(path: str) -> int:
    """A fresh log, readable by us only. Removing the old one first means that a link planted there is not followed;
    O_APPEND lets an operator truncate it while QEMU writes."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state (field 3) on; the name before it may contain anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read().decode("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _trusted_users(run_dir: str) -> frozenset[int] | None:
    """Who may run the QEMU of a run directory; None (anybody) when the directory is gone: better to find too much than
    to start a second writer."""
    try:
        return frozenset({os.geteuid(), os.stat(run_dir).st_uid})
    except OSError:
        return None


def _is_of(pid: int, users: frozenset[int] | None) -> bool:
    try:
        return users is None or os.stat(f"/proc/{pid}").st_uid in users
    except OSError:
        return False


def _read_pid(path: str) -> int | None:
    text = tail(path)
    return int(text) if text.isdecimal() and len(text) < 10 else None


@contextmanager
def _pidfd(process: Process) -> Iterator[int | None]:
    """A handle on exactly this process; None when it is gone. The start time is compared after opening: from then on
    the pid cannot be reused unnoticed."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd if first_tick(process.pid) == process.started else None
    finally:
        os.close(fd)


def _signal(fd: int, process: Process, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise NotPermitted(
            f"process {process.pid}", "belongs to another user, so it cannot be stopped", "run the daemon as root"
        ) from error


def _reap(fd: int) -> None:
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
