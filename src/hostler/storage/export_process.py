"""The process of an export: started as the VM's user without a shell, found again, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hostler.model.errors import HostLacks, QemuFailed, TimedOut
from hostler.model.mark import Part, mark
from hostler.storage.programs import NOT_RUN
from hostler.storage.qmp import peer_pid

START = 30.0
"""Seconds a start may take. It forks when its sockets are there, and the first process ends then."""
GRACE = 10.0
"""Seconds after SIGTERM, in which it flushes its image, before SIGKILL."""
KILLED = 60.0
"""Seconds after SIGKILL; it takes long only where the disk hangs."""


_CHARDEV = "socket,id=control,path="
_SERVER = ",server=on,wait=off"


async def spawn(binary: str, control: str, nbd: str, pidfile: str, run_as: int | None) -> None:
    """Start one, with nothing exported yet; it answers on `control` when this returns. HostLacks, QemuFailed."""
    argv = [
        *_as_user(run_as, os.path.dirname(control)),
        binary,
        "--daemonize",
        "--pidfile",
        pidfile,
        "--chardev",
        control_option(control),
        "--monitor",
        "chardev=control,mode=control",
        "--nbd-server",
        # One client: the VM. A reconnecting one waits in the socket's queue until its old connection is gone.
        f"addr.type=unix,addr.path={_escape(nbd)},max-connections=1",
    ]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            umask=0o077,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )
    except (FileNotFoundError, PermissionError) as error:
        raise _lacks(argv[0]) from error
    output = await await_start(process, nbd, binary)
    if process.returncode != 0:
        if process.returncode in NOT_RUN and "failed to execute" in output:
            raise _lacks(binary)
        raise QemuFailed(f"export {nbd}", f"{binary} did not start: {output}", output=output)


async def await_start(process: asyncio.subprocess.Process, nbd: str, name: str) -> str:
    """Wait until a program that serves `nbd` has gone to the background, or failed (its return code says which); what
    it wrote, at most 4 KiB. TimedOut after START seconds; then it is dead, as when this is cancelled."""
    try:
        async with asyncio.timeout(START):
            _, err = await process.communicate()
    except TimeoutError as error:
        raise TimedOut(f"export {nbd}", f"{name} did not start within {START:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.communicate())
    return err.decode("utf-8", "replace").strip()[-4096:]


def control_option(control: str) -> str:
    """The option by which every export process is told of its control socket, and found again."""
    return _CHARDEV + _escape(control) + _SERVER


def _as_user(run_as: int | None, run_dir: str) -> list[str]:
    if run_as is None or os.geteuid() != 0:
        return []
    user = ["--reuid", str(run_as), "--regid", str(run_as), "--groups", str(mark(run_dir, Part.EXPORT))]
    return ["setpriv", *user, "--bounding-set=-all", "--no-new-privs", "--"]


def find_process(control: str) -> int | None:
    """The pid of the living process that listens on `control`; None when there is none."""
    pid = _listener(control)
    return pid if pid is not None and _is_ours(pid, control) else None


def find_all(run_dir: str) -> dict[int, str]:
    """Every export process of a run directory, with its control socket: also one whose socket was removed."""
    found = {pid: _control_of(pid, run_dir) for pid in _pids()}
    return {pid: control for pid, control in found.items() if control is not None}


def _listener(control: str) -> int | None:
    """Asked from the kernel, not from a file that the VM's user could write."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(control)
        except BlockingIOError:
            return _from_proc(control)  # its queue is full: it hangs
        except OSError:
            return _from_proc(control) if Path(control).exists() else None
        return peer_pid(probe)


def _from_proc(control: str) -> int | None:
    """By command line, for a process whose socket no longer answers."""
    return next((pid for pid in _pids() if _is_ours(pid, control)), None)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _is_ours(pid: int, control: str) -> bool:
    return _control_of(pid, os.path.dirname(control)) == control


def _control_of(pid: int, run_dir: str) -> str | None:
    """The control socket in that run directory which the process serves by its command line; None for any other.

    Everybody can start a program with such a command line: only processes of ours and of the directory's owner count.
    """
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--daemonize" not in arguments or _user(pid) not in (os.geteuid(), os.stat(run_dir).st_uid):
            return None
    except OSError:
        return None
    head, tail = os.fsencode(_CHARDEV + _escape(run_dir) + "/"), os.fsencode(_SERVER)
    found = next((a for a in arguments if a.startswith(head) and a.endswith(tail)), None)
    return None if found is None else f"{run_dir}/{os.fsdecode(found[len(head) : -len(tail)])}"


def _user(pid: int) -> int:
    """From its status; its directory in /proc may belong to root although the process does not."""
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    line = next(line for line in text.splitlines() if line.startswith("Uid:"))
    return int(line.split()[2])


async def terminate(pid: int, control: str) -> None:
    """End the process that `find_process` found for `control`, and wait until it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not _is_ours(pid, control):
            return  # gone, and its number taken by another one before we held it by the pidfd
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, KILLED)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            try:
                async with asyncio.timeout(patience):
                    await _gone(fd)
            except TimeoutError:
                continue
            return
    finally:
        os.close(fd)
    raise TimedOut(f"process {pid}", "does not end, although it was killed", "look at the disk it works on")


async def _gone(pidfd: int) -> None:
    """A pidfd becomes readable when its process has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)


def _escape(path: str) -> str:
    """A comma ends an option's value unless it is doubled."""
    return path.replace(",", ",,")


def _lacks(program: str) -> HostLacks:
    return HostLacks(f"program {program}", "is not installed on this host", "install it (Debian: qemu-utils)")
