"""`hostler volume ...` for volumes that are there: looking into them and changing them while no VM has them open."""

from __future__ import annotations

import click

from hostler.cli import options, output, parsing, volume_views
from hostler.cli.exit_codes import Exit
from hostler.cli.lazy import Command
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.cli.waiting import run_job
from hostler.client import calls
from hostler.model.units import format_size


@click.command("inspect", cls=Command)
@click.argument("image", metavar="VOLUME|PATH", shell_complete=options.complete_volumes)
@click.pass_obj
def inspect_(settings: Settings, image: str) -> None:
    """Look into a volume, or into an image on the host without making it a volume: format, sizes, where its content is,
    who made it and when. Changes nothing."""
    if "/" not in image:
        content = settings.client.raw(calls.volume_details(image))
    else:
        from hostler.model.requests import InspectRequest  # noqa: PLC0415 - pydantic only when it is needed

        request = parsing.request(InspectRequest, f"image {image!r}", path=parsing.absolute(image))
        content = settings.client.raw(calls.volume_inspect(request))
    output.show(settings, content, volume_views.image)


@click.command("validate", cls=Command)
@options.VOLUME
@click.option("--repair", is_flag=True, help="Put right what can be: lost space, a log, counts, a VHD's footer.")
@options.WAIT
@click.pass_obj
def validate_(settings: Settings, volume: str, repair: bool, wait: bool) -> int:
    """Check that a volume's image is sound. The exit code is 1 when it is not."""
    from hostler.model.volume_requests import VolumeValidate  # noqa: PLC0415

    verdicts: list[str] = []

    def done(job: Json) -> str:
        verdicts.append(job["result"]["verdict"])
        return volume_views.verdict(volume, job["result"])

    call = calls.volume_act(volume, "validate", VolumeValidate(repair=repair))
    code = run_job(settings, call, wait=wait, done=done)
    return Exit.FAILURE if code == Exit.OK and verdicts and verdicts[0] not in ("sound", "leaks") else code


@click.command("checksum", cls=Command)
@options.VOLUME
@options.WAIT
@click.pass_obj
def checksum_(settings: Settings, volume: str, wait: bool) -> int:
    """SHA-256 of all that a guest would read: the same whatever the format. Prints it as sha256sum does."""
    return run_job(settings, calls.volume_act(volume, "checksum"), wait=wait, done=volume_views.checksum)


@click.command("grow", cls=Command)
@options.VOLUME
@click.argument("size", type=parsing.SIZE)
@options.WAIT
@click.pass_obj
def grow_(settings: Settings, volume: str, size: int, wait: bool) -> int:
    """Make a volume larger, in place: hostler volume grow data 40G"""
    from hostler.model.volume_requests import VolumeGrow  # noqa: PLC0415

    request = parsing.request(VolumeGrow, f"volume {volume!r}", size=size)
    done = f"volume {volume} has {format_size(size)} now"
    return run_job(settings, calls.volume_act(volume, "grow", request), wait=wait, done=done)


@click.command("shrink", cls=Command)
@options.VOLUME
@click.argument("size", type=parsing.SIZE)
@click.option("--discard-data", is_flag=True, help="Even if partitions or data lie behind the new end: they are lost.")
@options.DRY_RUN
@options.YES
@options.WAIT
@click.pass_obj
def shrink_(
    settings: Settings, volume: str, size: int, discard_data: bool, dry_run: bool, yes: bool, wait: bool
) -> int:
    """Make a volume smaller, in place, if no partition and nothing but zeroes lies behind its new end."""
    from hostler.model.volume_requests import VolumeShrink  # noqa: PLC0415

    if discard_data and not dry_run:
        output.confirm(f"Cut volume {volume} at {format_size(size)} and lose what lies behind it?", yes)
    request = parsing.request(VolumeShrink, f"volume {volume!r}", size=size, discard_data=discard_data, dry_run=dry_run)

    def done(job: Json) -> str:
        lost = "; ".join(job["result"].get("obstacles", ())) if dry_run else ""
        if lost:
            return f"would lose: {lost}"
        return f"volume {volume} {'could have' if dry_run else 'has'} {format_size(size)}{'' if dry_run else ' now'}"

    return run_job(settings, calls.volume_act(volume, "shrink", request), wait=wait, done=done)


@click.command("convert", cls=Command)
@options.VOLUME
@click.option("--format", type=click.Choice(parsing.FORMATS), required=True, help="The format it gets.")
@click.option("--name", metavar="NAME", help="Make a new volume of that name; this one stays as it is.")
@click.option("--replace", is_flag=True, help="In its own place: it keeps its name, and its old file goes.")
@click.option("--to", "path", metavar="PATH", help="Where the new file goes.")
@options.IN_POOL
@options.WAIT
@click.pass_obj
def convert_(
    settings: Settings,
    volume: str,
    format: str,
    name: str | None,
    replace: bool,
    path: str | None,
    pool: str | None,
    wait: bool,
) -> int:
    """Convert a volume to another format: into a new one (--name), or in its place (--replace)."""
    from hostler.model.volume_requests import VolumeConvert  # noqa: PLC0415

    request = parsing.request(
        VolumeConvert,
        f"volume {volume!r}",
        format=format,
        name=name,
        replace=replace or None,
        path=path and parsing.absolute(path),
        pool=pool,
    )
    done = f"volume {volume} is a {format} now" if replace else f"volume {name} is made from {volume}"
    return run_job(settings, calls.volume_act(volume, "convert", request), wait=wait, done=done)


@click.command("compact", cls=Command)
@options.VOLUME
@click.option("--in-place", is_flag=True, help="Make holes in its file, which needs no space for a copy.")
@options.WAIT
@click.pass_obj
def compact_(settings: Settings, volume: str, in_place: bool, wait: bool) -> int:
    """Give back what zeroes and unused parts of a volume take. Trim, or fill with zeroes, inside the guest first."""
    from hostler.model.volume_requests import VolumeCompact  # noqa: PLC0415

    def done(job: Json) -> str:
        return f"volume {volume} takes {format_size(job['result']['allocated'])} now"

    request = VolumeCompact(in_place=in_place)
    return run_job(settings, calls.volume_act(volume, "compact", request), wait=wait, done=done)


@click.command("clone", cls=Command)
@options.VOLUME
@click.argument("name")
@click.option("--path", metavar="PATH", help="Where its file goes.")
@options.IN_POOL
@options.WAIT
@click.pass_obj
def clone_(settings: Settings, volume: str, name: str, path: str | None, pool: str | None, wait: bool) -> int:
    """Copy a volume under a new name. Where the file system can, both share their blocks, and it takes a moment."""
    from hostler.model.volume_requests import VolumeClone  # noqa: PLC0415

    place = path and parsing.absolute(path)
    request = parsing.request(VolumeClone, f"volume {volume!r}", name=name, path=place, pool=pool)
    done = f"volume {name} is made from {volume}"
    return run_job(settings, calls.volume_act(volume, "clone", request), wait=wait, done=done)
