"""`hostler vm rename`, `set` and `delete`."""

from __future__ import annotations

import json
from typing import Any

import click

from hostler.cli import options, output, parsing, views
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.model.errors import InvalidInput


@click.command("rename", cls=Command)
@options.VM
@click.argument("name")
@click.pass_obj
def rename(settings: Settings, vm: str, name: str) -> None:
    """Give a VM another name. It may run."""
    from hostler.model.requests import VmChange  # noqa: PLC0415

    change = parsing.request(VmChange, f"vm {vm}", name=name)
    content = settings.client.raw(calls.vm_change(vm, change))
    output.show_or_say(settings, content, f"vm {vm} is now called {name}")


@click.command("set", cls=Command)
@options.VM
@click.option("--memory", type=parsing.SIZE, metavar="SIZE", help="Memory.")
@click.option("--vcpus", type=click.IntRange(1), metavar="N", help="Virtual processors.")
@click.option("--notes", help="Notes for people.")
@click.option("--autostart/--no-autostart", default=None, help="Start with the host.")
@click.option("--autostart-order", type=click.IntRange(0), metavar="N", help="Lower ones first.")
@click.option("--autostart-delay", type=click.IntRange(0), metavar="SECONDS", help="Wait so long before the next one.")
@click.option("--shutdown-timeout", type=click.IntRange(1), metavar="SECONDS", help="How long the guest may take.")
@click.option("--shutdown-then", type=click.Choice(["turn-off", "leave"]), help="What happens when it takes longer.")
@click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="What boots it.")
@click.option("--tpm/--no-tpm", default=None, help="A virtual TPM.")
@click.option("--kernel", metavar="PATH", help="Boot this Linux kernel directly.")
@click.option("--initrd", metavar="PATH", help="Initial RAM disk for --kernel.")
@click.option("--append", metavar="TEXT", help="Kernel command line for --kernel.")
@click.option("--scsi-controllers", type=click.IntRange(0, 4), metavar="N", help="SCSI controllers.")
@click.option("--when-off", is_flag=True, help="If the VM runs, keep the change for its next start.")
@click.pass_obj
def set_(settings: Settings, /, vm: str, when_off: bool, **given: Any) -> None:
    """Change a VM. What a running VM cannot take is refused, or kept for the next start with --when-off."""
    from hostler.model.requests import VmChange  # noqa: PLC0415

    fields = _change(settings, vm, {name: value for name, value in given.items() if value is not None})
    change = parsing.request(VmChange, f"change of vm {vm}", **fields)
    content = settings.client.raw(calls.vm_change(vm, change, when_off=when_off))
    waits = when_off and json.loads(content).get("next_config") is not None
    output.show_or_say(
        settings, content, f"vm {vm} will change with its next start" if waits else f"vm {vm} is changed"
    )


def _change(settings: Settings, vm: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a VmChange. Autostart, shutdown and kernel are changed as a whole, so what was not said about them is
    read from the VM first."""
    if not given:
        raise InvalidInput(f"vm {vm}", "nothing to change was given", "see: hostler vm set --help")
    parts = {
        "autostart": {"autostart": "enabled", "autostart_order": "order", "autostart_delay": "delay"},
        "shutdown": {"shutdown_timeout": "timeout", "shutdown_then": "then"},
        "kernel": {"kernel": "kernel", "initrd": "initrd", "append": "cmdline"},
    }
    fields = {name: value for name, value in given.items() if not any(name in names for names in parts.values())}
    for part, names in parts.items():
        said = {names[name]: _absolute(name, value) for name, value in given.items() if name in names}
        if said:
            fields[part] = {**_current(settings, vm, part), **said}
    return fields


def _absolute(name: str, value: Any) -> Any:
    return parsing.absolute(value) if name in ("kernel", "initrd") else value


def _current(settings: Settings, vm: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] | None = json.loads(settings.client.raw(calls.vm(vm)))["config"][part]
    return found or {}


@click.command("delete", cls=Command)
@options.VM
@click.option("--disks", is_flag=True, help="Delete the volumes of its disks too. Without it they stay.")
@options.DRY_RUN
@options.YES
@click.pass_obj
def delete(settings: Settings, vm: str, disks: bool, dry_run: bool, yes: bool) -> None:
    """Delete a VM that is off. Its disks are kept, unless --disks is given."""
    if not dry_run:
        output.confirm(f"Delete vm {vm}{' and its disks' if disks else ''}?", yes)
    content = settings.client.raw(calls.vm_delete(vm, disks=disks, dry_run=dry_run))
    output.show(settings, content, lambda found: views.deleted(found, f"vm {vm}", dry_run=dry_run))
