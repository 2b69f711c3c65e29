"""Starting, stopping and standing still: `hostler vm start`, `shutdown`, `pause`, `save`, ..."""

from __future__ import annotations

import click

from hostler.cli import options, output, parsing
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.cli.waiting import run_job
from hostler.client import calls


def _act(settings: Settings, vm: str, action: str, wait: bool, done: str) -> int:
    return run_job(settings, calls.vm_act(vm, action), wait=wait, done=f"vm {vm} {done}")


@click.command("start", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def start(settings: Settings, vm: str, wait: bool) -> int:
    """Start a VM that is off."""
    return _act(settings, vm, "start", wait, "is running")


@click.command("pause", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def pause(settings: Settings, vm: str, wait: bool) -> int:
    """Stop the processors of a VM; its memory stays."""
    return _act(settings, vm, "pause", wait, "is paused")


@click.command("resume", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def resume(settings: Settings, vm: str, wait: bool) -> int:
    """Let a paused VM go on."""
    return _act(settings, vm, "resume", wait, "is running")


@click.command("save", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def save(settings: Settings, vm: str, wait: bool) -> int:
    """Write the whole state of a VM to disk and end its process."""
    return _act(settings, vm, "save", wait, "is saved")


@click.command("restore", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def restore(settings: Settings, vm: str, wait: bool) -> int:
    """Let a saved VM go on where it was."""
    return _act(settings, vm, "restore", wait, "is running")


@click.command("discard-saved", cls=Command)
@options.VM
@options.WAIT
@options.YES
@click.pass_obj
def discard_saved(settings: Settings, vm: str, wait: bool, yes: bool) -> int:
    """Throw a saved state away, as if the power had failed; the VM is off."""
    output.confirm(f"Throw away the saved state of vm {vm}?", yes)
    return _act(settings, vm, "discard-saved", wait, "is off")


@click.command("turn-off", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def turn_off(settings: Settings, vm: str, wait: bool) -> int:
    """Pull the plug. The guest is not asked; see shutdown."""
    return _act(settings, vm, "turn-off", wait, "is off")


@click.command("reset", cls=Command)
@options.VM
@options.WAIT
@click.pass_obj
def reset(settings: Settings, vm: str, wait: bool) -> int:
    """Press the reset button. The guest is not asked."""
    return _act(settings, vm, "reset", wait, "was reset")


@click.command("shutdown", cls=Command)
@options.VM
@click.option("--timeout", type=click.IntRange(1, 86_400), metavar="SECONDS", help="How long the guest may take.")
@click.option(
    "--then",
    type=click.Choice(["turn-off", "leave"]),
    help="What happens when it takes longer (default: the vm's own).",
)
@options.WAIT
@click.pass_obj
def shutdown(settings: Settings, vm: str, timeout: int | None, then: str | None, wait: bool) -> int:
    """Ask the guest to shut down."""
    from hostler.model.requests import ShutdownRequest  # noqa: PLC0415

    request = parsing.request(ShutdownRequest, f"shutdown of vm {vm}", timeout=timeout, then=then)
    return run_job(settings, calls.vm_shutdown(vm, request), wait=wait, done=f"vm {vm} is off")
