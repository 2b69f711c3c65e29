"""Names for shell completion, asked from the host: quick, and silent when there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.model.errors import HostlerError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hostler.client.calls import Call

DEADLINE = 1.0
"""Seconds; a person who pressed Tab waits no longer."""


def _names(
    context: click.Context,
    call: Call[Any],
    pick: Callable[[Any], tuple[str, str]],
    incomplete: str,
    part: str | None = None,
) -> list[CompletionItem]:
    """`part`: the list is this field of the configuration of the answered VM."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only when a shell asks

    settings = context.ensure_object(Settings)
    try:
        content = settings.client.transport.send(call, DEADLINE)
        answer = json.loads(content)
        found = [pick(item) for item in (answer if part is None else answer["config"][part])]
    except (HostlerError, ValueError, KeyError):
        return []
    finally:
        settings.close()
    return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)]


def vm_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.vms(), lambda vm: (vm["config"]["name"], vm["state"]), incomplete)


def volume_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.volumes(), lambda volume: (volume["name"], volume["format"]), incomplete)


def pool_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.pools(), lambda pool: (pool["name"], pool["kind"]), incomplete)


def host_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.hosts(), lambda host: (host["name"], host["address"]), incomplete)


def job_ids(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.jobs(), lambda job: (job["id"], f"{job['kind']} {job['state']}"), incomplete)


def _vm(context: click.Context) -> str:
    return context.params.get("vm") or "unnamed"


def disk_ids(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(
        context, calls.vm(_vm(context)), lambda disk: (disk["id"], disk["source"]["path"]), incomplete, "disks"
    )


def nic_ids(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.vm(_vm(context)), lambda nic: (nic["id"], nic["mac"]), incomplete, "nics")


def checkpoint_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, calls.checkpoints(_vm(context)), lambda found: (found["name"], found["created"]), incomplete)
