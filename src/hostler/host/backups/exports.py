"""A backup as NBD exports that other programs read: each disk whole, with everything that it builds on.

    serve   one qemu-nbd for each disk, read-only, on a unix socket; until somebody ends it, or the time is up

What a client asks for as the metadata context "qemu:allocation-depth" tells what changed: depth 1 is in this backup
itself, more is from those it builds on. The processes end with the daemon; whoever reads has to begin again then.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from pydantic import JsonValue

from hostler.host.backups.restoring import links_of
from hostler.host.context import Host
from hostler.host.steps import JobContext, Plan, Step
from hostler.model.errors import QemuFailed, TimedOut
from hostler.model.job import Progress
from hostler.storage import programs
from hostler.storage.backups.directory import BackupDirectory
from hostler.storage.backups.qcow2 import Reader
from hostler.storage.backups.reading import Link
from hostler.storage.files import open_regular
from hostler.storage.qemu_img import explain_os
from hostler.storage.waiting import in_thread

EXPORT = "backup.export"
CLIENTS = 16
"""Programs that may read a disk at once."""
START = 30.0
"""Seconds until each disk must be served."""
_LOOK = 0.02


def plan_export(host: Host, params: dict[str, JsonValue]) -> Plan:
    """The job that serves a backup. `params`: directory, backup, timeout (seconds). Its progress has the addresses."""
    directory, backup_id = BackupDirectory(str(params["directory"])), str(params["backup"])
    timeout = float(str(params["timeout"]))

    def look() -> dict[str, list[Link]]:
        backup = directory.find(backup_id)
        chains = {disk.id: links_of(directory, backup, disk.id) for disk in backup.disks}
        for link in {link.path: link for links in chains.values() for link in links}.values():
            _require_ours(link)
        return chains

    async def do(context: JobContext) -> None:
        backup = await in_thread(f"backup {backup_id}", lambda: directory.find(backup_id))
        place = _place(host, context.job.id)
        with directory.locked(backup.vm, shared=True):
            chains = await in_thread(f"backup {backup_id}", look)
            _make(place)
            sockets = {disk: str(place / f"{disk}.sock") for disk in chains}
            servers = [
                asyncio.create_task(_serve(links, sockets[disk], disk, timeout), name=f"export {disk}")
                for disk, links in chains.items()
            ]
            try:
                await _served(servers, sockets)
                uris: dict[str, JsonValue] = {disk: _uri(disk, socket) for disk, socket in sockets.items()}
                context.progress(Progress(text="served", detail={"exports": uris}))
                await _until_over(servers)
            finally:
                for server in servers:
                    server.cancel()
                await asyncio.gather(*servers, return_exceptions=True)
                shutil.rmtree(place, ignore_errors=True)
        context.result({"backup": backup_id, "ended": "its time was up"})

    async def undo(context: JobContext) -> None:
        shutil.rmtree(_place(host, context.job.id), ignore_errors=True)

    return Plan(EXPORT, backup_id, backup_id, (Step("serve", do, undo),), params=params)


def _place(host: Host, job_id: str) -> Path:
    return host.paths.run_dir / "exports" / job_id[:8]


def _make(place: Path) -> None:
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700)
    except OSError as error:
        raise explain_os(f"directory {place}", error, place.parent) from error


def _require_ours(link: Link) -> None:
    """BadImage unless it is a file as we write them: one that names no other file. Blocking."""
    fd = open_regular(str(link.path))
    try:
        Reader(fd, link.subject)
    finally:
        os.close(fd)


def image_options(links: Sequence[Link]) -> dict[str, JsonValue]:
    """The chain as QEMU opens it, newest first: what is below what stands here, not in the files."""
    below: dict[str, JsonValue] | None = None
    for link in reversed(links):
        file: dict[str, JsonValue] = {"driver": "file", "filename": str(link.path), "read-only": True}
        below = {"driver": "qcow2", "read-only": True, "file": file, "backing": below}
    assert below is not None
    return below


def _uri(disk: str, socket: str) -> str:
    return f"nbd+unix:///{quote(disk)}?socket={quote(socket)}"


async def _serve(links: Sequence[Link], socket: str, disk: str, timeout: float) -> None:
    """One disk. TimedOut when the time is up; QemuFailed when it ends by itself."""
    argv = ["qemu-nbd", "--read-only", "--persistent", f"--shared={CLIENTS}", "--allocation-depth"]
    argv += ["--socket", socket, "--export-name", disk, "json:" + json.dumps(image_options(links))]
    outcome = await programs.run(argv, f"disk {disk}", timeout)
    raise QemuFailed(f"disk {disk}", f"qemu-nbd ended: {outcome.err.strip()[-300:]}", output=outcome.err[-4096:])


async def _served(servers: Sequence[asyncio.Task[None]], sockets: dict[str, str]) -> None:
    """Returns when every socket is there. What a server failed with, or TimedOut."""
    try:
        async with asyncio.timeout(START):
            while not all(os.path.exists(socket) for socket in sockets.values()):
                for server in servers:
                    if server.done():
                        server.result()
                await asyncio.sleep(_LOOK)
    except TimeoutError as error:
        raise TimedOut("export", f"is not there after {START:.0f} s", "look at the disk the backup is on") from error


async def _until_over(servers: Sequence[asyncio.Task[None]]) -> None:
    """Returns when the time is up; raises what a server failed with."""
    done, _ = await asyncio.wait(servers, return_when=asyncio.FIRST_COMPLETED)
    for server in done:
        error = server.exception()
        if error is not None and not isinstance(error, TimedOut):
            raise error
