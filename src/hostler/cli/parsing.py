"""From the words of a command line to the requests of the API: sizes, disk, adapter and new-disk descriptions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hostler.model.errors import InvalidInput
from hostler.model.names import nearest
from hostler.model.units import parse_size

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hostler.model.requests import DiskAdd, NicAdd

M = TypeVar("M", bound="BaseModel")

_OPTION = re.compile(r"^([a-z][a-z-]*)=(.*)$", re.DOTALL)
_TRUE, _FALSE = frozenset({"yes", "true", "on", "1"}), frozenset({"no", "false", "off", "0"})

DISK_KEYS = ("bus", "controller", "unit", "media", "read-only", "cache", "discard", "serial", "format")
NEW_DISK_KEYS = ("name", "path", "format", "bus", "controller", "unit", "cache", "discard", "serial")
NIC_KEYS = ("mac", "queues")
FORMATS = ("qcow2", "raw", "vhd", "vhd-fixed", "vhdx")


if TYPE_CHECKING:
    _SizeBase = click.ParamType[int]
else:  # only newer versions of click have it generic
    _SizeBase = click.ParamType


class Size(_SizeBase):
    """A size such as 20G, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except InvalidInput as error:
            self.fail(f"{error.object} {error.cause}: {error.advice}", param, ctx)


SIZE = Size()


def request(model: type[M], what: str, **fields: Any) -> M:
    """A request from those fields that were given (not None). InvalidInput names the field that is wrong."""
    from pydantic import ValidationError  # noqa: PLC0415 - slow to import, and `--help` needs none

    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(what, f"{place}: {text}" if place else text, "see --help of this command") from error


def split_options(text: str, known: tuple[str, ...], what: str) -> tuple[str, dict[str, str]]:
    """ "web1,bus=ide" as ("web1", {"bus": "ide"}). Only what follows the last plain word is taken as options, so that a
    path may hold commas. InvalidInput for an unknown or repeated option."""
    head, *rest = text.split(",")
    options: dict[str, str] = {}
    while rest:
        match = _OPTION.match(rest[-1])
        if match is None:
            return ",".join([head, *rest]), options
        key, value = match.groups()
        if key not in known:
            near = nearest(key, known)
            advice = f"did you mean {near!r}?" if near else f"known are: {', '.join(known)}"
            raise InvalidInput(f"{what} {text!r}", f"there is no option {key!r}", advice)
        if key in options:
            raise InvalidInput(f"{what} {text!r}", f"the option {key!r} stands there twice", "leave one out")
        options[key] = value
        rest.pop()
    return head, options


def absolute(path: str) -> str:
    """A path as the host, which has another working directory, understands it."""
    return os.path.abspath(os.path.expanduser(path))


def disk_source(head: str) -> dict[str, str]:
    """A word with a slash is a path (below /dev: a device to pass through), any other the name of a volume."""
    if "/" not in head:
        return {"volume": head}
    path = absolute(head)
    return {"device": path} if path.startswith("/dev/") else {"volume": path}


def disk_fields(options: Mapping[str, str], what: str) -> dict[str, Any]:
    """Options of a disk as fields of a DiskAdd."""
    fields: dict[str, Any] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        fields[name] = yes_or_no(value, f"{what}, {key}") if key in ("read-only", "discard") else value
    return fields


def yes_or_no(text: str, what: str) -> bool:
    """InvalidInput for anything that is neither."""
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise InvalidInput(what, f"{text!r} is neither yes nor no", "write yes or no")


def disk(text: str) -> DiskAdd:
    """`--disk PATH-OR-VOLUME[,key=value...]`."""
    from hostler.model.requests import DiskAdd  # noqa: PLC0415

    what = f"disk {text!r}"
    head, options = split_options(text, DISK_KEYS, "disk")
    return request(DiskAdd, what, **disk_source(head), **disk_fields(options, what))


def cdrom(path: str) -> DiskAdd:
    """`--cdrom ISO|none`: on IDE, where every firmware and installer finds it."""
    return _drive("cdrom", path, bus="ide", media="cdrom", read_only=True)


def floppy(path: str) -> DiskAdd:
    """`--floppy IMAGE|none`."""
    return _drive("floppy", path, media="floppy")


def _drive(what: str, path: str, **fields: Any) -> DiskAdd:
    """A drive with the medium in that file, or without one. A file that is called "none" is written "./none"."""
    from hostler.model.requests import DiskAdd  # noqa: PLC0415

    medium = {} if path == "none" else {"volume": absolute(path), "format": "raw"}
    return request(DiskAdd, f"{what} {path!r}", **medium, **fields)


def nic(text: str) -> NicAdd:
    """`--nic user|none|bridge:NAME[,mac=...][,queues=N]`."""
    from hostler.model.requests import NicAdd  # noqa: PLC0415

    head, options = split_options(text, NIC_KEYS, "nic")
    network, _, bridge = head.partition(":")
    if network not in ("user", "none", "bridge"):
        raise InvalidInput(f"nic {text!r}", f"there is no network {network!r}", "write user, none or bridge:NAME")
    if (network == "bridge") != bool(bridge):
        raise InvalidInput(f"nic {text!r}", "a bridge, and only a bridge, has a name", "write bridge:br0")
    options = {key: value.lower() if key == "mac" else value for key, value in options.items()}
    return request(NicAdd, f"nic {text!r}", network=network, bridge=bridge or None, **options)
