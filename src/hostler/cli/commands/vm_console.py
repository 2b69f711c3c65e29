"""`hostler vm console` and `hostler vm screenshot`."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from hostler.cli import options, output
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.model.errors import AlreadyExists, HostLacks, InvalidInput, NoSpace


@click.command("console", cls=Command)
@options.VM
@click.pass_obj
def console(settings: Settings, vm: str) -> None:
    """The serial port of a VM in this terminal. Ctrl-] leaves it."""
    from hostler.client.console import SerialConsole, bridge  # noqa: PLC0415 - websockets are slow to import

    read_fd, write_fd = sys.stdin.fileno(), sys.stdout.fileno()
    with SerialConsole(settings.client.transport.target, vm) as connected:
        if sys.stdin.isatty() and not settings.quiet:
            output.hint(f"connected to the serial port of vm {vm}; leave it with Ctrl-]")
        with raw_terminal(read_fd):
            text = bridge(connected, read_fd, write_fd)
    if not settings.quiet:
        output.hint(f"\n{text}")


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too; the terminal is as before afterwards. Nothing for a pipe."""
    if not os.isatty(fd):
        yield
        return
    import termios  # noqa: PLC0415
    import tty  # noqa: PLC0415

    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@click.command("screenshot", cls=Command)
@options.VM
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@click.pass_obj
def screenshot(settings: Settings, vm: str, file: str | None, force: bool) -> None:
    """The screen of a VM as a PNG file (default: VM.png; "-" is standard output)."""
    if file == "-" and sys.stdout.isatty():
        raise InvalidInput("standard output", "is a terminal, a picture would garble it", "redirect it, or name a file")
    path = Path(file or f"{vm}.png")
    if file != "-" and path.exists() and not force:
        raise AlreadyExists(f"file {path}", "exists", "name another one, or give --force")
    content = settings.client.raw(calls.vm_screenshot(vm))
    if file == "-":
        sys.stdout.buffer.write(content)
        return
    write_whole(path, content)
    output.say(settings, f"written to {path}")


def write_whole(path: Path, content: bytes) -> None:
    """The file appears complete or not at all. HostLacks when it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
            try:
                part.write(content)
                part.close()
                Path(part.name).chmod(0o666 & ~_umask())
                Path(part.name).replace(path)
            except BaseException:  # also Ctrl-C; raised again
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpace(f"file {path}", "the disk is full", "make room, or choose another place") from error
        raise HostLacks(f"file {path}", f"cannot be written: {error.strerror}", "choose another place") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
