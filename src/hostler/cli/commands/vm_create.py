"""`hostler vm create`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from hostler.cli import completing, making, options, output, parsing, views
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command
from hostler.cli.making import NewDisk, only_with
from hostler.cli.settings import Settings
from hostler.cli.waiting import Follower, raise_failure
from hostler.client import calls

if TYPE_CHECKING:
    from hostler.model.requests import DiskAdd, VmCreate


@click.command("create", cls=Command)
@click.argument("name")
@click.option("--memory", type=parsing.SIZE, metavar="SIZE", help="Memory [1G].")
@click.option("--vcpus", type=click.IntRange(1), metavar="N", help="Virtual processors [1].")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="VOLUME|PATH[,KEY=VALUE...]",
    shell_complete=completing.volume_names,
    help="A disk: a volume's name, an image's path, or a device below /dev. Keys: bus=scsi|ide, controller, unit, "
    "read-only=yes, cache=none|writeback|writethrough, discard=no, serial, format. Repeatable.",
)
@click.option(
    "--new-disk",
    "new_disks",
    multiple=True,
    metavar="SIZE[,KEY=VALUE...]",
    help="A disk on a volume made for it. Keys: format=qcow2|raw|vhd|vhd-fixed|vhdx, name, path, and those of --disk. "
    "Repeatable.",
)
@click.option(
    "--cdrom",
    "cdroms",
    multiple=True,
    metavar="ISO|none",
    help="A CD drive with this ISO image, or an empty one. Repeatable.",
)
@click.option(
    "--floppy",
    "floppies",
    multiple=True,
    metavar="IMAGE|none",
    help="A floppy drive with this image, or an empty one. Repeatable.",
)
@click.option(
    "--nic",
    "nics",
    multiple=True,
    metavar="NETWORK[,KEY=VALUE...]",
    help="An adapter: user (NAT), none, or bridge:NAME. Keys: mac, queues. Repeatable.",
)
@click.option("--kernel", metavar="PATH", help="Boot this Linux kernel directly.")
@click.option("--initrd", metavar="PATH", help="Initial RAM disk for --kernel.")
@click.option("--append", metavar="TEXT", help="Kernel command line for --kernel.")
@click.option("--uefi", is_flag=True, help="Boot by UEFI instead of BIOS.")
@click.option("--secure-boot", is_flag=True, help="UEFI with secure boot.")
@click.option("--tpm", is_flag=True, help="A virtual TPM.")
@click.option("--scsi-controllers", type=click.IntRange(0, 4), metavar="N", help="SCSI controllers [1].")
@click.option("--machine", metavar="TYPE", help="QEMU machine type (default: the host's newest).")
@click.option("--cpu-model", metavar="MODEL", help="CPU model (default: the host's).")
@click.option("--autostart", is_flag=True, help="Start it with the host.")
@click.option("--autostart-order", type=click.IntRange(0), metavar="N", help="Lower ones first [100].")
@click.option("--autostart-delay", type=click.IntRange(0), metavar="SECONDS", help="Wait so long before the next [0].")
@click.option("--shutdown-timeout", type=click.IntRange(1), metavar="SECONDS", help="Time to shut down [120].")
@click.option("--shutdown-then", type=click.Choice(["turn-off", "leave"]), help="When it takes longer [leave].")
@click.option("--notes", help="Notes for people.")
@click.option("--start", is_flag=True, help="Start it when it is made.")
@options.DRY_RUN
@options.WAIT
@click.pass_obj
def create(settings: Settings, /, name: str, start: bool, dry_run: bool, wait: bool, **given: Any) -> int:
    """Create a VM. It is off, unless --start is given.

    \b
    hostler vm create web1 --memory 2G --vcpus 2 --new-disk 20G --cdrom debian.iso --nic user --start
    hostler vm create web2 --disk web2,bus=ide --nic bridge:br0,queues=2
    """
    new = [NewDisk(text) for text in given.pop("new_disks")]
    request = vm_request(name, **given)
    names = making.free_names(settings, name, new)
    if dry_run:
        _check(settings, request, dict(zip(names, new, strict=True)))
        return Exit.OK
    with ExitStack() as undo:
        if new:  # what can be refused is refused before anything is made
            settings.client.raw(calls.vm_create(request, dry_run=True))
        for volume, disk in zip(names, new, strict=True):
            making.make(settings, undo, disk.volume(volume))
        added = tuple(disk.disk(volume) for volume, disk in zip(names, new, strict=True))
        fields = {key: getattr(request, key) for key in request.model_fields_set}
        whole = type(request)(**{**fields, "disks": _cds_last(request.disks, added)}) if added else request
        content = settings.client.raw(calls.vm_create(whole))
        undo.pop_all()
    output.say(settings, f"vm {name} is made")
    if start:
        content = _start(settings, name, wait)
        output.say(settings, f"vm {name} is {'running' if wait else 'starting'}")
    if settings.json:
        output.print_json(content)
    return Exit.OK


def _cds_last(given: tuple[DiskAdd, ...], new: tuple[DiskAdd, ...]) -> tuple[DiskAdd, ...]:
    """The order decides how disks are called: disk0 is what the system is on, not the CD it came from."""
    cds = tuple(disk for disk in given if str(disk.media) != "disk")
    return (*(disk for disk in given if disk not in cds), *new, *cds)


def vm_request(name: str, **given: Any) -> VmCreate:
    """The request that the options of `vm create` describe. InvalidInput says which of them is wrong."""
    from hostler.model.requests import VmCreate  # noqa: PLC0415 - pydantic only when it is needed

    only_with(bool(given["initrd"] or given["append"]), bool(given["kernel"]), "--initrd or --append", "--kernel")
    autostart = {"enabled": True} if given["autostart"] else {}
    return parsing.request(
        VmCreate,
        f"vm {name!r}",
        name=name,
        disks=[parsing.disk(text) for text in given["disks"]]
        + [parsing.cdrom(path) for path in given["cdroms"]]
        + [parsing.floppy(path) for path in given["floppies"]]
        or None,
        nics=[parsing.nic(text) for text in given["nics"]] or None,
        firmware="uefi" if given["uefi"] or given["secure_boot"] else None,
        secure_boot=given["secure_boot"] or None,
        tpm=given["tpm"] or None,
        kernel=_said(kernel=_absolute(given["kernel"]), initrd=_absolute(given["initrd"]), cmdline=given["append"]),
        autostart=_said(**autostart, order=given["autostart_order"], delay=given["autostart_delay"]),
        shutdown=_said(timeout=given["shutdown_timeout"], then=given["shutdown_then"]),
        **{key: given[key] for key in ("memory", "vcpus", "scsi_controllers", "machine", "cpu_model", "notes")},
    )


def _said(**fields: Any) -> dict[str, Any] | None:
    return {name: value for name, value in fields.items() if value is not None} or None


def _absolute(path: str | None) -> str | None:
    return None if path is None else parsing.absolute(path)


def _check(settings: Settings, request: VmCreate, new: dict[str, NewDisk]) -> None:
    content = settings.client.raw(calls.vm_create(request, dry_run=True))
    if not settings.json:
        for name, disk in new.items():
            output.say(settings, making.describe(disk, name))
        output.say(settings, f"would make vm {request.name}:")
    output.show(settings, content, views.vm)


def _start(settings: Settings, name: str, wait: bool) -> bytes:
    """Starts the new VM; its record afterwards."""
    job = json.loads(content := settings.client.raw(calls.vm_act(name, "start")))
    if wait:
        follower = Follower(settings, job, content, None)
        follower.follow()
        raise_failure(follower.job)
    return settings.client.raw(calls.vm(name))
