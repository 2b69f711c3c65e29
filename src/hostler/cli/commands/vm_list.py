"""`hostler vm list` and `hostler vm show`."""

from __future__ import annotations

import click

from hostler.cli import options, output, views
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.client import calls


@click.command("list", cls=Command)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the VMs of the host."""
    output.show(settings, settings.client.raw(calls.vms()), views.vms)


@click.command("show", cls=Command)
@options.VM
@click.pass_obj
def show(settings: Settings, vm: str) -> None:
    """Show everything about a VM."""
    output.show(settings, settings.client.raw(calls.vm(vm)), views.vm)
