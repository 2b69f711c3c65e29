"""`hostler disk move`, `grow`, `limit`, `media` and `change`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from hostler.cli import completing, options, output, parsing, views
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.cli.waiting import run_job
from hostler.client import calls
from hostler.model.errors import InvalidInput
from hostler.model.units import format_size

if TYPE_CHECKING:
    from hostler.model.disk_requests import DiskMove

DISK = click.argument("disk", shell_complete=completing.disk_ids)

TO = click.option("--to", metavar="PATH|DIR", help="Where the new image goes: a path, or an existing directory.")
POOL = click.option(
    "--pool", metavar="POOL", shell_complete=completing.pool_names, help="The pool of files the new image goes to."
)
FORMAT = click.option("--format", type=click.Choice(parsing.FORMATS), help="Of the new image (default: as it is).")
LIMIT = click.option("--limit", type=parsing.SIZE, metavar="SIZE", help="Copy at most so many bytes a second: 100M.")
KEEP = click.option("--keep-source", is_flag=True, help="Keep the old image.")


@click.command("move", cls=Command)
@options.VM
@DISK
@TO
@POOL
@FORMAT
@click.option("--name", metavar="NAME", help="Of the volume afterwards (default: its own).")
@LIMIT
@KEEP
@options.DRY_RUN
@options.WAIT
@click.pass_obj
def move(settings: Settings, /, vm: str, disk: str, dry_run: bool, wait: bool, **given: Any) -> int:
    """Move a disk to another place, in another format if wanted. The VM may run: its guest stands still for some
    milliseconds at the end.

    The old image is removed afterwards, if it is a volume. Ctrl-C leaves the move running; pressed twice it cancels it.

    \b
    hostler disk move web1 disk0 --pool fast
    hostler disk move web1 disk0 --to /srv/fast/web1.vhdx --format vhdx --limit 100M
    """
    return move_disk(settings, vm, disk, move_request(**given), dry_run=dry_run, wait=wait)


def move_request(to: str | None, **given: Any) -> DiskMove:
    """What the options say."""
    from hostler.model.disk_requests import DiskMove  # noqa: PLC0415 - pydantic only when it is needed

    given["keep_source"] = given.get("keep_source") or None
    return parsing.request(DiskMove, "move of a disk", to=to and parsing.absolute(to), **given)


def move_disk(settings: Settings, vm: str, disk: str, request: DiskMove, *, dry_run: bool, wait: bool) -> int:
    """One move, or a look at what it would do."""
    if dry_run:
        output.show(settings, settings.client.raw(calls.disk_move_check(vm, disk, request)), views.disks)
        return Exit.OK
    return run_job(
        settings,
        calls.disk_move(vm, disk, request),
        wait=wait,
        done=lambda job: moved(vm, disk, job),
        line=views.copy_line,
        cancel_on_second=True,
    )


def moved(vm: str, disk: str, job: Json) -> str:
    """What is said at the end of a move."""
    result = job.get("result") or {}
    text = f"disk {disk} of vm {vm} is in {result.get('path', 'its new place')}"
    if job.get("ended"):
        took = datetime.fromisoformat(job["ended"]) - datetime.fromisoformat(job["created"])
        text += f", after {took.total_seconds():.1f} s"
    if result.get("kept"):
        text += f"; {', '.join(result['kept'])} is kept"
    return text


@click.command("flatten", cls=Command)
@options.VM
@DISK
@LIMIT
@options.WAIT
@click.pass_obj
def flatten(settings: Settings, vm: str, disk: str, limit: int | None, wait: bool) -> int:
    """Copy what a disk's lower layers hold into its top one, while the VM runs. Afterwards it needs them no more.

    Ctrl-C leaves it running; pressed twice it cancels it, and the disk stays as it is.

    \b
    hostler disk flatten web1 disk0 --limit 100M
    """
    from hostler.model.disk_requests import DiskFlatten  # noqa: PLC0415

    request = parsing.request(DiskFlatten, f"disk {disk}", limit=limit)
    return run_job(
        settings,
        calls.disk_flatten(vm, disk, request),
        wait=wait,
        done=lambda job: flattened(vm, disk, job),
        line=views.copy_line,
        cancel_on_second=True,
    )


def flattened(vm: str, disk: str, job: Json) -> str:
    """What is said when a disk needs its lower layers no more."""
    result = job.get("result") or {}
    freed = ", ".join(result.get("freed", []))
    return f"disk {disk} of vm {vm} is one image, {result.get('path', '')}; it no longer needs {freed}"


@click.command("grow", cls=Command)
@options.VM
@DISK
@click.argument("size", type=parsing.SIZE)
@options.WAIT
@click.pass_obj
def grow(settings: Settings, vm: str, disk: str, size: int, wait: bool) -> int:
    """Make a disk larger. SIZE is its new size. The VM may run: its guest is told, and has to grow its partition and
    file system itself.

    \b
    hostler disk grow web1 disk0 40G
    """
    from hostler.model.disk_requests import DiskGrow  # noqa: PLC0415

    request = parsing.request(DiskGrow, f"disk {disk}", size=size)
    done = f"disk {disk} of vm {vm} has {format_size(size)}"
    return run_job(settings, calls.disk_grow(vm, disk, request), wait=wait, done=done)


@click.command("limit", cls=Command)
@options.VM
@DISK
@click.option("--iops", type=click.IntRange(0), metavar="N", help="Operations a second, both ways together.")
@click.option("--iops-read", type=click.IntRange(0), metavar="N", help="Reads a second.")
@click.option("--iops-write", type=click.IntRange(0), metavar="N", help="Writes a second.")
@click.option("--iops-burst", type=click.IntRange(0), metavar="N", help="For peaks of one second.")
@click.option("--bandwidth", type=parsing.SIZE, metavar="SIZE", help="Bytes a second, both ways together: 50M.")
@click.option("--bandwidth-read", type=parsing.SIZE, metavar="SIZE", help="Bytes read a second.")
@click.option("--bandwidth-write", type=parsing.SIZE, metavar="SIZE", help="Bytes written a second.")
@click.option("--bandwidth-burst", type=parsing.SIZE, metavar="SIZE", help="For peaks of one second.")
@click.option("--none", "no_limits", is_flag=True, help="Take all limits away.")
@options.WAIT
@click.pass_obj
def limit(settings: Settings, /, vm: str, disk: str, no_limits: bool, wait: bool, **given: Any) -> int:
    """Limit what a disk may do, also while the VM runs. 0 takes a limit away; what is not given stays.

    \b
    hostler disk limit web1 disk0 --iops 500 --bandwidth 50M
    hostler disk limit web1 disk0 --none
    """
    from hostler.model.disk_requests import DiskLimits  # noqa: PLC0415

    if no_limits:
        if any(value is not None for value in given.values()):
            raise InvalidInput("option --none", "takes all limits away", "give it alone")
        given = dict.fromkeys(given, 0)
    request = parsing.request(DiskLimits, f"limits of disk {disk}", **given)
    done = f"disk {disk} of vm {vm} has {'no limits' if no_limits else 'these limits'} now"
    return run_job(settings, calls.disk_limit(vm, disk, request), wait=wait, done=done)


@click.command("media", cls=Command)
@options.VM
@DISK
@click.argument("medium", required=False, metavar="[NAME|PATH]", shell_complete=completing.volume_names)
@click.option("--eject", is_flag=True, help="Take the medium out.")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Of an image that is no volume [raw].")
@click.option("--force", is_flag=True, help="Also when the guest has locked the drive.")
@options.WAIT
@click.pass_obj
def media(
    settings: Settings,
    vm: str,
    disk: str,
    medium: str | None,
    eject: bool,
    format: str | None,
    force: bool,
    wait: bool,
) -> int:
    """Change the medium of a CD or floppy drive, or take it out. The VM may run; a guest that uses the medium has the
    drive locked.

    \b
    hostler disk media web1 disk1 /srv/iso/virtio-win.iso
    hostler disk media web1 disk1 --eject
    """
    from hostler.model.disk_requests import DiskMedium  # noqa: PLC0415

    if (medium is None) != eject:
        raise InvalidInput(f"disk {disk}", "no medium was given" if medium is None else "--eject takes no medium")
    fields: dict[str, Any] = {"force": force or None}
    if medium is not None:
        is_path = "/" in medium
        fields["volume"] = parsing.absolute(medium) if is_path else medium
        fields["format"] = format or ("raw" if is_path else None)
    request = parsing.request(DiskMedium, f"medium of disk {disk}", **fields)
    done = f"drive {disk} of vm {vm} {'is empty' if eject else f'has {medium}'}"
    return run_job(settings, calls.disk_medium(vm, disk, request), wait=wait, done=done)


@click.command("change", cls=Command)
@options.VM
@DISK
@click.option("--cache", type=click.Choice(["none", "writeback", "writethrough"]), help="How the host caches.")
@click.option("--discard/--no-discard", default=None, help="Whether what the guest trims is given back.")
@click.option("--read-only/--writable", default=None, help="Whether the guest can write to it.")
@click.option("--serial", metavar="TEXT", help="Serial number the guest sees.")
@click.option("--when-off", is_flag=True, help="If the VM runs, keep the change for its next start.")
@click.pass_obj
def change(settings: Settings, /, vm: str, disk: str, when_off: bool, **given: Any) -> None:
    """Change how a disk is attached. The VM must be off, or takes the change with its next start (--when-off)."""
    from hostler.model.disk_requests import DiskChange  # noqa: PLC0415

    request = parsing.request(DiskChange, f"change of disk {disk}", **given)
    content = settings.client.raw(calls.disk_change(vm, disk, request, when_off=when_off))
    waits = json.loads(content).get("next_config") is not None
    output.show_or_say(
        settings, content, f"disk {disk} of vm {vm} {'will change with its next start' if waits else 'is changed'}"
    )
