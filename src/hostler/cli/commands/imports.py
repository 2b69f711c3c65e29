"""The group `hostler import`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hostler.cli import import_views, options, output, parsing
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.waiting import run_job
from hostler.client import calls
from hostler.model.errors import InvalidInput

if TYPE_CHECKING:
    from hostler.model.transfer import ImportRequest

_OPTIONS = (
    click.argument("path"),
    click.option("--name", help="Name of the VM here (default: its own)."),
    click.option("--format", type=click.Choice(parsing.FORMATS), help="Format of the new volumes [qcow2]."),
    click.option("--directory", metavar="DIR", help="Where the new volumes go (default: the host's)."),
    click.option("--in-place", is_flag=True, help="Use the images where they are instead of copying them."),
    click.option("--search", multiple=True, metavar="DIR", help="Another directory with its images. Repeatable."),
    click.option("--checkpoint", metavar="NAME", help="The state of this snapshot instead of the present one."),
    click.option(
        "--network",
        "networks",
        multiple=True,
        metavar="[NAME=]NETWORK",
        help="What adapters are connected to: user, none or bridge:NAME; after the name of a network there, only those "
        "that were connected to it. Repeatable.",
    ),
    click.option("--new-macs", is_flag=True, help="New MAC addresses: the original goes on living."),
    click.option("--keep-id", is_flag=True, help="The same id as there (folders that hostler exported)."),
    click.option("--skip-missing", is_flag=True, help="Leave out disks whose image is not there."),
    click.option("--raw", is_flag=True, help="Images without a known header are raw."),
    click.option("--vcpus", type=click.IntRange(1), metavar="N", help="Other than described."),
    click.option("--memory", type=parsing.SIZE, metavar="SIZE", help="Other than described."),
    click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="Other than described."),
)


def _request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group("import", cls=LazyGroup, lazy={"inspect": "imports:inspect_", "run": "imports:run_"})
def group() -> None:
    """Machines from Hyper-V, OVF, OVA, disk images, exported folders."""


@click.command("inspect", cls=Command)
@_request_options
@click.option("--all", "everything", is_flag=True, help="Also what was read and not understood, verbatim.")
@click.pass_obj
def inspect_(settings: Settings, /, path: str, everything: bool, **given: Any) -> None:
    """Say what an import would do, and what stands in its way. Changes nothing.

    \b
    hostler import inspect /srv/export/web01
    """
    content = settings.client.raw(calls.import_inspect(_request(path, **given)))
    output.show(settings, content, lambda found: import_views.report(found, everything))


@click.command("run", cls=Command)
@_request_options
@options.WAIT
@click.pass_obj
def run_(settings: Settings, /, path: str, wait: bool, **given: Any) -> int:
    """Import a machine. PATH is an exported folder, a description in it, or a disk image. The VM is off afterwards.

    \b
    hostler import run /srv/export/web01 --network LAN=bridge:br0
    hostler import run /srv/web01.ova --name web1 --format vhdx
    """
    call = calls.import_run(_request(path, **given))
    return run_job(settings, call, wait=wait, done=import_views.done)


def _request(path: str, networks: tuple[str, ...] = (), search: tuple[str, ...] = (), **given: Any) -> ImportRequest:
    from hostler.model.transfer import ImportRequest  # noqa: PLC0415 - pydantic only when it is needed

    named: dict[str, str] = {}
    default = None
    for text in networks:
        name, equals, network = text.rpartition("=")
        if not equals:
            default = text
        elif not name:
            raise InvalidInput(f"network {text!r}", "has no name before '='", "write NAME=bridge:br0, or user for all")
        else:
            named[name] = network
    directory = given.pop("directory")
    return parsing.request(
        ImportRequest,
        f"import {path!r}",
        path=parsing.absolute(path),
        directory=directory and parsing.absolute(directory),
        search=[parsing.absolute(place) for place in search],
        networks=named,
        network=default,
        **given,
    )


@click.command("export", cls=Command)
@options.VM
@click.argument("directory")
@click.option("--folder", "form", flag_value="folder", default=True, help="A folder of our own: nothing is lost.")
@click.option("--ovf", "form", flag_value="ovf", help="An OVF with VMDK disks, in a folder.")
@click.option("--ova", "form", flag_value="ova", help="The same in one file.")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Format of the disks in a folder [as they are].")
@options.DRY_RUN
@options.WAIT
@click.pass_obj
def export(
    settings: Settings, vm: str, directory: str, form: str, format: str | None, dry_run: bool, wait: bool
) -> int | None:
    """Write a VM that is off to a folder, an OVF or an OVA.

    \b
    hostler export web1 /srv/export
    hostler export web1 /srv/export --ova
    """
    from hostler.model.transfer import ExportRequest  # noqa: PLC0415 - pydantic only when it is needed

    place = parsing.absolute(directory)
    request = parsing.request(ExportRequest, f"export of {vm!r}", directory=place, form=form, format=format)
    if dry_run:
        output.show(settings, settings.client.raw(calls.export_check(vm, request)), import_views.export)
        return None
    return run_job(settings, calls.export_run(vm, request), wait=wait, done=import_views.exported)
