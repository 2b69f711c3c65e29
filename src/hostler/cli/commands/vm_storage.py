"""`hostler vm move-storage`."""

from __future__ import annotations

import json
from typing import Any

import click

from hostler.cli import options, output
from hostler.cli.commands.disk_change import FORMAT, KEEP, LIMIT, POOL, move_disk, move_request
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.client import calls


@click.command("move-storage", cls=Command)
@options.VM
@click.option("--to", metavar="DIR", help="The directory all its disks go to.")
@POOL
@FORMAT
@LIMIT
@KEEP
@options.DRY_RUN
@click.pass_obj
def move_storage(settings: Settings, /, vm: str, dry_run: bool, **given: Any) -> int:
    """Move all disks of a VM to another directory or pool, one after the other. The VM may run. Drives for removable
    media, passed-through devices and disks on other machines stay where they are.

    Each disk is a job of its own: what was moved before one fails stays moved.
    """
    request = move_request(**given)
    found = json.loads(settings.client.raw(calls.vm(vm)))["config"]["disks"]
    disks = [d["id"] for d in found if d["media"] == "disk" and d["source"]["kind"] == "volume"]
    if not disks:
        output.say(settings, f"vm {vm} has no disk to move")
    for disk in disks:
        code = move_disk(settings, vm, disk, request, dry_run=dry_run, wait=True)
        if code != Exit.OK:
            return code
    return Exit.OK
