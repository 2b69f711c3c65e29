"""What an expert does by hand with QEMU and QMP: the floor that Hostler's own times are compared with.

As little code as possible between the clock and QEMU: one connection, JSON lines, no supervision. The target of a
migration starts its guest by itself (no -S), as it does by hand. Times are of the monotonic clock, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import JsonValue

from hostler.model.errors import QemuFailed, TimedOut
from hostler.model.host import Accelerator
from hostler.model.units import MiB
from hostler.qemu.cmdline import ram_size
from hostler.testing.microguest import MicroGuest

Answer = dict[str, JsonValue]
DEADLINE = 60.0
UNLIMITED = 1 << 60
"""Bytes per second: `max-bandwidth` where no limit is wished."""
BINARY = "qemu-system-x86_64"


def command_line(
    place: Path, guest: MicroGuest, memory_mib: int, cmdline: str = "", incoming: bool = False, network: str = "user"
) -> list[str]:
    """A small q35 machine with the micro guest: `qmp.sock`, `serial.sock` and `qga.sock` in `place`, one virtio-scsi
    controller "scsi0", one network adapter, by default behind QEMU's own NAT."""
    return [
        BINARY,
        *("-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-accel", "tcg,thread=multi"),
        *(
            "-m",
            f"{ram_size(memory_mib * MiB, Accelerator.TCG)}b",
            "-kernel",
            str(guest.kernel),
            "-initrd",
            str(guest.initrd),
        ),
        *("-append", cmdline or guest.cmdline),
        *("-qmp", f"unix:{place}/qmp.sock,server=on,wait=off"),
        *("-chardev", f"socket,id=serial,path={place}/serial.sock,server=on,wait=off", "-serial", "chardev:serial"),
        *("-chardev", f"socket,id=agent,path={place}/qga.sock,server=on,wait=off"),
        *("-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=scsi0,iothread=io0,addr=2"),
        *("-netdev", f"{network},id=net0", "-device", "virtio-net-pci,netdev=net0,addr=3,romfile="),
        *("-device", "virtio-serial-pci,id=ports,addr=4"),
        *("-device", "virtserialport,bus=ports.0,chardev=agent,name=org.qemu.guest_agent.0"),
        *(("-incoming", "defer") if incoming else ()),
    ]


class RawQemu:
    """A QEMU with one QMP connection. `spawned` and `ready` are when it was started and when QMP answered."""

    def __init__(self, process: asyncio.subprocess.Process, spawned: float) -> None:
        self.process = process
        self.spawned = spawned
        self.ready = 0.0
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._events: list[Answer] = []

    @classmethod
    async def start(cls, argv: Sequence[str], qmp: Path) -> Self:
        """Spawn and connect; QemuFailed where it ends instead, and then nothing is left of it."""
        spawned = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        machine = cls(process, spawned)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(machine.close)
            await machine._connect(qmp)
            undo.pop_all()
        return machine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _connect(self, qmp: Path) -> None:
        async with asyncio.timeout(DEADLINE):
            while self._writer is None:
                if self.process.returncode is not None:
                    raise QemuFailed(
                        "raw qemu", f"ended with {self.process.returncode}", "", output=await self._output()
                    )
                with contextlib.suppress(OSError):
                    self._reader, self._writer = await asyncio.open_unix_connection(str(qmp), limit=1 << 24)
                    continue
                await asyncio.sleep(0.001)
            await self._reader.readline()  # the greeting
        await self.cmd("qmp_capabilities")
        self.ready = time.monotonic()

    async def _output(self) -> str:
        return (await self.process.stderr.read()).decode(errors="replace")[-2000:] if self.process.stderr else ""

    async def cmd(self, name: str, **arguments: JsonValue) -> JsonValue:
        """Run a command and return its result. Underscores in argument names stand for dashes."""
        if self._writer is None:
            raise QemuFailed("raw qemu", "is not connected")
        request: Answer = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._writer.write(json.dumps(request).encode() + b"\n")
        while True:
            message = await self._message(DEADLINE)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QemuFailed("raw qemu", f"{name}: {message['error']}")
            self._events.append(message)

    async def event(self, name: str, deadline: float = DEADLINE) -> Answer:
        """The next event of that name, also one that came while a command ran."""
        while True:
            for message in self._events:
                if message.get("event") == name:
                    self._events.remove(message)
                    return message
            self._events.append(await self._message(deadline))

    async def _message(self, deadline: float) -> Answer:
        try:
            line = await asyncio.wait_for(self._reader.readline(), deadline)
        except TimeoutError as error:
            raise TimedOut("raw qemu", f"said nothing for {deadline:g} s") from error
        if not line:
            raise QemuFailed("raw qemu", "has ended", "", output=await self._output())
        return dict(json.loads(line))

    async def close(self) -> None:
        """Kill it and wait. Harmless when it has ended."""
        if self._writer is not None:
            self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stderr:
            await self.process.stderr.read()  # lets the pipe's transport end
        await self.process.wait()


async def hot_add(machine: RawQemu, id: str, image: Path, bus: str = "scsi0.0", lun: int = 1) -> None:
    """Add a raw image as a SCSI disk whose serial number is `id`."""
    source: Answer = {"driver": "file", "filename": str(image), "aio": "threads", "cache": {"direct": True}}
    await machine.cmd("blockdev-add", driver="raw", node_name=f"n-{id}", file=source)
    await machine.cmd("device_add", driver="scsi-hd", id=id, bus=bus, lun=lun, channel=0, drive=f"n-{id}", serial=id)


async def hot_remove(machine: RawQemu, id: str) -> None:
    """Take a disk of `hot_add` away; returns when QEMU has let go of the image."""
    await machine.cmd("device_del", id=id)
    while (await machine.event("DEVICE_DELETED")).get("data", {}) != {
        "device": id,
        "path": f"/machine/peripheral/{id}",
    }:
        continue
    await machine.cmd("blockdev-del", node_name=f"n-{id}")


@dataclass(frozen=True, slots=True)
class RawSettings:
    """`bandwidth` bytes/s (0: unlimited), `downtime_limit` ms, `streams` of multifd (1: none), `keys` directory with
    `keys.psk` for TLS (None: plain)."""

    bandwidth: int = 0
    downtime_limit: int = 50
    streams: int = 1
    keys: Path | None = None
    return_path: bool = True
    late_block_activate: bool = False


@dataclass(frozen=True, slots=True)
class RawMigration:
    """Seconds from the first command to the target's guest running; QEMU's own figures in ms."""

    seconds: float
    total_time: int
    downtime: int
    transferred: int


async def prepare(machine: RawQemu, settings: RawSettings, endpoint: str) -> None:
    """Set capabilities and parameters. `endpoint`: "server" for the target, "client" for the source."""
    wanted: dict[str, bool] = {
        "events": True,
        "return-path": settings.return_path,
        "late-block-activate": settings.late_block_activate,
        "multifd": settings.streams > 1,
    }
    flags: list[JsonValue] = [{"capability": name, "state": state} for name, state in wanted.items()]
    await machine.cmd("migrate-set-capabilities", capabilities=flags)
    parameters: Answer = {
        "max-bandwidth": settings.bandwidth or UNLIMITED,
        "downtime-limit": settings.downtime_limit,
        "multifd-channels": settings.streams,
        "tls-creds": "",  # an earlier move, in the other direction, may have left some
    }
    if settings.keys is not None:
        user: Answer = {"username": "qemu"} if endpoint == "client" else {}
        await machine.cmd(
            "object-add",
            qom_type="tls-creds-psk",
            id=f"tls-{endpoint}",
            endpoint=endpoint,
            dir=str(settings.keys),
            **user,
        )
        parameters["tls-creds"] = f"tls-{endpoint}"
    await machine.cmd("migrate-set-parameters", **parameters)


async def migrate(source: RawQemu, target: RawQemu, settings: RawSettings) -> RawMigration:
    """Move the guest to a target started with `-incoming defer`; returns when it runs there."""
    await prepare(target, settings, "server")
    await target.cmd("migrate-incoming", uri="tcp:127.0.0.1:0")
    listening = await target.cmd("query-migrate")
    port = _port(listening)
    started = time.monotonic()
    await prepare(source, settings, "client")
    await source.cmd("migrate", uri=f"tcp:127.0.0.1:{port}")
    await target.event("RESUME")
    seconds = time.monotonic() - started
    figures = await _figures(source)
    memory = figures.get("ram")
    sent = memory.get("transferred") if isinstance(memory, dict) else 0
    return RawMigration(seconds, _number(figures.get("total-time")), _number(figures.get("downtime")), _number(sent))


async def _figures(source: RawQemu) -> Answer:
    """The source's counters once it knows that it has ended."""
    async with asyncio.timeout(DEADLINE):
        while True:
            figures = await source.cmd("query-migrate")
            status = figures.get("status") if isinstance(figures, dict) else None
            if isinstance(figures, dict) and status == "completed":
                return figures
            if status in ("failed", "cancelled"):
                raise QemuFailed("raw qemu", f"the migration {status}")
            await asyncio.sleep(0.005)


def _port(listening: JsonValue) -> int:
    addresses = listening.get("socket-address") if isinstance(listening, dict) else None
    if isinstance(addresses, list) and addresses and isinstance(addresses[0], dict):
        return _number(addresses[0].get("port"))
    raise QemuFailed("raw qemu", f"does not say where it listens: {listening}")


def _number(value: JsonValue) -> int:
    return int(str(value or 0))
