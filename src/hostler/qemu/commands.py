"""QMP commands as typed functions, under QEMU's own names: only those Hostler uses, no logic.

All raise what `QmpSession.execute` raises. Names and shapes are those of QEMU's qapi/*.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from pydantic import JsonValue

from hostler.model.errors import QemuFailed
from hostler.model.machine import RunStatus
from hostler.qemu.network_disks import reach
from hostler.qemu.qmp import COMMAND_DEADLINE, QmpSession

Options = Mapping[str, JsonValue]

BLOCK_DEADLINE = 30.0
"""Seconds to open or close an image: on slow shared storage its metadata and locks take their time."""

PERIPHERALS = "/machine/peripheral"
"""Where in QOM the devices with an id are."""


@contextmanager
def understood(qmp: QmpSession, command: str) -> Iterator[None]:
    """QemuFailed when the answer to a command has not the shape it must have: QEMU may have been taken over by its
    guest, and may be newer than we are."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QemuFailed(
            qmp.name, f"QEMU's answer to {command} is not understood", command=command, reason=repr(error)[:200]
        ) from error


async def query_status(qmp: QmpSession, deadline: float = COMMAND_DEADLINE) -> RunStatus:
    """The run state."""
    info = cast(dict[str, JsonValue], await qmp.execute("query-status", deadline=deadline))
    with understood(qmp, "query-status"):
        return RunStatus(str(info["status"]))


async def cont(qmp: QmpSession) -> None:
    """Start the processors; opens inactive disks for writing first, which takes the image locks."""
    await qmp.execute("cont", deadline=BLOCK_DEADLINE)


async def stop(qmp: QmpSession) -> None:
    """Stop the processors; waits for disk requests under way."""
    await qmp.execute("stop", deadline=BLOCK_DEADLINE)


async def system_powerdown(qmp: QmpSession) -> None:
    """Press the ACPI power button."""
    await qmp.execute("system_powerdown")


async def system_reset(qmp: QmpSession) -> None:
    """Press reset."""
    await qmp.execute("system_reset")


async def quit_(qmp: QmpSession, deadline: float) -> None:
    """End QEMU."""
    await qmp.execute("quit", deadline=deadline)


async def set_link(qmp: QmpSession, device: str, up: bool) -> None:
    """Plug an adapter's cable in or out."""
    await qmp.execute("set_link", {"name": device, "up": up})


async def screendump(qmp: QmpSession, path: str) -> None:
    """Write the screen to a file that QEMU makes, as PNG."""
    await qmp.execute("screendump", {"filename": path, "format": "png"})


async def announce_self(qmp: QmpSession) -> None:
    """Five RARP announcements for each adapter, the first at once; delays in ms (QEMU's own defaults)."""
    await qmp.execute("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100})


async def blockdev_add(qmp: QmpSession, options: Options) -> None:
    """Make a block graph."""
    await qmp.execute("blockdev-add", reach(options, qmp.connections), deadline=BLOCK_DEADLINE)


async def blockdev_del(qmp: QmpSession, node: str) -> None:
    """Remove a block graph that no device uses."""
    await qmp.execute("blockdev-del", {"node-name": node}, deadline=BLOCK_DEADLINE)


async def device_add(qmp: QmpSession, options: Options) -> None:
    """Plug a device in."""
    await qmp.execute("device_add", options, deadline=BLOCK_DEADLINE)


async def device_del(qmp: QmpSession, device: str) -> None:
    """Ask for a device to be unplugged; DEVICE_DELETED tells that it was."""
    await qmp.execute("device_del", {"id": device})


async def peripherals(qmp: QmpSession) -> frozenset[str]:
    """Ids of all devices that have one."""
    listed = cast(Sequence[Options], await qmp.execute("qom-list", {"path": PERIPHERALS}))
    with understood(qmp, "qom-list"):
        return frozenset(str(item["name"]) for item in listed if str(item["type"]).startswith("child<"))


async def io_statuses(qmp: QmpSession) -> dict[str, str]:
    """Device id to io-status, "ok" where all is well, for every device with a block graph."""
    devices = cast(Sequence[Options], await qmp.execute("query-block", deadline=BLOCK_DEADLINE))
    with understood(qmp, "query-block"):
        # qdev is the id, or the QOM path of what is behind the id (CD drives).
        found = ((str(d.get("qdev", "")), str(d.get("io-status", "ok"))) for d in devices)
        return {qdev.removeprefix(f"{PERIPHERALS}/").split("/")[0]: status for qdev, status in found if qdev}


async def block_nodes(qmp: QmpSession) -> dict[str, str]:
    """Names of all block nodes, with the file name of each."""
    nodes = cast(Sequence[Options], await qmp.execute("query-named-block-nodes", {"flat": True}))
    with understood(qmp, "query-named-block-nodes"):
        return {str(node["node-name"]): str(node["file"]) for node in nodes}


async def object_add(qmp: QmpSession, options: Options) -> None:
    """Make an object."""
    await qmp.execute("object-add", options)


async def object_del(qmp: QmpSession, name: str) -> bool:
    """Remove an object; False if there was none."""
    try:
        await qmp.execute("object-del", {"id": name})
    except QemuFailed as error:
        if "not found" in error.cause:
            return False
        raise
    return True


async def getfd(qmp: QmpSession, name: str, fd: int) -> None:
    """Give QEMU a copy of a file descriptor under a name; one that is there is replaced."""
    await qmp.execute_with_fd(fd, "getfd", {"fdname": name})


async def closefd(qmp: QmpSession, name: str) -> None:
    """Close a named file descriptor that no command took; harmless if there is none."""
    try:
        await qmp.execute("closefd", {"fdname": name})
    except QemuFailed as error:
        if error.details.get("gone") or "not found" not in error.cause:
            raise


async def migrate(qmp: QmpSession, uri: str) -> None:
    """Start sending the state."""
    await qmp.execute("migrate", {"uri": uri})


async def migrate_incoming(qmp: QmpSession, uri: str) -> None:
    """Start receiving the state (of a QEMU started with `-incoming defer`)."""
    await qmp.execute("migrate-incoming", {"uri": uri})


async def migrate_continue(qmp: QmpSession) -> None:
    """Go on after the pause before the switch-over."""
    await qmp.execute("migrate-continue", {"state": "pre-switchover"})


async def migrate_cancel(qmp: QmpSession) -> None:
    """Stop sending; harmless when nothing is sent."""
    await qmp.execute("migrate_cancel")


async def migrate_set_capabilities(qmp: QmpSession, capabilities: Mapping[str, bool]) -> None:
    """Switch capabilities on and off."""
    states = [{"capability": name, "state": state} for name, state in capabilities.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": states})


async def migrate_set_parameters(qmp: QmpSession, parameters: Options) -> None:
    """Set parameters."""
    await qmp.execute("migrate-set-parameters", parameters)


async def query_migrate(qmp: QmpSession, deadline: float = COMMAND_DEADLINE) -> Options:
    """MigrationInfo: empty when there never was a migration."""
    info = await qmp.execute("query-migrate", deadline=deadline)
    with understood(qmp, "query-migrate"):
        return dict(cast(Options, info))
