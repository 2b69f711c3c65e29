"""The group `hostler pool`."""

from __future__ import annotations

from typing import Any

import click

from hostler.cli import options, output, parsing, pool_views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.model.errors import InvalidInput, NotFound

NAMES = ("list", "show", "create", "change", "delete", "scan", "discover")
PERCENT = click.IntRange(1, 100)
TLS_FILES = {"ca": "ca-cert.pem", "certificate": "client-cert.pem", "key": "client-key.pem"}
"""QEMU's own names, so that one directory serves both."""
PORTAL = click.option(
    "--portal", "portals", multiple=True, metavar="HOST:PORT", help="Another way to the same target; may be repeated."
)
CHAP_USER = click.option("--chap-user", metavar="NAME", help="Name to log in with.")
CHAP_SECRET = click.option(
    "--chap-secret-file", metavar="FILE", help="File with the CHAP secret (- for standard input); never an argument."
)
INITIATOR = click.option("--initiator", metavar="IQN", help="By which name this host logs in.")
TLS = click.option(
    "--tls", metavar="DIR", help=f"Directory with {', '.join(TLS_FILES.values())}; what is in them is copied."
)
WARN_AT = click.option("--warn-at", type=PERCENT, metavar="PERCENT", help="Warn when so much is in use [85].")
NOTES = click.option("--notes", metavar="TEXT", help="Text for people.")


@click.group("pool", cls=LazyGroup, lazy={name: f"pool:{name}_" for name in NAMES})
def group() -> None:
    """Pools: directories and storage systems that volumes are in. POOL is a name."""


@click.command("list", cls=Command)
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the pools of the host, as they are now."""
    output.show(settings, settings.client.raw(calls.pools()), pool_views.pools)


@click.command("show", cls=Command)
@options.POOL
@click.pass_obj
def show_(settings: Settings, pool: str) -> None:
    """Show a pool: what it holds, what its storage can do, how it is."""
    output.show(settings, settings.client.raw(calls.pool(pool)), pool_views.pool)


@click.command("create", cls=Command)
@click.argument("name")
@click.option("--path", metavar="DIR", help="A directory, in which volumes are made.")
@click.option("--library", metavar="DIR", help="A directory of ISO images, which is only read.")
@click.option("--iscsi", metavar="IQN", help="The LUNs of an iSCSI target; with --portal.")
@click.option("--nbd", metavar="HOST:PORT", help="The exports of an NBD server; with --tls.")
@PORTAL
@CHAP_USER
@CHAP_SECRET
@INITIATOR
@TLS
@click.option("--tls-hostname", metavar="NAME", help="Name in the server's certificate, if not its address.")
@click.option("--insecure", is_flag=True, help="NBD without TLS: everybody on the way can read and change the data.")
@click.option("--export", "exports", multiple=True, metavar="NAME", help="An export of a server that lists none.")
@WARN_AT
@NOTES
@click.option("--unchecked", is_flag=True, help="Also when it does not answer now.")
@click.pass_obj
def create_(settings: Settings, /, name: str, **given: Any) -> None:
    """Make a pool known to the host. Nothing is changed in it.

    \b
    hostler pool create fast --path /srv/fast
    hostler pool create media --library /srv/iso
    hostler pool create san --iscsi iqn.2020-01.com.example:vms --portal 10.0.0.5:3260
    hostler pool create far --nbd 10.0.0.6:10809 --tls /etc/pki/qemu
    """
    from hostler.model.pool import PoolCreate  # noqa: PLC0415 - pydantic only when it is needed

    request = parsing.request(PoolCreate, f"pool {name!r}", name=name, **_place(given), **_access(given))
    output.show(settings, settings.client.raw(calls.pool_create(request)), pool_views.pool)


def _place(given: dict[str, Any]) -> dict[str, Any]:
    """Its kind, by the option that names its place."""
    kinds = {"path": "directory", "library": "library", "iscsi": "iscsi", "nbd": "nbd"}
    named = [option for option in kinds if given[option]]
    if len(named) != 1:
        raise InvalidInput("pool", "its place is needed once", "give one of --path, --library, --iscsi and --nbd")
    place, portals = given[named[0]], [*given["portals"]]
    fields: dict[str, Any] = {"kind": kinds[named[0]], "notes": given["notes"], "warn_at": given["warn_at"]}
    fields |= {name: given[name] or None for name in ("tls_hostname", "insecure", "exports", "unchecked")}
    if named[0] in ("path", "library"):
        fields["path"] = parsing.absolute(place)
    if named[0] == "iscsi":
        fields["target"] = place
    if named[0] == "nbd":
        portals = [place, *portals]
    return {**fields, "portals": portals or None}


def _access(given: dict[str, Any]) -> dict[str, Any]:
    """Secrets, read from files here: the host may be another machine."""
    fields: dict[str, Any] = {"chap_user": given["chap_user"], "initiator": given["initiator"]}
    if given["chap_secret_file"]:
        fields["chap_secret"] = _read(given["chap_secret_file"]).rstrip("\r\n")
    if given["tls"]:
        directory = parsing.absolute(given["tls"])
        fields["tls"] = {field: _read(f"{directory}/{name}") for field, name in TLS_FILES.items()}
    return fields


def _read(path: str) -> str:
    try:
        with click.open_file(path, encoding="utf-8") as file:
            return str(file.read(65_537))
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"file {path}", f"cannot be read: {error}", "check the path") from error


@click.command("change", cls=Command)
@options.POOL
@WARN_AT
@NOTES
@PORTAL
@CHAP_USER
@CHAP_SECRET
@INITIATOR
@TLS
@click.pass_obj
def change_(settings: Settings, /, pool: str, **given: Any) -> None:
    """Change a pool's settings. Disks that are open keep what they were opened with until their VM starts again."""
    from hostler.model.pool import PoolChange  # noqa: PLC0415

    words = {"warn_at": given["warn_at"], "notes": given["notes"], "portals": given["portals"] or None}
    request = parsing.request(PoolChange, f"pool {pool!r}", **words, **_access(given))
    output.show(settings, settings.client.raw(calls.pool_change(pool, request)), pool_views.pool)


@click.command("delete", cls=Command)
@options.POOL
@options.DRY_RUN
@options.YES
@click.pass_obj
def delete_(settings: Settings, pool: str, dry_run: bool, yes: bool) -> None:
    """Forget a pool. What is in it stays; one with volumes on record is refused."""
    if not dry_run:
        output.confirm(f"Forget pool {pool}?", yes)
    content = settings.client.raw(calls.pool_delete(pool, dry_run=dry_run))
    output.show_or_say(settings, content, f"pool {pool} {'would be' if dry_run else 'is'} forgotten")


@click.command("scan", cls=Command)
@options.POOL
@click.option("--adopt", is_flag=True, help="Make volumes of images and LUNs that no record knows.")
@click.option("--delete-leftovers", is_flag=True, help="Remove half-made files nobody has written for an hour.")
@options.DRY_RUN
@click.pass_obj
def scan_(settings: Settings, pool: str, adopt: bool, delete_leftovers: bool, dry_run: bool) -> None:
    """Compare what is in a pool with what is on record. Without --adopt and --delete-leftovers it changes nothing."""
    from hostler.model.pool import PoolScan  # noqa: PLC0415

    request = parsing.request(
        PoolScan, f"pool {pool!r}", adopt=adopt, delete_leftovers=delete_leftovers, dry_run=dry_run
    )
    output.show(settings, settings.client.raw(calls.pool_scan(pool, request)), pool_views.scan)


@click.command("discover", cls=Command)
@click.argument("portal", metavar="HOST:PORT")
@CHAP_USER
@CHAP_SECRET
@INITIATOR
@click.pass_obj
def discover_(settings: Settings, /, portal: str, **given: Any) -> None:
    """List the targets that an iSCSI portal has. CHAP only where the portal asks for it already here."""
    from hostler.model.pool import Discover  # noqa: PLC0415

    request = parsing.request(Discover, f"portal {portal}", portals=[portal], **_access({**given, "tls": None}))
    output.show(settings, settings.client.raw(calls.pool_discover(request)), pool_views.targets)
