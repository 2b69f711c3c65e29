"""The group `hostler host`."""

from __future__ import annotations

import json
import sys

import click

from hostler.cli import completing, options, output, parsing, views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.client import calls

NAMES = ("show", "list", "limits", "invite", "join", "remove")


@click.group("host", cls=LazyGroup, lazy={name: f"host:{name}_" for name in NAMES})
def group() -> None:
    """This host and the hosts it trusts. HOST is a name or an id."""


@click.command("show", cls=Command)
@click.argument("name", metavar="[HOST]", required=False, shell_complete=completing.host_names)
@click.pass_obj
def show_(settings: Settings, name: str | None) -> None:
    """Show a host (default: the one that answers): hardware, QEMU, which accelerator and why."""
    if name is None:
        output.show(settings, settings.client.raw(calls.this_host()), views.host)
    else:
        output.show_one_of(settings, settings.client.raw(calls.hosts()), "host", name, views.host)


@click.command("list", cls=Command)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the hosts that trust each other. The one that answers is marked with *."""
    output.show(settings, settings.client.raw(calls.hosts()), views.hosts)


@click.command("limits", cls=Command)
@click.pass_obj
def limits_(settings: Settings) -> None:
    """Show the limits of the host's profile."""
    output.show(settings, settings.client.raw(calls.limits()), views.limits)


@click.command("invite", cls=Command)
@click.pass_obj
def invite_(settings: Settings) -> None:
    """Print a one-time invitation for another host."""
    output.show(settings, settings.client.raw(calls.host_invite()), _invitation)
    if settings.talkative:
        output.hint("on the other host: hostler host join  (it asks for the line above; whoever has it may join)")
        address = str(json.loads(settings.client.raw(calls.this_host()))["address"])
        if address.startswith(("127.", "localhost:", "[::1]")):
            output.hint(
                f"from another machine it cannot be reached at {address}: start hostlerd with --listen 0.0.0.0:8690"
            )


def _invitation(found: Json) -> str:
    return str(found["token"])


@click.command("join", cls=Command)
@click.argument("invitation", required=False)
@click.pass_obj
def join_(settings: Settings, invitation: str | None) -> None:
    """Make this host and the one that invited it trust each other.

    Without INVITATION it is asked for, or read from a pipe, so that it does not stand in the list of processes.
    """
    from hostler.model.requests import JoinRequest  # noqa: PLC0415 - pydantic only when it is needed

    if invitation in (None, "-"):
        asked = sys.stdin.isatty()
        invitation = click.prompt("Invitation", err=True, hide_input=True) if asked else sys.stdin.read(4096)
    request = parsing.request(JoinRequest, "invitation", invitation=(invitation or "").strip())
    content = settings.client.raw(calls.host_join(request))
    output.show_or_say(settings, content, f"this host and {json.loads(content)['name']} trust each other now")


@click.command("remove", cls=Command)
@options.HOST
@options.YES
@click.pass_obj
def remove_(settings: Settings, host: str, yes: bool) -> None:
    """End the trust between this host and another."""
    output.confirm(f"End the trust in host {host}?", yes)
    output.show_or_say(settings, settings.client.raw(calls.host_remove(host)), f"host {host} is no longer trusted")
