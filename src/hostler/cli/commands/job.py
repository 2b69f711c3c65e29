"""The group `hostler job`."""

from __future__ import annotations

import json

import click

from hostler.cli import completing, options, output, views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.waiting import watch
from hostler.client import calls

NAMES = ("list", "show", "watch", "cancel")
STATES = ("queued", "running", "unwinding", "done", "failed", "cancelled")


@click.group("job", cls=LazyGroup, lazy={name: f"job:{name}_" for name in NAMES})
def group() -> None:
    """Long work: look, wait, cancel. JOB is an id."""


@click.command("list", cls=Command)
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@click.option("--target", metavar="NAME|ID", shell_complete=completing.vm_names, help="Only jobs about this object.")
@click.pass_obj
def list_(settings: Settings, state: str | None, target: str | None) -> None:
    """List the jobs of the host, oldest first."""
    output.show(settings, settings.client.raw(calls.jobs(state=state, target=target)), views.jobs)


@click.command("show", cls=Command)
@options.JOB
@click.pass_obj
def show_(settings: Settings, job: str) -> None:
    """Show a job with its steps."""
    output.show(settings, settings.client.raw(calls.job(job)), views.job)


@click.command("watch", cls=Command)
@options.JOB
@click.pass_obj
def watch_(settings: Settings, job: str) -> int:
    """Wait for a job; the exit code says how it ended. Ctrl-C ends only the waiting."""
    content = settings.client.raw(calls.job(job))
    found = json.loads(content)
    line = views.move_line if found["kind"] == "vm.migrate" else None
    return watch(settings, found, done=_done, line=line, content=content)


def _done(job: views.Json) -> str:
    return f"{job['kind']} of {job['target_name'] or job['target']} is done"


@click.command("cancel", cls=Command)
@options.JOB
@click.pass_obj
def cancel_(settings: Settings, job: str) -> None:
    """Ask a job to stop and undo what it has done."""
    content = settings.client.raw(calls.job_cancel(job))
    output.show(settings, content, lambda found: f"job {found['id']} is {found['state']}")
