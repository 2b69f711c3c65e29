"""The group `hostler checkpoint`."""

from __future__ import annotations

from typing import Any

import click

from hostler.cli import checkpoint_views, completing, options, output, parsing
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.cli.waiting import run_job
from hostler.client import calls
from hostler.model.errors import InvalidInput

NAMES = ("create", "list", "show", "apply", "delete", "rename")
CHECKPOINT = click.argument("checkpoint", shell_complete=completing.checkpoint_names)
NOTES = click.option("--notes", metavar="TEXT", help="Text for people.")


@click.group("checkpoint", cls=LazyGroup, lazy={name: f"checkpoint:{name}_" for name in NAMES})
def group() -> None:
    """Checkpoints of a VM: make, apply, delete while it runs.

    CHECKPOINT is a name, or the beginning of an id; of several with one name the newest.
    """


@click.command("create", cls=Command)
@options.VM
@click.option("--name", metavar="TEXT", help="Its name [the VM's, and the time].")
@click.option(
    "--kind",
    type=click.Choice(["disks", "application", "full"]),
    help="disks: as after a power cut [default]. application: the guest agent flushes and freezes its file systems"
    " before. full: with the memory.",
)
@NOTES
@click.option("--keep", type=click.IntRange(1, 512), metavar="N", help="Delete older ones made with --keep, but N.")
@options.WAIT
@click.pass_obj
def create_(settings: Settings, /, vm: str, wait: bool, **given: Any) -> int:
    """Make a checkpoint of a VM, which may run.

    \b
    hostler checkpoint create web1 --name "before the update"
    hostler checkpoint create web1 --kind full
    hostler checkpoint create web1 --keep 7
    """
    from hostler.model.checkpoint_requests import CheckpointCreate  # noqa: PLC0415 - pydantic only when it is needed

    request = parsing.request(CheckpointCreate, f"checkpoint of vm {vm}", **given)
    return run_job(settings, calls.checkpoint_create(vm, request), wait=wait, done=_made)


def _made(job: Json) -> str:
    made = job["result"] or {}
    return f"checkpoint {made.get('name', '')!r} is ready"


@click.command("list", cls=Command)
@options.VM
@click.pass_obj
def list_(settings: Settings, vm: str) -> None:
    """Show the tree of a VM's checkpoints. "Now" is what the VM is at this moment."""
    output.show(settings, settings.client.raw(calls.checkpoints(vm)), checkpoint_views.checkpoints)


@click.command("show", cls=Command)
@options.VM
@CHECKPOINT
@click.pass_obj
def show_(settings: Settings, vm: str, checkpoint: str) -> None:
    """Show a checkpoint."""
    output.show(settings, settings.client.raw(calls.checkpoint(vm, checkpoint)), checkpoint_views.checkpoint)


@click.command("apply", cls=Command)
@options.VM
@CHECKPOINT
@click.option("--checkpoint-first", "first", is_flag=True, help="Make a checkpoint of the present state before.")
@click.option("--turn-off", is_flag=True, help="Turn the VM off if it runs; give a saved state up.")
@click.option("--new", metavar="NAME", help="Leave the VM alone, and make a new one from the checkpoint.")
@click.option("--full", is_flag=True, help="With --new: copy the disks, instead of building on the checkpoint's.")
@options.YES
@options.WAIT
@click.pass_obj
def apply_(settings: Settings, /, vm: str, checkpoint: str, yes: bool, wait: bool, **given: Any) -> int:
    """Make a VM what it was at a checkpoint. What it is now is lost, unless --checkpoint-first keeps it.

    \b
    hostler checkpoint apply web1 "before the update" --checkpoint-first --turn-off
    hostler checkpoint apply web1 "before the update" --new web2
    """
    if given["new"] is not None:
        return _clone(settings, vm, checkpoint, wait, given)
    if given["full"]:
        raise InvalidInput("command line", "--full copies disks for a new VM", "give --new NAME, or leave it out")
    if not given["first"]:
        output.confirm(f"What vm {vm} is now will be lost. Go on?", yes)
    from hostler.model.checkpoint_requests import CheckpointApply  # noqa: PLC0415 - pydantic only when it is needed

    words = {name: given[name] or None for name in ("first", "turn_off")}
    request = parsing.request(CheckpointApply, f"checkpoint {checkpoint!r}", **words)
    call = calls.checkpoint_apply(vm, checkpoint, request)
    return run_job(settings, call, wait=wait, done=lambda job: _applied(vm, checkpoint, job))


def _applied(vm: str, checkpoint: str, job: Json) -> str:
    saved = (job["result"] or {}).get("state") == "saved"
    more = f"; 'hostler vm restore {vm}' goes on from its memory" if saved else ""
    return f"vm {vm} is what it was at {checkpoint!r}{more}"


def _clone(settings: Settings, vm: str, checkpoint: str, wait: bool, given: dict[str, Any]) -> int:
    from hostler.model.checkpoint_requests import CheckpointClone  # noqa: PLC0415 - pydantic only when it is needed

    if given["first"] or given["turn_off"]:
        raise InvalidInput("command line", "--new leaves the VM alone", "leave out --checkpoint-first and --turn-off")
    request = parsing.request(CheckpointClone, f"vm {given['new']!r}", name=given["new"], full=given["full"] or None)
    call = calls.checkpoint_clone(vm, checkpoint, request)
    return run_job(settings, call, wait=wait, done=f"vm {given['new']} is made; start it with 'hostler vm start'")


@click.command("delete", cls=Command)
@options.VM
@CHECKPOINT
@click.option("--subtree", is_flag=True, help="Also all checkpoints that build on it.")
@options.YES
@options.WAIT
@click.pass_obj
def delete_(settings: Settings, vm: str, checkpoint: str, subtree: bool, yes: bool, wait: bool) -> int:
    """Delete a checkpoint. The VM stays as it is, and may run: its disks' layers are merged."""
    what = f"checkpoint {checkpoint!r}" + (" and all that build on it" if subtree else "")
    output.confirm(f"Delete {what} of vm {vm}?", yes)
    call = calls.checkpoint_delete(vm, checkpoint, subtree=subtree)
    return run_job(settings, call, wait=wait, done=f"{what} is deleted")


@click.command("rename", cls=Command)
@options.VM
@CHECKPOINT
@click.argument("name", required=False)
@NOTES
@click.pass_obj
def rename_(settings: Settings, vm: str, checkpoint: str, name: str | None, notes: str | None) -> int:
    """Give a checkpoint another name, or other notes."""
    from hostler.model.checkpoint_requests import CheckpointChange  # noqa: PLC0415 - pydantic only when it is needed

    if name is None and notes is None:
        raise InvalidInput("command line", "nothing to change was given", "give a new NAME, or --notes")
    request = parsing.request(CheckpointChange, f"checkpoint {checkpoint!r}", name=name, notes=notes)
    content = settings.client.raw(calls.checkpoint_change(vm, checkpoint, request))
    output.show(settings, content, checkpoint_views.checkpoint)
    return Exit.OK
