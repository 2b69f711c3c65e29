"""The group `hostler token`."""

from __future__ import annotations

import click

from hostler.cli import options, output, parsing, views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.client import calls

NAMES = ("list", "create", "revoke")
ROLES = ("viewer", "operator", "admin")


@click.group("token", cls=LazyGroup, lazy={name: f"token:{name}_" for name in NAMES})
def group() -> None:
    """Tokens for the API over https. TOKEN is a name or an id."""


@click.command("list", cls=Command)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the tokens, without their secrets."""
    output.show(settings, settings.client.raw(calls.tokens()), views.tokens)


@click.command("create", cls=Command)
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), help="What it may do: look, run VMs, everything [viewer].")
@click.pass_obj
def create_(settings: Settings, name: str, role: str | None) -> None:
    """Make a token and print its secret, which is shown only this once."""
    from hostler.model.requests import TokenCreate  # noqa: PLC0415 - pydantic only when it is needed

    request = parsing.request(TokenCreate, f"token {name!r}", name=name, role=role)
    output.show(settings, settings.client.raw(calls.token_create(request)), _secret)
    if settings.talkative:
        output.hint("keep it in a file only you can read, and name that file in $HOSTLER_TOKEN_FILE or hosts.json")


def _secret(found: Json) -> str:
    return str(found["secret"])


@click.command("revoke", cls=Command)
@click.argument("token")
@options.YES
@click.pass_obj
def revoke_(settings: Settings, token: str, yes: bool) -> None:
    """Make a token worthless, at once."""
    output.confirm(f"Revoke token {token}?", yes)
    output.show_or_say(settings, settings.client.raw(calls.token_revoke(token)), f"token {token} is revoked")
