"""The group `hostler volume`."""

from __future__ import annotations

import click

from hostler.cli import completing, options, output, parsing, views, volume_views
from hostler.cli.lazy import Command, LazyGroup
from hostler.cli.settings import Settings
from hostler.cli.waiting import run_job
from hostler.client import calls

NAMES = ("list", "show", "create", "import", "register", "delete")
WORK = ("inspect", "validate", "checksum", "grow", "shrink", "convert", "compact", "clone")
FORMAT = click.option("--format", type=click.Choice(parsing.FORMATS), help="Format of the volume [qcow2].")
WHERE = click.option("--path", metavar="PATH", help="Where its file goes (default: into the pool).")
POOL = options.IN_POOL
PREALLOCATE = click.option(
    "--preallocate",
    type=click.Choice(["off", "metadata", "full"]),
    help="Take space now: tables (qcow2), or all of it (raw, qcow2, vhd-fixed) [off].",
)


CHAINS = ("chain", "flatten")
_LAZY = {**{name: f"volume:{name}_" for name in NAMES}, **{name: f"volume_work:{name}_" for name in WORK}}
_LAZY |= {name: f"volume_chain:{name}_" for name in CHAINS}


@click.group("volume", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Volumes: disk images in all formats. VOLUME is a name."""


@click.command("list", cls=Command)
@click.option("--pool", metavar="POOL", shell_complete=completing.pool_names, help="Only those in this pool.")
@click.pass_obj
def list_(settings: Settings, pool: str | None) -> None:
    """List the volumes of the host."""
    output.show(settings, settings.client.raw(calls.volumes(pool)), views.volumes)


@click.command("show", cls=Command)
@options.VOLUME
@click.pass_obj
def show_(settings: Settings, volume: str) -> None:
    """Show a volume, and what depends on it."""
    output.show(settings, settings.client.raw(calls.volume(volume)), _with_users)


def _with_users(found: views.Json) -> views.Facts:
    return views.Facts(views.volume(found).facts, (volume_views.users(found),))


@click.command("create", cls=Command)
@click.argument("name")
@click.argument("size", type=parsing.SIZE)
@FORMAT
@WHERE
@POOL
@PREALLOCATE
@options.WAIT
@click.pass_obj
def create_(
    settings: Settings,
    name: str,
    size: int,
    format: str | None,
    path: str | None,
    pool: str | None,
    preallocate: str | None,
    wait: bool,
) -> int:
    """Make an empty volume: hostler volume create data 20G --format vhdx"""
    from hostler.model.requests import VolumeCreate  # noqa: PLC0415 - pydantic only when it is needed

    place = path and parsing.absolute(path)
    request = parsing.request(
        VolumeCreate,
        f"volume {name!r}",
        name=name,
        size=size,
        format=format,
        path=place,
        pool=pool,
        preallocate=preallocate,
    )
    return run_job(settings, calls.volume_create(request), wait=wait, done=f"volume {name} is made")


@click.command("import", cls=Command)
@click.argument("name")
@click.argument("source", metavar="IMAGE")
@click.option("--source-format", type=click.Choice(parsing.FORMATS), help="Needed only for raw images.")
@click.option("--size", type=parsing.SIZE, metavar="SIZE", help="Make it larger than the image.")
@FORMAT
@WHERE
@POOL
@options.WAIT
@click.pass_obj
def import_(
    settings: Settings,
    name: str,
    source: str,
    source_format: str | None,
    size: int | None,
    format: str | None,
    path: str | None,
    pool: str | None,
    wait: bool,
) -> int:
    """Copy an image into a new volume, converting it. The image stays as it is."""
    from hostler.model.requests import VolumeCreate  # noqa: PLC0415

    request = parsing.request(
        VolumeCreate,
        f"volume {name!r}",
        name=name,
        source=parsing.absolute(source),
        source_format=source_format,
        size=size,
        format=format,
        path=path and parsing.absolute(path),
        pool=pool,
    )
    return run_job(settings, calls.volume_create(request), wait=wait, done=f"volume {name} is made from {source}")


@click.command("register", cls=Command)
@click.argument("name")
@click.argument("path")
@click.option("--format", type=click.Choice(parsing.FORMATS), help="Needed only for raw images.")
@click.pass_obj
def register_(settings: Settings, name: str, path: str, format: str | None) -> None:
    """Make an image that exists a volume, where it is."""
    from hostler.model.requests import VolumeRegister  # noqa: PLC0415

    place = parsing.absolute(path)
    request = parsing.request(VolumeRegister, f"volume {name!r}", name=name, path=place, format=format)
    output.show(settings, settings.client.raw(calls.volume_register(request)), views.volume)


@click.command("delete", cls=Command)
@options.VOLUME
@click.option("--keep-file", is_flag=True, help="Only forget the volume, leave its file.")
@options.DRY_RUN
@options.YES
@click.pass_obj
def delete_(settings: Settings, volume: str, keep_file: bool, dry_run: bool, yes: bool) -> None:
    """Delete a volume and its file. One that a VM uses is refused."""
    if not dry_run:
        question = f"Forget volume {volume}, keeping its file?" if keep_file else f"Delete volume {volume} for good?"
        output.confirm(question, yes)
    content = settings.client.raw(calls.volume_delete(volume, keep_file=keep_file, dry_run=dry_run))
    output.show(settings, content, lambda found: views.deleted(found, f"volume {volume}", dry_run=dry_run))
