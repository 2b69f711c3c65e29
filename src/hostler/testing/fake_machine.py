"""What the fake QEMU knows and does: run state, objects, descriptors, and its table of commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from hostler.model.machine import RunStatus
from hostler.testing.fake_blocks import Arguments, Emit, FakeBlocks, QmpError
from hostler.testing.fake_migration import FakeMigration, StartTask, go_on

PNG = b"\x89PNG\r\n\x1a\n"


class FakeMachine:
    """The state of one fake QEMU. `emit` sends an event, `die` ends it, `start` runs something beside."""

    def __init__(self, *, incoming: bool, emit: Emit, die: Callable[[], None], start: StartTask) -> None:
        self.emit = emit
        self.die = die
        self.start = start
        self.incoming = incoming
        self.status = RunStatus.INMIGRATE if incoming else RunStatus.PRELAUNCH
        self.quitting = False
        self.blocks = FakeBlocks(emit, active=not incoming)
        self.migration = FakeMigration(self)
        self._objects: dict[str, Arguments] = {}
        self._fds: dict[str, int] = {}

    def query_status(self) -> JsonValue:
        return {"status": self.status.value, "singlestep": False, "running": self.status is RunStatus.RUNNING}

    def cont(self) -> JsonValue:
        if self.status is RunStatus.FINISH_MIGRATE:
            raise QmpError("Migration is not finalized yet")
        if self.status is RunStatus.INMIGRATE:
            self.migration.autostart = True
        elif self.status is not RunStatus.RUNNING:
            self.blocks.activate()
            self.set_running()
        return {}

    def set_running(self) -> None:
        """The guest runs."""
        self.status = RunStatus.RUNNING
        self.emit("RESUME")

    def stop(self, into: RunStatus = RunStatus.PAUSED) -> JsonValue:
        if self.status is RunStatus.RUNNING:
            self.status = into
            self.emit("STOP")
        return {}

    def system_reset(self) -> JsonValue:
        self.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
        return {}

    def system_powerdown(self) -> JsonValue:
        self.emit("POWERDOWN")
        return {}

    def quit(self) -> JsonValue:
        self.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self.quitting = True
        return {}

    def screendump(self, arguments: Arguments) -> JsonValue:
        try:
            with open(str(arguments["filename"]), "wb") as file:
                file.write(PNG)
        except OSError as error:
            raise QmpError(f"failed to open file '{arguments['filename']}': {error.strerror}") from error
        return {}

    def qom_list(self) -> JsonValue:
        kinds = {"type": "string", "scsi0": "child<virtio-scsi-pci>"} | dict.fromkeys(
            self.blocks.devices(), "child<scsi-hd>"
        )
        return [{"name": name, "type": kind} for name, kind in kinds.items()]

    def object_add(self, arguments: Arguments) -> JsonValue:
        name = str(arguments["id"])
        if name in self._objects:
            raise QmpError(f"attempt to add duplicate property '{name}' to object (type 'container')")
        if arguments["qom-type"] == "tls-creds-psk":
            arguments = {**arguments, "key": _read_key(f"{arguments['dir']}/keys.psk")}
        self._objects[name] = arguments
        return {}

    def object_del(self, arguments: Arguments) -> JsonValue:
        if self._objects.pop(str(arguments["id"]), None) is None:
            raise QmpError(f"object '{arguments['id']}' not found")
        return {}

    def key_of(self, name: str) -> str | None:
        """The key of a TLS object; None without one."""
        found = self._objects.get(name)
        return None if found is None else str(found["key"])

    def keep_fd(self, name: str, fd: int) -> JsonValue:
        """Keep a descriptor under a name. As QEMU does, make it blocking."""
        if name in self._fds:
            os.close(self._fds.pop(name))
        os.set_blocking(fd, True)
        self._fds[name] = fd
        return {}

    def take_fd(self, name: str) -> int:
        """Take a descriptor for a command."""
        if name not in self._fds:
            raise QmpError(f"File descriptor named '{name}' has not been found")
        return self._fds.pop(name)

    def closefd(self, arguments: Arguments) -> JsonValue:
        name = str(arguments["fdname"])
        if name not in self._fds:
            raise QmpError(f"File descriptor named '{name}' not found")
        os.close(self._fds.pop(name))
        return {}

    def release(self) -> None:
        """The end of the process: locks and descriptors are free."""
        self.blocks.release()
        while self._fds:
            os.close(self._fds.popitem()[1])


def _read_key(path: str) -> str:
    try:
        with open(path, encoding="ascii") as keys:
            return keys.read()
    except OSError as error:
        raise QmpError(f"Unable to access credentials {path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what does it, and which arguments it takes (`open`: any)."""

    run: Callable[[FakeMachine, Arguments], JsonValue]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    open: bool = False

    def check(self, arguments: Arguments) -> None:
        """Refuse missing and unexpected arguments, in QEMU's words."""
        for name in self.required:
            if name not in arguments:
                raise QmpError(f"Parameter '{name}' is missing")
        for name in arguments:
            if not self.open and name not in (*self.required, *self.optional):
                raise QmpError(f"Parameter '{name}' is unexpected")


COMMANDS: dict[str, Command] = {
    "query-status": Command(lambda m, _: m.query_status()),
    "query-name": Command(lambda _m, _: {"name": "rig"}),
    "cont": Command(lambda m, _: m.cont()),
    "stop": Command(lambda m, _: m.stop()),
    "quit": Command(lambda m, _: m.quit()),
    "system_reset": Command(lambda m, _: m.system_reset()),
    "system_powerdown": Command(lambda m, _: m.system_powerdown()),
    "screendump": Command(lambda m, a: m.screendump(a), ("filename",), ("format", "device", "head")),
    "announce-self": Command(lambda _m, _: {}, ("initial", "max", "rounds", "step")),
    "blockdev-add": Command(lambda m, a: m.blocks.blockdev_add(a), ("driver",), open=True),
    "blockdev-del": Command(lambda m, a: m.blocks.blockdev_del(a), ("node-name",)),
    "query-block": Command(lambda m, _: m.blocks.query_block()),
    "query-named-block-nodes": Command(lambda m, _: m.blocks.query_nodes(), optional=("flat",)),
    "query-jobs": Command(lambda _m, _: []),
    "device_add": Command(lambda m, a: m.blocks.device_add(a), ("driver",), open=True),
    "device_del": Command(lambda m, a: m.blocks.device_del(a), ("id",)),
    "qom-list": Command(lambda m, _: m.qom_list(), ("path",)),
    "object-add": Command(lambda m, a: m.object_add(a), ("qom-type", "id"), open=True),
    "object-del": Command(lambda m, a: m.object_del(a), ("id",)),
    "getfd": Command(lambda _m, _: {}, ("fdname",)),
    "closefd": Command(lambda m, a: m.closefd(a), ("fdname",)),
    "migrate": Command(lambda m, a: m.migration.migrate(str(a["uri"])), ("uri",)),
    "migrate-incoming": Command(lambda m, a: m.migration.listen(str(a["uri"])), ("uri",)),
    "migrate-continue": Command(lambda m, a: go_on(m.migration, a), ("state",)),
    "migrate_cancel": Command(lambda m, _: m.migration.cancel()),
    "query-migrate": Command(lambda m, _: m.migration.query()),
    "migrate-set-capabilities": Command(lambda m, a: m.migration.set_capabilities(a), ("capabilities",)),
    "migrate-set-parameters": Command(lambda m, a: m.migration.set_parameters(a), open=True),
}
