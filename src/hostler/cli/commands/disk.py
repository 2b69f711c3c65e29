"""The group `hostler disk`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from hostler.cli import completing, making, options, output, parsing, views
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.making import NewDisk, only_with
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.cli.waiting import run_job
from hostler.client import calls
from hostler.model.errors import InvalidInput
from hostler.model.units import format_size


@click.group(
    "disk",
    cls=LazyGroup,
    lazy={
        "list": "disk:list_",
        "add": "disk:add",
        "remove": "disk:remove",
        "move": "disk_change:move",
        "flatten": "disk_change:flatten",
        "grow": "disk_change:grow",
        "limit": "disk_change:limit",
        "media": "disk_change:media",
        "change": "disk_change:change",
    },
)
def group() -> None:
    """Disks of a VM: add, remove, move, flatten, grow, limit and change them while it runs."""


@click.command("list", cls=Command)
@options.VM
@click.pass_obj
def list_(settings: Settings, vm: str) -> None:
    """List the disks of a VM. With --json: the whole VM."""
    output.show(settings, settings.client.raw(calls.vm(vm)), views.disks)


@click.command("add", cls=Command)
@options.VM
@click.option(
    "--volume",
    metavar="NAME|PATH",
    shell_complete=completing.volume_names,
    help="A volume, or the path of an image. With --new: the name of the volume to make.",
)
@click.option("--device", metavar="PATH", help="A block device of the host, passed through.")
@click.option("--new", type=parsing.SIZE, metavar="SIZE", help="Make a volume of this size and attach it.")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Of the new volume [qcow2], or of a raw image.")
@click.option("--path", metavar="PATH", help="Where the new volume's file goes.")
@click.option("--bus", type=click.Choice(["scsi", "ide"]), help="SCSI takes disks while the VM runs [scsi].")
@click.option("--controller", type=click.IntRange(0, 3), metavar="N", help="SCSI controller (default: the first).")
@click.option("--unit", type=click.IntRange(0, 63), metavar="N", help="Address on it (default: the first free).")
@click.option(
    "--media", type=click.Choice(["disk", "cdrom", "floppy"]), help="[disk]. A drive may be added without a medium."
)
@click.option("--read-only", is_flag=True, help="The guest cannot write to it.")
@click.option("--cache", type=click.Choice(["none", "writeback", "writethrough"]), help="How the host caches [none].")
@click.option("--no-discard", is_flag=True, help="Do not give back what the guest trims.")
@click.option("--serial", metavar="TEXT", help="Serial number the guest sees.")
@click.option("--overlay", is_flag=True, help="Only read the image; what the guest writes goes into a new volume.")
@click.option("--reservations", is_flag=True, help="The guest reserves the device or LUN itself (SCSI-3).")
@options.DRY_RUN
@options.WAIT
@click.pass_obj
def add(settings: Settings, /, vm: str, new: int | None, dry_run: bool, wait: bool, **given: Any) -> int:
    """Attach a disk to a VM, which may run. With --new the command always waits: the volume is removed again if it
    cannot be attached.

    \b
    hostler disk add web1 --volume data
    hostler disk add web1 --new 20G --format vhdx
    hostler disk add web1 --device /dev/loop0
    hostler disk add web1 --volume /srv/export/web_91AA.avhdx --overlay
    """
    if new is not None:
        return _add_new(settings, vm, new, dry_run, given)
    only_with(bool(given["path"]), False, "--path", "--new")
    source = {"volume": _volume(given["volume"]), "device": given["device"] and parsing.absolute(given["device"])}
    if not given["volume"] and not given["device"] and given["media"] in (None, "disk"):
        raise InvalidInput("disk", "nothing to attach was given", "give --volume, --device or --new")
    request = _disk(vm, given, format=given["format"], **source)
    if dry_run:
        output.show(settings, settings.client.raw(calls.disk_add_check(vm, request)), views.disks)
        return Exit.OK
    return run_job(settings, calls.disk_add(vm, request), wait=wait, done=lambda job: attached(vm, job))


def _volume(text: str | None) -> str | None:
    return parsing.absolute(text) if text and "/" in text else text


def _disk(vm: str, given: dict[str, Any], **source: Any) -> Any:
    from hostler.model.requests import DiskAdd  # noqa: PLC0415 - pydantic only when it is needed

    return parsing.request(
        DiskAdd,
        f"disk for vm {vm}",
        read_only=given["read_only"] or None,
        reservations=given["reservations"] or None,
        overlay=given["overlay"] or None,
        discard=False if given["no_discard"] else None,
        **{key: given[key] for key in ("bus", "controller", "unit", "media", "cache", "serial")},
        **source,
    )


def _add_new(settings: Settings, vm: str, size: int, dry_run: bool, given: dict[str, Any]) -> int:
    """Makes the volume, attaches it, removes it again if attaching fails. Always waits: it could not undo otherwise."""
    only_with(bool(given["device"]), False, "--device", "an existing device, not --new")
    only_with(given["overlay"], False, "--overlay", "an existing image, not --new")
    words = {"name": given["volume"], "path": given["path"], "format": given["format"]}
    new = NewDisk(",".join([str(size), *(f"{key}={value}" for key, value in words.items() if value)]))
    [name] = making.free_names(settings, vm, [new])
    if dry_run:
        settings.client.raw(calls.vm(vm))
        output.say(settings, f"would make volume {name}, {format_size(size)}, and attach it to vm {vm}")
        return Exit.OK
    with ExitStack() as undo:
        settings.client.raw(calls.vm(vm))  # a mistyped name is refused before anything is made
        making.make(settings, undo, new.volume(name))
        call = calls.disk_add(vm, _disk(vm, given, volume=name))
        code = run_job(settings, call, wait=True, done=lambda job: attached(vm, job))
        undo.pop_all()
    return code


def attached(vm: str, job: Json) -> str:
    """What is said when a disk is attached."""
    disk = job["params"].get("disk") or {}
    return f"vm {vm} has disk {disk['id']}" if "id" in disk else f"vm {vm} has the disk"


@click.command("remove", cls=Command)
@options.VM
@click.argument("disk", shell_complete=completing.disk_ids)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), metavar="SECONDS", help="How long the guest may take.")
@options.WAIT
@click.pass_obj
def remove(settings: Settings, vm: str, disk: str, timeout: float | None, wait: bool) -> int:
    """Detach a disk from a VM. Its volume stays. A running guest is asked to let go, and may refuse."""
    call = calls.disk_remove(vm, disk, timeout=timeout)
    return run_job(settings, call, wait=wait, done=f"vm {vm} no longer has disk {disk}")
