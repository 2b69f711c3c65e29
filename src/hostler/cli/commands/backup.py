"""The group `hostler backup`."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import click

from hostler.cli import backup_views, options, output, parsing
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.waiting import ENDED, run_job
from hostler.client import calls
from hostler.model.errors import InvalidInput
from hostler.model.problem import Problem

NAMES = ("run", "list", "show", "verify", "export", "export-end", "restore", "delete", "prune")
BACKUP = click.argument("backup", metavar="DIR/ID")
LOOK = 0.1
"""Seconds between two looks whether an export is there."""
_VM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@click.group("backup", cls=LazyGroup, lazy={name: f"backup:{name.replace('-', '_')}_" for name in NAMES})
def group() -> None:
    """Backups of VMs in a directory of the host.

    DIR/ID is one of them: the directory and its id.
    """


@click.command("run", cls=Command)
@options.VM
@click.option("--to", "directory", metavar="DIR", required=True, help="The directory; an empty or new one at first.")
@click.option("--full", "mode", flag_value="full", help="Copy everything.")
@click.option("--incremental", "mode", flag_value="incremental", help="Only what changed, or refuse.")
@click.option("--application", "consistency", flag_value="application", help="With the guest's file systems frozen.")
@click.option("--crash", "consistency", flag_value="crash", help="As after a power cut; the agent is not asked.")
@click.option("--limit", "rate", type=parsing.SIZE, metavar="RATE", help="Bytes a second at most, such as 50M.")
@click.option("--compress", is_flag=True, help="Smaller files, more work.")
@click.option("--name", help="What it is for, for people.")
@options.WAIT
@click.pass_obj
def run_(settings: Settings, /, vm: str, directory: str, wait: bool, compress: bool, **given: Any) -> int:
    """Back up a VM, while it runs or is off: what changed since its last backup there, or everything.

    \b
    hostler backup run web1 --to /srv/backups
    hostler backup run web1 --to /srv/backups --full --compress --limit 100M
    """
    from hostler.model.backup_requests import BackupRun  # noqa: PLC0415 - pydantic only when it is needed

    said = {name: value for name, value in given.items() if value is not None}
    place = parsing.absolute(directory)
    request = parsing.request(BackupRun, f"backup of {vm!r}", directory=place, compress=compress, **said)
    return run_job(settings, calls.backup_run(vm, request), wait=wait, done=lambda job: backup_views.made(job, vm))


@click.command("list", cls=Command)
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--vm", help="Only those of this VM (name or id).")
@click.pass_obj
def list_(settings: Settings, directory: str | None, vm: str | None) -> None:
    """List the backups in a directory, or in all that this host has backed up to."""
    from hostler.model.backup_requests import BackupList  # noqa: PLC0415

    place = directory and parsing.absolute(directory)
    request = parsing.request(BackupList, "backups", directory=place, vm=vm)
    output.show(settings, settings.client.raw(calls.backups(request)), backup_views.backups)


@click.command("show", cls=Command)
@BACKUP
@click.pass_obj
def show_(settings: Settings, backup: str) -> None:
    """Show a backup, its disks, and what it builds on."""
    output.show(settings, settings.client.raw(calls.backup(_choice(backup))), backup_views.backup)


@click.command("verify", cls=Command)
@BACKUP
@options.WAIT
@click.pass_obj
def verify_(settings: Settings, backup: str, wait: bool) -> int:
    """Read a backup and everything it builds on, and check every block."""
    return run_job(settings, calls.backup_verify(_choice(backup)), wait=wait, done=f"backup {backup} is sound")


@click.command("export", cls=Command)
@BACKUP
@click.option("--timeout", type=click.IntRange(1), metavar="SECONDS", help="When it ends at the latest [3600].")
@click.pass_obj
def export_(settings: Settings, backup: str, timeout: int | None) -> None:
    """Serve a backup over NBD, for programs on the host: each disk whole, read-only, on a unix socket.

    What changed in this backup is told by the metadata context qemu:allocation-depth (depth 1).

    \b
    hostler backup export /srv/backups/20261124T101530Z-0a1b2c3d
    """
    from hostler.model.backup_requests import BackupExport  # noqa: PLC0415

    directory, name = _split(backup)
    said = {} if timeout is None else {"timeout": timeout}
    request = parsing.request(BackupExport, f"backup {backup!r}", directory=directory, backup=name, **said)
    job = json.loads(settings.client.raw(calls.backup_export(request)))
    while not (job["progress"]["detail"].get("exports") or job["state"] in ENDED):
        time.sleep(LOOK)
        content = settings.client.raw(calls.job(job["id"]))
        job = json.loads(content)
    if job["error"]:
        raise Problem.model_validate(job["error"]).to_error()
    output.show(settings, json.dumps(job).encode(), backup_views.exported)


@click.command("export-end", cls=Command)
@options.JOB
@click.pass_obj
def export_end_(settings: Settings, job: str) -> None:
    """End an export: its job is cancelled, and the sockets go."""
    content = settings.client.raw(calls.job_cancel(job))
    output.show_or_say(settings, content, "the export ends")


@click.command("restore", cls=Command)
@BACKUP
@click.option("--vm", metavar="NAME", help="As a new VM of this name.")
@click.option("--replace", is_flag=True, help="As the VM it was made of, which is off. Its volumes stay, detached.")
@click.option("--disk", metavar="DISK", help="Only this disk, as a volume (--to).")
@click.option("--to", "volume", metavar="NAME", help="Name of the volume.")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Format of the new volumes (default: as they were).")
@click.option("--volumes", metavar="DIR", help="Where the new volumes go (default: the host's volume directory).")
@options.WAIT
@click.pass_obj
def restore_(settings: Settings, /, backup: str, volumes: str | None, wait: bool, **given: Any) -> int:
    """Bring a backup back. Every block is checked before it is written; nothing is overwritten.

    \b
    hostler backup restore /srv/backups/20261124T101530Z-0a1b2c3d --vm web1-again
    hostler backup restore /srv/backups/20261124T101530Z-0a1b2c3d --disk disk1 --to data-old --format raw
    """
    from hostler.model.backup_requests import BackupRestore  # noqa: PLC0415

    directory, backup_id = _split(backup)
    request = parsing.request(
        BackupRestore,
        f"restore of {backup!r}",
        directory=directory,
        backup=backup_id,
        volumes=volumes and parsing.absolute(volumes),
        **given,
    )
    return run_job(settings, calls.backup_restore(request), wait=wait, done=backup_views.restored)


@click.command("delete", cls=Command)
@BACKUP
@options.DRY_RUN
@options.YES
@click.pass_obj
def delete_(settings: Settings, backup: str, dry_run: bool, yes: bool) -> None:
    """Delete a backup. One that another one builds on is refused."""
    request = _choice(backup)
    if not dry_run:
        output.confirm(f"Delete backup {request.backup} for good?", yes)
    content = settings.client.raw(calls.backup_delete(request, dry_run=dry_run))
    output.show(settings, content, lambda found: backup_views.deleted(found, dry_run))


@click.command("prune", cls=Command)
@click.argument("directory", metavar="DIR")
@click.option("--keep", type=click.IntRange(1), required=True, metavar="N", help="How many of each VM to keep.")
@click.option("--vm", help="Only those of this VM (name or id).")
@options.DRY_RUN
@options.YES
@click.pass_obj
def prune_(settings: Settings, directory: str, keep: int, vm: str | None, dry_run: bool, yes: bool) -> None:
    """Delete old backups, but for those that a kept one builds on.

    \b
    hostler backup prune /srv/backups --keep 7 --dry-run
    """
    from hostler.model.backup_requests import BackupPrune  # noqa: PLC0415

    place = parsing.absolute(directory)
    request = parsing.request(BackupPrune, f"backups in {directory!r}", directory=place, keep=keep, vm=vm)
    if not dry_run:
        output.confirm(f"Delete all but the newest {keep} backups of each VM in {place} for good?", yes)
    content = settings.client.raw(calls.backup_prune(request, dry_run=dry_run))
    output.show(settings, content, lambda found: backup_views.pruned(found, dry_run))


def _split(backup: str) -> tuple[str, str]:
    """Directory and id. The place of the backup's own directory, which has the VM's id in it, is understood too."""
    directory, name = os.path.split(parsing.absolute(backup).rstrip("/"))
    if _VM_ID.fullmatch(os.path.basename(directory)):
        directory = os.path.dirname(directory)
    if "/" not in backup or not name:
        raise InvalidInput(
            f"backup {backup!r}", "names no directory", "write DIR/ID, as 'hostler backup list' shows it"
        )
    return directory, name


def _choice(backup: str) -> Any:
    from hostler.model.backup_requests import BackupChoice  # noqa: PLC0415

    directory, name = _split(backup)
    return parsing.request(BackupChoice, f"backup {backup!r}", directory=directory, backup=name)
