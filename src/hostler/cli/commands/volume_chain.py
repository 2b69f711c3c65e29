"""`hostler volume chain` and `hostler volume flatten`."""

from __future__ import annotations

import click

from hostler.cli import options, output, parsing
from hostler.cli.chain_view import tree
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.cli.waiting import run_job
from hostler.client import calls

SEARCH = click.option(
    "--search",
    multiple=True,
    metavar="DIRECTORY",
    help="Look for parents here too, beside each image's own directory (repeatable).",
)


@click.command("chain", cls=Command)
@click.argument("path")
@SEARCH
@click.pass_obj
def chain_(settings: Settings, path: str, search: tuple[str, ...]) -> None:
    """Show an image with its parents, or all images of a directory, as a tree, and check every link."""
    from hostler.model.chain import ChainRequest  # noqa: PLC0415 - pydantic only when it is needed

    places = tuple(parsing.absolute(place) for place in search)
    request = parsing.request(ChainRequest, f"path {path!r}", path=parsing.absolute(path), search=places)
    output.show(settings, settings.client.raw(calls.volume_chain(request)), tree)


@click.command("flatten", cls=Command)
@click.argument("source", metavar="IMAGE")
@click.argument("name")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Format of the volume [qcow2].")
@click.option("--size", type=parsing.SIZE, metavar="SIZE", help="Make it larger than the image.")
@click.option("--path", metavar="PATH", help="Where its file goes (default: the host's volume directory).")
@SEARCH
@options.WAIT
@click.pass_obj
def flatten_(
    settings: Settings,
    source: str,
    name: str,
    format: str | None,
    size: int | None,
    path: str | None,
    search: tuple[str, ...],
    wait: bool,
) -> int:
    """Make one whole volume of a differencing image and its parents, which stay as they are.

    Goes on by itself after a restart of the host's daemon.
    """
    from hostler.model.chain import FlattenRequest  # noqa: PLC0415

    request = parsing.request(
        FlattenRequest,
        f"volume {name!r}",
        name=name,
        source=parsing.absolute(source),
        format=format,
        size=size,
        path=path and parsing.absolute(path),
        search=tuple(parsing.absolute(place) for place in search),
    )
    return run_job(settings, calls.volume_flatten(request), wait=wait, done=f"volume {name} is made from {source}")
