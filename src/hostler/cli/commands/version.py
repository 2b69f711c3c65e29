"""`hostler version`."""

from __future__ import annotations

import json

import click

from hostler import __version__
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.model.errors import HostlerError


@click.command("version", cls=Command)
@click.pass_obj
def command(settings: Settings) -> None:
    """Print the versions of this program and of the host."""
    try:
        host = json.loads(settings.client.raw(calls.version()))
    except HostlerError as error:
        host = None
        text = f"host: {error.cause}"
    else:
        text = f"host {host['version']}"
    if settings.json:
        click.echo(json.dumps({"client": __version__, "host": host}))
    else:
        click.echo(f"hostler {__version__}\n{text}")
