"""The group `hostler nic`."""

from __future__ import annotations

import click

from hostler.cli import completing, options, output, parsing, views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.client import calls


@click.group("nic", cls=LazyGroup, lazy={"list": "nic:list_", "add": "nic:add", "remove": "nic:remove"})
def group() -> None:
    """Network adapters of a VM."""


@click.command("list", cls=Command)
@options.VM
@click.pass_obj
def list_(settings: Settings, vm: str) -> None:
    """List the adapters of a VM. With --json: the whole VM."""
    output.show(settings, settings.client.raw(calls.vm(vm)), views.nics)


@click.command("add", cls=Command)
@options.VM
@click.argument("network", metavar="user|none|bridge:NAME")
@click.option("--mac", metavar="ADDRESS", help="Hardware address (default: one is made).")
@click.option("--queues", type=click.IntRange(1, 64), metavar="N", help="Queue pairs [1].")
@click.pass_obj
def add(settings: Settings, vm: str, network: str, mac: str | None, queues: int | None) -> None:
    """Add an adapter to a VM that is off."""
    words = [network, f"mac={mac}" if mac else "", f"queues={queues}" if queues else ""]
    request = parsing.nic(",".join(word for word in words if word))
    output.show(settings, settings.client.raw(calls.nic_add(vm, request)), views.nics)


@click.command("remove", cls=Command)
@options.VM
@click.argument("nic", shell_complete=completing.nic_ids)
@click.pass_obj
def remove(settings: Settings, vm: str, nic: str) -> None:
    """Remove an adapter from a VM that is off."""
    output.show_or_say(settings, settings.client.raw(calls.nic_remove(vm, nic)), f"vm {vm} no longer has nic {nic}")
