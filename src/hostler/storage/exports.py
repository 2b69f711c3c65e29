"""Exports: a dynamic VHD or VHDX behind a process of its own, so that the VM that uses it can be saved and migrated.

QEMU's drivers for these formats refuse migration and save. Here qemu-storage-daemon opens the image and serves it over
NBD on a unix socket; the VM's QEMU sees an NBD disk, for which nothing blocks. What is behind an export is one of:

    (nothing) --start--> image;  (nothing) --start as placeholder--> placeholder
    placeholder | closed --open_image--> image;  image --close_image--> closed

A migration target begins with the placeholder: of the same size, it reads as zeroes, and fails every write (a write
before the hand-over would be lost, and must be seen). The VM's QEMU has `reconnect-delay` on its NBD node; during the
swap it waits, reconnects and repeats what was not answered.

One process for each disk, as the VM's user, in a session of its own: it outlives this daemon. Nothing about it is
remembered here, all is asked from the process itself. The run directory belongs to the VM's user, hence no file in it
is believed: a process is only ours if its command line says so.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from hostler.model.disk import Disk, SourceKind
from hostler.model.errors import (
    BadImage,
    HostlerError,
    InUse,
    InvalidInput,
    NoSpace,
    NotFound,
    NotPermitted,
    QemuFailed,
    TimedOut,
)
from hostler.removal import FEW, remove_tree
from hostler.storage import export_nodes as nodes
from hostler.storage.chain_exports import serves_chain, start_chain
from hostler.storage.export_process import find_all, find_process, spawn, terminate
from hostler.storage.qemu_img import LOG_PENDING, LogPending
from hostler.storage.qmp import QmpGone, QmpLines, QmpRefused, conversation

SOCKET_LIMIT = 107
"""Bytes of a unix socket's path (sun_path is 108 with its NUL)."""
_EXPORT = "x"


class Exports:
    """The exports of one host. Every method may be repeated; calls about one disk wait for each other."""

    def __init__(self, binary: str = "qemu-storage-daemon") -> None:
        self._binary = binary
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def _lock(self, control: str) -> asyncio.Lock:
        """The one lock of that disk, as long as anybody holds or awaits it."""
        return self._locks.setdefault(control, asyncio.Lock())

    def socket(self, run_dir: str, disk_id: str) -> str:
        """The NBD socket of that disk's export; the export's name is the disk id."""
        return f"{run_dir}/x-{disk_id}.nbd"

    async def start(self, run_dir: str, disk: Disk, run_as: int | None = None, placeholder: bool = False) -> str:
        """Serve the disk; returns the NBD socket. A process that is there already is used. On failure nothing is left.

        InUse when another process writes the image, BadImage, NoSpace, HostLacks (no qemu-storage-daemon), QemuFailed.
        """
        _check(run_dir, disk)
        control = _control(run_dir, disk.id)
        async with self._lock(control), AsyncExitStack() as undo:
            if find_process(control) is None:
                undo.push_async_callback(_stop, run_dir, disk.id)
                _remove_files(run_dir, disk.id)
                if _is_chain(disk):
                    await start_chain(control, self.socket(run_dir, disk.id), disk, run_as)
                    undo.pop_all()
                    return self.socket(run_dir, disk.id)
                await spawn(self._binary, control, self.socket(run_dir, disk.id), _pidfile(run_dir, disk.id), run_as)
            await _arrange(control, disk, nodes.PLACEHOLDER if placeholder else nodes.IMAGE)
            undo.pop_all()
        return self.socket(run_dir, disk.id)

    async def open_image(self, run_dir: str, disk: Disk) -> None:
        """Put the real image behind the export. When this fails, what was behind it still is. Errors as `start`."""
        control = _control(run_dir, disk.id)
        async with self._lock(control):
            await _arrange(control, disk, nodes.IMAGE)

    async def reopen(self, run_dir: str, disk: Disk) -> None:
        """Serve the image with the rights that `disk` asks for now. Where they are others, clients wait meanwhile and
        come back. When this fails, it is served as before."""
        control = _control(run_dir, disk.id)
        async with self._lock(control):
            if not _is_chain(disk) and await _is_read_only(control, disk) == disk.writes:
                try:
                    await _arrange(control, disk, None)
                    await _arrange(control, disk, nodes.IMAGE)
                except HostlerError:
                    await _arrange(control, disk.model_copy(update={"read_only": disk.writes}), nodes.IMAGE)
                    raise

    async def close_image(self, run_dir: str, disk: Disk) -> None:
        """Flush and close the image, so that another process may open it; the export is gone until `open_image`.
        Harmless when the process is gone: then the image is closed as well."""
        control = _control(run_dir, disk.id)
        async with self._lock(control):
            if find_process(control) is not None:
                await _arrange(control, disk, None)

    async def stop(self, run_dir: str, disk_id: str) -> None:
        """End the process (it flushes and closes the image), remove its files. Harmless when it is gone."""
        control = _control(run_dir, disk_id)
        async with self._lock(control):
            await _stop(run_dir, disk_id)

    async def stop_all(self, run_dir: str) -> None:
        """End every process of that run directory, also one whose sockets are gone, or that nobody remembers."""
        for pid, control in find_all(run_dir).items():
            async with self._lock(control):
                await terminate(pid, control)
        for file in Path(run_dir).glob("x-*.*"):
            if file.suffix in (".nbd", ".qmp", ".pid"):
                remove_tree(file, FEW)

    async def serves(self, run_dir: str, disk_id: str) -> str | None:
        """What is behind the export now: "image", "placeholder", or None (closed, or no process)."""
        control = _control(run_dir, disk_id)
        async with self._lock(control):
            pid = find_process(control)
            if pid is None:
                return None
            if serves_chain(pid):
                return nodes.IMAGE
            try:
                async with conversation(control, pid) as qmp:
                    return await _exported(qmp)
            except (QmpGone, QmpRefused) as error:
                raise _explain(f"export of disk {disk_id}", error) from error

    async def find(self, run_dir: str) -> tuple[str, ...]:
        """Ids of the disks whose processes live in that run directory, also such as another daemon started."""
        controls = sorted(Path(run_dir).glob("x-*.qmp"))
        ids = [control.name.removeprefix("x-").removesuffix(".qmp") for control in controls]
        return tuple([d for d, control in zip(ids, controls, strict=True) if find_process(str(control))])


def _is_chain(disk: Disk) -> bool:
    """Whether it is served by our own process: always its image, for nobody writes it, on this host or another."""
    return disk.source.kind is SourceKind.CHAIN


async def _arrange(control: str, disk: Disk, want: str | None) -> None:
    """Make `want` what is behind the export. The new node is opened before the old one goes."""
    subject = f"disk {disk.id} ({disk.source.path})"
    try:
        pid = find_process(control)
        if pid is None:
            raise QmpGone("it does not run")
        if _is_chain(disk):
            return
        async with conversation(control, pid) as qmp:
            if want is not None:
                await _have_node(qmp, disk, want)
            have = await _exported(qmp)
            if have != want:
                await _swap(qmp, disk, have, want)
            present = await _nodes(qmp)
            for node in nodes.unwanted(want):
                if node in present:
                    await qmp.execute("blockdev-del", node_name=node)
    except (QmpGone, QmpRefused) as error:
        raise _explain(subject, error) from error


async def _is_read_only(control: str, disk: Disk) -> bool:
    """Whether its image is served for reading only now."""
    try:
        pid = find_process(control)
        if pid is None:
            raise QmpGone("it does not run")
        async with conversation(control, pid) as qmp:
            return bool((await _nodes(qmp)).get(nodes.IMAGE, {}).get("ro", False))
    except (QmpGone, QmpRefused) as error:
        raise _explain(f"disk {disk.id} ({disk.source.path})", error) from error


async def _have_node(qmp: QmpLines, disk: Disk, want: str) -> None:
    present = await _nodes(qmp)
    if want in present:
        return
    for options in nodes.options(disk, want):
        if options["node-name"] not in present:
            await qmp.execute("blockdev-add", **options)
    size = (await _nodes(qmp))[want]["image"]["virtual-size"]
    if size != disk.source.size:
        await qmp.execute("blockdev-del", node_name=want)
        raise BadImage(
            f"disk {disk.id} ({disk.source.path})",
            f"has {size} bytes, the VM's configuration says {disk.source.size}",
            "attach it anew, so that its size is taken from the image",
        )


async def _swap(qmp: QmpLines, disk: Disk, have: str | None, want: str | None) -> None:
    if have is not None:
        # hard: clients are disconnected; those with reconnect-delay come back to the new one.
        await qmp.execute("block-export-del", id=_EXPORT, mode="hard")
        await qmp.event("BLOCK_EXPORT_DELETED")
    try:
        if want is not None:
            await _export(qmp, disk, want)
    except QmpRefused:
        if have is not None:
            await _export(qmp, disk, have)
        raise


async def _export(qmp: QmpLines, disk: Disk, node: str) -> None:
    await qmp.execute("block-export-add", type="nbd", id=_EXPORT, node_name=node, name=disk.id, writable=disk.writes)


async def _exported(qmp: QmpLines) -> str | None:
    found: list[dict[str, Any]] = await qmp.execute("query-block-exports")
    return next((str(e["node-name"]) for e in found if e["id"] == _EXPORT and not e["shutting-down"]), None)


async def _nodes(qmp: QmpLines) -> dict[str, dict[str, Any]]:
    return {str(node["node-name"]): node for node in await qmp.execute("query-named-block-nodes", flat=True)}


async def _stop(run_dir: str, disk_id: str) -> None:
    process = find_process(_control(run_dir, disk_id))
    if process is not None:
        await terminate(process, _control(run_dir, disk_id))
    _remove_files(run_dir, disk_id)


def _check(run_dir: str, disk: Disk) -> None:
    if len(os.fsencode(_control(run_dir, disk.id))) > SOCKET_LIMIT:
        raise InvalidInput(
            f"directory {run_dir}", "is too long for the sockets in it", f"paths have at most {SOCKET_LIMIT} bytes"
        )
    if disk.source.size <= 0:
        raise InvalidInput(f"disk {disk.id}", "has no size", "inspect its image first")


def _control(run_dir: str, disk_id: str) -> str:
    return f"{run_dir}/x-{disk_id}.qmp"


def _pidfile(run_dir: str, disk_id: str) -> str:
    return f"{run_dir}/x-{disk_id}.pid"


def _remove_files(run_dir: str, disk_id: str) -> None:
    for ending in ("nbd", "qmp", "pid"):
        remove_tree(f"{run_dir}/x-{disk_id}.{ending}", FEW)


def _explain(subject: str, error: QmpGone | QmpRefused) -> HostlerError:
    text = str(error)
    if isinstance(error, QmpGone):
        if isinstance(error.__cause__, TimeoutError):
            return TimedOut(subject, f"its storage daemon does not answer ({text})", "look at the disk it is on")
        return QemuFailed(subject, f"its storage daemon is gone ({text})", "start the VM's disk anew", output=text)
    if "Failed to get" in text and "lock" in text:
        return InUse(subject, "another process has the image open", "stop what uses it", output=text)
    if "log that needs to be replayed" in text:
        return LogPending(subject, *LOG_PENDING, output=text)
    if "No such file" in text:
        return NotFound(subject, "the image does not exist", "check the path", output=text)
    if "Permission denied" in text:
        return NotPermitted(subject, "the VM's user may not open the image", "check owner and mode", output=text)
    if "No space left" in text:
        return NoSpace(subject, "the disk it is on is full", "free some space", output=text)
    return BadImage(subject, f"QEMU does not open it: {text}", "check the image", output=text)
