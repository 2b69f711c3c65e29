"""Making volumes for a command that then uses them: on failure, or Ctrl-C, what was made is removed again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from hostler.cli import parsing
from hostler.cli.output import hint, say
from hostler.cli.settings import Settings
from hostler.cli.waiting import Follower, raise_failure
from hostler.client import calls
from hostler.model.errors import HostlerError, InvalidInput
from hostler.model.units import format_size, parse_size

if TYPE_CHECKING:
    from hostler.model.requests import DiskAdd, VolumeCreate

_OF_VOLUME = ("name", "path", "format")


class NewDisk:
    """`SIZE[,format=vhdx][,name=...][,path=...][,bus=...]`: a volume to make and the disk it becomes."""

    def __init__(self, text: str) -> None:
        """InvalidInput when it is not understood."""
        head, options = parsing.split_options(text, parsing.NEW_DISK_KEYS, "new disk")
        self.size = parse_size(head)
        self.name = options.get("name")
        self._what = f"new disk {text!r}"
        self._volume = {key: value for key, value in options.items() if key in _OF_VOLUME}
        self._disk = {key: value for key, value in options.items() if key not in _OF_VOLUME}

    def volume(self, name: str) -> VolumeCreate:
        """The request that makes the volume."""
        from hostler.model.requests import VolumeCreate  # noqa: PLC0415 - pydantic only when it is needed

        fields: dict[str, Any] = {**self._volume, "name": name, "size": self.size}
        if "path" in fields:
            fields["path"] = parsing.absolute(fields["path"])
        return parsing.request(VolumeCreate, self._what, **fields)

    def disk(self, name: str) -> DiskAdd:
        """The request that attaches it."""
        from hostler.model.requests import DiskAdd  # noqa: PLC0415

        return parsing.request(DiskAdd, self._what, volume=name, **parsing.disk_fields(self._disk, self._what))


def free_names(settings: Settings, stem: str, new: Iterable[NewDisk]) -> list[str]:
    """A volume name for each: its own, or the first free one of stem, stem-2, stem-3, ..."""
    new = list(new)
    taken = {disk.name for disk in new if disk.name}
    if any(disk.name is None for disk in new):
        taken |= {volume["name"] for volume in json.loads(settings.client.raw(calls.volumes()))}
    names = []
    for disk in new:
        name, number = disk.name or stem, 1
        while disk.name is None and name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(name)
    return names


def describe(new: NewDisk, name: str) -> str:
    """What would be made, for --dry-run."""
    request = new.volume(name)
    return f"would make volume {name}, {format_size(new.size)}, {request.format}"


def make(settings: Settings, undo: ExitStack, request: VolumeCreate) -> None:
    """Makes a volume, waits for it, and puts its removal on the undo stack."""
    job = json.loads(content := settings.client.raw(calls.volume_create(request)))
    follower = Follower(settings, job, content, None)
    try:
        follower.follow()
    except KeyboardInterrupt:
        settings.client.raw(calls.job_cancel(job["id"]))
        follower.follow()
        if follower.job["state"] == "done":
            _remove(settings, request.name)
        raise click.Abort from None
    raise_failure(follower.job)
    say(settings, f"volume {request.name} is made")
    undo.callback(_remove, settings, request.name)


def _remove(settings: Settings, name: str) -> None:
    try:
        settings.client.raw(calls.volume_delete(name))
    except HostlerError as error:
        text = f"volume {name}, made for this, could not be removed again: {error.cause}"
    else:
        text = f"volume {name}, made for this, is removed again"
    if not settings.json:  # there the error alone is on stderr
        hint(text)


def only_with(given: bool, needed: bool, option: str, other: str) -> None:
    """InvalidInput when `option` was given without the `other` it belongs to."""
    if given and not needed:
        raise InvalidInput(f"option {option}", f"makes sense only with {other}", f"give {other}, or leave it out")
