"""Block graph, disks and image locks of the fake QEMU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from pydantic import JsonValue

Arguments = Mapping[str, JsonValue]

CONTROLLERS = 1
"""SCSI controllers of a fake machine."""

_PATTERN = {"qcow2": b"QFI\xfb", "vhdx": b"vhdxfile", "vpc": b"conectix"}


class QmpError(Exception):
    """An error reply."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        self.desc = desc
        self.error_class = error_class
        super().__init__(desc)


class Emit(Protocol):
    """Sends an event."""

    def __call__(self, event: str, data: dict[str, JsonValue] | None = None) -> None: ...


@dataclass
class _Node:
    """A block node: its file, the node below it, and who uses it."""

    file: str
    writable: bool
    child: str | None = None
    user: str | None = None


@dataclass(frozen=True)
class _Device:
    node: str
    place: str


class Locks:
    """Image locks of all fakes of this process: path to the one that writes."""

    def __init__(self) -> None:
        self._writers: dict[str, object] = {}

    def take(self, path: str, owner: object) -> None:
        """Refused, in QEMU's words, when another has it."""
        if self._writers.setdefault(os.path.realpath(path), owner) is not owner:
            raise QmpError('Failed to get "write" lock')

    def free(self, path: str, owner: object) -> None:
        """Harmless when it is not the owner's."""
        if self._writers.get(os.path.realpath(path)) is owner:
            del self._writers[os.path.realpath(path)]

    def taken(self, path: str) -> bool:
        """Whether anybody writes it."""
        return os.path.realpath(path) in self._writers


LOCKS = Locks()


class FakeBlocks:
    """The disks of one fake QEMU."""

    def __init__(self, emit: Emit, active: bool) -> None:
        self._emit = emit
        self._nodes: dict[str, _Node] = {}
        self._devices: dict[str, _Device] = {}
        self._later: list[Callable[[], None]] = []
        self.active = active
        """Whether disks are open for writing (not before `cont` on a migration's target)."""
        self.unplug_refused = False
        """Whether the guest refuses to let devices go (DEVICE_UNPLUG_GUEST_ERROR)."""
        self.unplug_ignored = False
        """Whether the guest does not answer to an unplug."""
        self.io_status: dict[str, str] = {}
        """Device id to a status other than ok."""

    def blockdev_add(self, arguments: Arguments) -> JsonValue:
        inner = arguments.get("file")
        lower = cast(Arguments, inner) if isinstance(inner, Mapping) else arguments
        name = str(arguments["node-name"])
        child = str(lower["node-name"]) if lower is not arguments and "node-name" in lower else None
        for new in (child, name):
            if new in self._nodes:
                raise QmpError(f"Duplicate nodes with node-name='{new}'")
        path = str(lower.get("filename", ""))
        _check_image(path, str(arguments["driver"]))
        writable = not arguments.get("read-only", False)
        if child is not None:
            self._nodes[child] = _Node(path, writable, user=f"node {name}")
        self._nodes[name] = _Node(path, writable, child)
        return {}

    def blockdev_del(self, arguments: Arguments) -> JsonValue:
        name = str(arguments["node-name"])
        node = self._nodes.get(name)
        if node is None:
            raise QmpError(f"Failed to find node with node-name='{name}'")
        if node.user is not None:
            raise QmpError(f"Node {name} is in use")
        del self._nodes[name]
        if node.child is not None:
            del self._nodes[node.child]
        return {}

    def query_nodes(self) -> JsonValue:
        return [{"node-name": name, "file": node.file, "drv": "raw", "ro": False} for name, node in self._nodes.items()]

    def query_block(self) -> JsonValue:
        return [
            {
                "device": "",
                "qdev": name,
                "io-status": self.io_status.get(name, "ok"),
                "inserted": {"node-name": device.node},
            }
            for name, device in self._devices.items()
        ]

    def device_add(self, arguments: Arguments) -> JsonValue:
        name, drive = str(arguments["id"]), str(arguments.get("drive"))
        place = f"lun {arguments.get('lun')}"
        taken = next((other for other, device in self._devices.items() if device.place == place), None)
        if name in self._devices:
            raise QmpError(f"Duplicate device ID '{name}'")
        if arguments.get("bus") not in [f"scsi{index}.0" for index in range(CONTROLLERS)]:
            raise QmpError(f"Bus '{arguments.get('bus')}' not found")
        if drive not in self._nodes:
            raise QmpError(f"Property '{arguments['driver']}.drive' can't find value '{drive}'")
        if taken is not None:
            raise QmpError(f"lun already used by '{taken}'")
        self._lock_for(self._nodes[drive])
        self._nodes[drive].user = name
        self._devices[name] = _Device(drive, place)
        return {}

    def device_del(self, arguments: Arguments) -> JsonValue:
        name = str(arguments["id"])
        if name not in self._devices:
            raise QmpError(f"Device '{name}' not found", "DeviceNotFound")
        data: dict[str, JsonValue] = {"device": name, "path": f"/machine/peripheral/{name}"}
        if self.unplug_refused:
            self._later.append(lambda: self._emit("DEVICE_UNPLUG_GUEST_ERROR", data))
        elif not self.unplug_ignored:
            self._later.append(lambda: self._unplug(name, data))
        return {}

    def devices(self) -> list[str]:
        """Ids of the devices."""
        return list(self._devices)

    def after_reply(self) -> None:
        """What comes after the reply to a command."""
        later, self._later = self._later, []
        for action in later:
            action()

    def activate(self) -> None:
        """Take the locks of all disks that are written to; all or none."""
        taken: list[str] = []
        try:
            for node in self._written():
                LOCKS.take(node.file, self)
                taken.append(node.file)
        except QmpError:
            if not self.active:
                for path in taken:
                    LOCKS.free(path, self)
            raise
        self.active = True

    def release(self) -> None:
        """Free all locks (the other side of a move may have them, or this one has ended)."""
        self.active = False
        for node in self._written():
            LOCKS.free(node.file, self)

    def _written(self) -> list[_Node]:
        return [node for node in self._nodes.values() if node.writable and node.user in self._devices]

    def _lock_for(self, node: _Node) -> None:
        if not (self.active and node.writable):
            return
        if any(other.file == node.file for other in self._written()):
            raise QmpError('Failed to get "write" lock')
        LOCKS.take(node.file, self)

    def _unplug(self, name: str, data: dict[str, JsonValue]) -> None:
        node = self._nodes[self._devices.pop(name).node]
        node.user = None
        LOCKS.free(node.file, self)
        self._emit("DEVICE_DELETED", data)


def _check_image(path: str, driver: str) -> None:
    """Refuse what QEMU refuses to open, in its words."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise QmpError(f"Could not open '{path}': {error.strerror}") from error
    pattern = _PATTERN.get(driver)
    if pattern is not None and not head.startswith(pattern):
        raise QmpError(f"Image is not in {driver} format")
