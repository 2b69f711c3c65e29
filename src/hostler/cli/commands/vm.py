"""The group `hostler vm`."""

from __future__ import annotations

import click

from hostler.cli.lazy import LazyGroup


@click.group(
    "vm",
    cls=LazyGroup,
    lazy={
        "list": "vm_list:list_",
        "show": "vm_list:show",
        "create": "vm_create:create",
        "start": "vm_power:start",
        "shutdown": "vm_power:shutdown",
        "turn-off": "vm_power:turn_off",
        "reset": "vm_power:reset",
        "pause": "vm_power:pause",
        "resume": "vm_power:resume",
        "save": "vm_power:save",
        "restore": "vm_power:restore",
        "discard-saved": "vm_power:discard_saved",
        "move": "vm_move:move",
        "move-storage": "vm_storage:move_storage",
        "rename": "vm_change:rename",
        "set": "vm_change:set_",
        "delete": "vm_change:delete",
        "console": "vm_console:console",
        "screenshot": "vm_console:screenshot",
    },
)
def group() -> None:
    """Virtual machines: create, run, move between hosts. VM is a name or an id."""
