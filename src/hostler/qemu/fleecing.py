"""The moment of a backup: a running VM's disks as they are at that moment, kept and copied while the guest goes on.

        device disk-<id>                     reads and writes, as ever
            |
        node   Bnow-<id>    copy-before-write: keeps what the guest overwrites
            |        \\
        node <id>    Bold-<id>   qcow2        the old content, in a scratch file
            :
        node   Bthen-<id>   snapshot-access over Bnow-<id>: what the disk was
            :  blockdev-backup
        node   Bout-<id>    nbd: what takes the copy, a process of ours

The scratch file is full, or too slow: then the moment is lost and the backup fails; the guest is never touched
(`on-cbw-error: break-snapshot`, which a backup job of QEMU 7.2 cannot be told).

The guest's processors stand still, some milliseconds, while filters are put in and taken out. So all disks are of one
moment; and QEMU 7.2 must not be asked to build on a node that is in an I/O thread while requests are under way there:
it waits for them without holding that thread's lock, and ends with "qemu_mutex_unlock_impl: Operation not permitted".

QEMU writes and we take, not the other way round: the NBD server of QEMU 7.2.22 (Debian 12) ends the whole QEMU by an
assertion (nbd_blockdev_client_closed) when a client leaves an export whose disk is in an I/O thread, as ours are.

What a bitmap said at the moment ("what changed since the last backup", see `bitmaps`) is merged into `SINCE` after the
filters are in: it may say too much, never too little.

Every function may be repeated after a crash at any point in it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from hostler.model.backup import BLOCK
from hostler.model.blockjob import BlockJob, BlockJobState
from hostler.model.disk import Disk
from hostler.model.errors import QemuFailed
from hostler.model.machine import RunStatus
from hostler.qemu import commands
from hostler.qemu.blockdev import NODE_NAME_MAX, device_id, layer_node, node_name
from hostler.qemu.failures import image_error
from hostler.qemu.qmp import QmpSession

OnBlockJob = Callable[[BlockJob], None]

SINCE = "hostler-since"
"""The bitmap that tells what is copied."""
COPY_TIMEOUT = 30
"""Seconds a guest's write waits for the old content to be kept; then the moment is lost."""
CHUNK = 1024 * 1024
"""Bytes of one piece that is copied."""
LOOK = 0.05
"""Seconds between two looks at a copy."""


class Fleecing:
    """The moments of one QEMU's disks."""

    def __init__(self, qmp: QmpSession) -> None:
        self._qmp = qmp

    async def begin(self, disks: Sequence[Disk], scratch: Mapping[str, str]) -> None:
        """The moment: from now on what the disks were is kept in the scratch files (by disk id)."""
        for disk in disks:
            file = {"driver": "file", "filename": scratch[disk.id], "discard": "unmap", "locking": "on"}
            image = {"driver": "qcow2", "discard": "unmap", "backing": None, "file": file}
            await self._add(_old(disk), image, scratch[disk.id])
        async with self._still():
            for disk in disks:
                await self._add(_now(disk), _filter(disk))
                await self._put_in(disk, _now(disk))
            for disk in disks:
                await self._add(_then(disk), {"driver": "snapshot-access", "file": _now(disk)})

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """The guest's processors stand still meanwhile, if they run."""
        running = await commands.query_status(self._qmp) is RunStatus.RUNNING
        if running:
            await commands.stop(self._qmp)
        try:
            yield
        finally:
            if running:
                await commands.cont(self._qmp)

    async def copy(
        self,
        disks: Sequence[Disk],
        since: Mapping[str, str],
        path: str,
        speed: int,
        on_progress: OnBlockJob | None = None,
    ) -> None:
        """Copy each disk, as it was at the moment, to the NBD export of its id on the unix socket `path`, in order;
        returns when all of it is there. `since`: by disk id, the bitmap that tells what is wanted of it. `speed` in
        bytes/s for each disk, 0: unlimited."""
        await self._forget_jobs(disks)
        nodes = await self._nodes()
        for disk in disks:
            if disk.id in since:
                await self._merge(disk, since[disk.id])
            await self._remove(_out(disk), nodes)  # of an earlier attempt
            server = {"type": "unix", "path": path}
            await self._add(_out(disk), {"driver": "nbd", "server": server, "export": disk.id})
        for disk in disks:
            await self._qmp.execute("blockdev-backup", self._job(disk, disk.id in since, speed))
        for disk in disks:
            await self._finished(disk, on_progress)

    def _job(self, disk: Disk, incremental: bool, speed: int) -> dict[str, Any]:
        wanted = {"sync": "bitmap", "bitmap": SINCE, "bitmap-mode": "never"} if incremental else {"sync": "full"}
        return {
            "job-id": _export(disk),
            "device": _then(disk),
            "target": _out(disk),
            "auto-dismiss": False,
            "on-source-error": "report",
            "on-target-error": "report",
            # One piece after the other: what takes them writes a file from front to back.
            "x-perf": {"use-copy-range": False, "max-workers": 1, "max-chunk": CHUNK},
            **({"speed": speed} if speed else {}),
            **wanted,
        }

    async def _finished(self, disk: Disk, on_progress: OnBlockJob | None) -> None:
        """Wait for a job's end. QemuFailed when it failed, or when there is none."""
        while True:
            job = (await self._jobs()).get(_export(disk))
            if job is None:
                raise QemuFailed(self._qmp.name, f"the copy of disk {disk.id} was ended by somebody else")
            if on_progress is not None:
                on_progress(job)
            if job.state is BlockJobState.FAILED:
                raise QemuFailed(
                    self._qmp.name,
                    f"the copy of disk {disk.id} failed: {job.error}",
                    "is there room for what the guest overwrites meanwhile? It is kept in the state directory",
                    output=job.error,
                )
            if job.state is BlockJobState.DONE:
                return
            await asyncio.sleep(LOOK)

    async def _jobs(self) -> dict[str, BlockJob]:
        listed = await self._qmp.execute("query-jobs")
        with commands.understood(self._qmp, "query-jobs"):
            return {str(j["id"]): _block_job(j) for j in cast(list[dict[str, Any]], listed)}

    async def _forget_jobs(self, disks: Sequence[Disk]) -> None:
        """End and dismiss the copies of an earlier attempt."""
        names = {_export(disk) for disk in disks}
        while ours := {i: j for i, j in (await self._jobs()).items() if i in names}:
            for name, job in ours.items():
                if job.state in (BlockJobState.DONE, BlockJobState.FAILED):
                    await self._quietly("job-dismiss", {"id": name}, "not found", "can't be dismissed")
                else:
                    await self._quietly("block-job-cancel", {"device": name, "force": True}, "not found", "not active")
            await asyncio.sleep(0.01)

    async def end(self, disks: Sequence[Disk]) -> None:
        """Nothing is copied or kept any more. Harmless when nothing was."""
        await self._forget_jobs(disks)
        nodes = await self._nodes()
        if not any(node(disk) in nodes for disk in disks for node in (_out, _then, _now, _old)):
            return
        async with self._still():
            for disk in disks:
                await self._remove(_out(disk), nodes)
                await self._remove(_then(disk), nodes)
                if _now(disk) in nodes:
                    await self._put_in(disk, node_name(disk))
                await self._remove(_now(disk), nodes)
                await self._remove(_old(disk), nodes)

    # steps

    async def _add(self, node: str, options: dict[str, Any], path: str | None = None) -> None:
        if node in await self._nodes():
            return
        try:
            await commands.blockdev_add(self._qmp, {**options, "node-name": node})
        except QemuFailed as error:
            raise (image_error(self._qmp.name, error.cause, path) if path else None) or error from error

    async def _put_in(self, disk: Disk, node: str) -> None:
        """Make the device use that node from now on. Never the one it uses: QEMU 7.2 ends by an assertion then."""
        if await self._used_by(device_id(disk)) == node:
            return
        path = f"{commands.PERIPHERALS}/{device_id(disk)}"
        await self._qmp.execute(
            "qom-set", {"path": path, "property": "drive", "value": node}, deadline=commands.BLOCK_DEADLINE
        )

    async def _used_by(self, device: str) -> str | None:
        """The node that a device uses now."""
        listed = await self._qmp.execute("query-block", deadline=commands.BLOCK_DEADLINE)
        with commands.understood(self._qmp, "query-block"):
            for found in cast(list[dict[str, Any]], listed):
                name = str(found.get("qdev", "")).removeprefix(f"{commands.PERIPHERALS}/").split("/")[0]
                if name == device:
                    return str(found["inserted"]["node-name"]) if "inserted" in found else None
        return None

    async def _merge(self, disk: Disk, name: str) -> None:
        """What `name` says by now on all layers goes into SINCE on the node that is copied."""
        nodes = await self._nodes()
        node = _then(disk)
        if SINCE in _names(nodes.get(node, {})):  # of an earlier attempt
            await self._qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": SINCE})
        arguments = {"node": node, "name": SINCE, "granularity": BLOCK, "disabled": True}
        await self._qmp.execute("block-dirty-bitmap-add", arguments)
        sources = []
        for layer in disk.source.layers():
            if name not in _names(nodes.get(layer_node(disk, layer), {})):
                break
            sources.append({"node": layer_node(disk, layer), "name": name})
        await self._qmp.execute("block-dirty-bitmap-merge", {"node": node, "target": SINCE, "bitmaps": sources})

    async def _remove(self, node: str, nodes: Mapping[str, Any]) -> None:
        if node in nodes:
            await self._quietly("blockdev-del", {"node-name": node}, "Failed to find node")

    async def _quietly(self, command: str, arguments: dict[str, Any], *harmless: str) -> None:
        """Do it, unless it turns out that there is nothing to do."""
        try:
            await self._qmp.execute(command, arguments, deadline=commands.BLOCK_DEADLINE)
        except QemuFailed as error:
            if error.details.get("gone") or not any(text in error.cause for text in harmless):
                raise

    async def _nodes(self) -> dict[str, dict[str, Any]]:
        listed = await self._qmp.execute("query-named-block-nodes", {"flat": True}, deadline=commands.BLOCK_DEADLINE)
        with commands.understood(self._qmp, "query-named-block-nodes"):
            return {str(node["node-name"]): node for node in cast(list[dict[str, Any]], listed)}


def _names(node: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(str(b.get("name", "")) for b in node.get("dirty-bitmaps", ()))


def _filter(disk: Disk) -> dict[str, Any]:
    return {
        "driver": "copy-before-write",
        "file": node_name(disk),
        "target": _old(disk),
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": COPY_TIMEOUT,
    }


def _now(disk: Disk) -> str:
    return _node(disk, "now")


def _old(disk: Disk) -> str:
    return _node(disk, "old")


def _then(disk: Disk) -> str:
    return _node(disk, "then")


def _node(disk: Disk, role: str) -> str:
    """No name of a layer: those begin with a disk's id, which is in small letters. At most NODE_NAME_MAX characters."""
    name = f"B{role}-{disk.id}"
    return name if len(name) <= NODE_NAME_MAX else f"{name[:22]}.{zlib.crc32(name.encode()):08x}"


def _out(disk: Disk) -> str:
    return _node(disk, "out")


def _block_job(job: Mapping[str, Any]) -> BlockJob:
    error = str(job.get("error", ""))
    state = BlockJobState.RUNNING
    if job["status"] in ("concluded", "null"):
        state = BlockJobState.FAILED if error else BlockJobState.DONE
    return BlockJob(
        id=str(job["id"]),
        kind=str(job["type"]),
        state=state,
        done=int(job["current-progress"]),
        total=int(job["total-progress"]),
        error=error[:1000],
    )


def _export(disk: Disk) -> str:
    return f"backup-{disk.id}"
