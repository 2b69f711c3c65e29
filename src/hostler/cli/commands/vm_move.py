"""`hostler vm move`: live migration, and the quick one."""

from __future__ import annotations

import json
from datetime import datetime

import click

from hostler.cli import completing, options, output, parsing, views
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.cli.waiting import run_job
from hostler.client import calls


@click.command("move", cls=Command)
@options.VM
@click.argument("to", metavar="HOST", shell_complete=completing.host_names)
@click.option("--quick", is_flag=True, help="Save, hand over, restore: the guest stands still meanwhile.")
@click.option("--bandwidth", type=parsing.SIZE, metavar="SIZE", help="At most so many bytes a second, such as 100M.")
@click.option(
    "--downtime-limit", type=click.IntRange(1, 60_000), metavar="MS", help="Longest pause to aim at, in ms [50]."
)
@click.option("--streams", type=click.IntRange(1, 64), metavar="N", help="Connections to send memory over [1].")
@options.DRY_RUN
@options.WAIT
@click.pass_obj
def move(
    settings: Settings,
    vm: str,
    to: str,
    quick: bool,
    bandwidth: int | None,
    downtime_limit: int | None,
    streams: int | None,
    dry_run: bool,
    wait: bool,
) -> int:
    """Move a VM to another host while it runs.

    With --dry-run everything that stands in the way is named, and the exit code is 4 if anything does. Ctrl-C leaves
    the move running; pressed twice it cancels it.
    """
    from hostler.model.requests import MigrateRequest  # noqa: PLC0415

    request = parsing.request(
        MigrateRequest,
        f"move of vm {vm}",
        host=to,
        mode="quick" if quick else None,
        bandwidth=bandwidth,
        downtime_limit=downtime_limit,
        streams=streams,
    )
    if dry_run:
        content = settings.client.raw(calls.vm_migrate_check(vm, request))
        output.show(settings, content, lambda found: views.plan(found, vm, to))
        return Exit.REFUSED if json.loads(content)["blockers"] else Exit.OK
    return run_job(
        settings,
        calls.vm_migrate(vm, request),
        wait=wait,
        done=lambda job: moved(vm, to, job),
        line=views.move_line,
        cancel_on_second=True,
    )


def moved(vm: str, to: str, job: Json) -> str:
    """What is said at the end of a move."""
    detail = job["progress"].get("detail") or {}
    text = f"vm {vm} is on host {to}"
    if job.get("ended"):
        took = datetime.fromisoformat(job["ended"]) - datetime.fromisoformat(job["created"])
        text += f", after {took.total_seconds():.1f} s"
    if detail.get("downtime") is not None:
        text += f", with a pause of {detail['downtime']} ms as QEMU counts it"
    return text
