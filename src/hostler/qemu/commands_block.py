"""QMP commands about block nodes and block jobs as typed functions, under QEMU's own names: no logic, as in `commands`.

Names and shapes are those of QEMU's qapi/block-core.json, qapi/block.json, qapi/job.json and qapi/transaction.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pydantic import JsonValue

from hostler.qemu.commands import BLOCK_DEADLINE, PERIPHERALS, Options, understood
from hostler.qemu.network_disks import reach
from hostler.qemu.qmp import QmpSession

Action = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of one node; `count` in bytes. `inconsistent`: its image was not closed properly, so that nothing
    is known. `recording`: later writes are noted."""

    name: str
    count: int
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A block node."""

    name: str
    file: str
    read_only: bool
    bitmaps: tuple[Bitmap, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A job as query-jobs tells it; `status` is QEMU's JobStatus."""

    id: str
    kind: str
    status: str
    done: int
    total: int
    error: str


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive for removable media. `node`: the medium's, None without one."""

    node: str | None
    tray_open: bool
    locked: bool


async def block_nodes(qmp: QmpSession) -> dict[str, Node]:
    """All block nodes, by name."""
    nodes = cast(
        Sequence[Options], await qmp.execute("query-named-block-nodes", {"flat": True}, deadline=BLOCK_DEADLINE)
    )
    with understood(qmp, "query-named-block-nodes"):
        return {str(node["node-name"]): _node(node) for node in nodes}


def _node(node: Options) -> Node:
    bitmaps = cast(Sequence[Options], node.get("dirty-bitmaps", []))
    return Node(
        name=str(node["node-name"]),
        file=str(node["file"]),
        read_only=bool(node["ro"]),
        bitmaps=tuple(_bitmap(bitmap) for bitmap in bitmaps if bitmap.get("name")),
    )


def _bitmap(bitmap: Options) -> Bitmap:
    return Bitmap(
        name=str(bitmap["name"]),
        count=int(cast(int, bitmap["count"])),
        recording=bool(bitmap["recording"]),
        persistent=bool(bitmap["persistent"]),
        inconsistent=bool(bitmap.get("inconsistent", False)),
        busy=bool(bitmap["busy"]),
    )


async def chains(qmp: QmpSession) -> dict[str, tuple[str, ...]]:
    """For each device with an id: the names of the nodes from its root down along what is below (backing files, and
    what a filter filters). QEMU's own unnamed filters are left out by itself."""
    found = cast(Sequence[Options], await qmp.execute("query-blockstats", deadline=BLOCK_DEADLINE))
    with understood(qmp, "query-blockstats"):
        return {device_of(str(stats["qdev"])): tuple(_down(stats)) for stats in found if stats.get("qdev")}


def _down(stats: Options) -> Iterator[str]:
    below: Options | None = stats
    while below is not None:
        if "node-name" in below:
            yield str(below["node-name"])
        below = cast("Options | None", below.get("backing"))


def device_of(qdev: str) -> str:
    """The device id: QEMU gives it, or the QOM path of what is behind it (CD drives)."""
    return qdev.removeprefix(f"{PERIPHERALS}/").split("/")[0]


async def drive(qmp: QmpSession, device: str) -> Drive | None:
    """That drive for removable media; None where there is no such device."""
    devices = cast(Sequence[Options], await qmp.execute("query-block", deadline=BLOCK_DEADLINE))
    with understood(qmp, "query-block"):
        for found in devices:
            if device_of(str(found.get("qdev", ""))) == device:
                inserted = cast("Options | None", found.get("inserted"))
                return Drive(
                    node=None if inserted is None else str(inserted["node-name"]),
                    tray_open=bool(found.get("tray_open", False)),
                    locked=bool(found.get("locked", False)),
                )
    return None


async def transaction(qmp: QmpSession, actions: Sequence[Action]) -> None:
    """All of them or none."""
    await qmp.execute("transaction", {"actions": list(actions)}, deadline=BLOCK_DEADLINE)


def snapshot_action(node: str, overlay: str) -> Action:
    """`overlay` takes the place of `node`, which becomes its backing."""
    return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}


def bitmap_add_action(node: str, name: str, persistent: bool) -> Action:
    """A new bitmap that notes what changes from now on."""
    return {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, "persistent": persistent}}


def bitmap_merge_action(node: str, target: str, sources: Sequence[tuple[str, str]]) -> Action:
    """Add what other bitmaps mark, each given by node and name."""
    bitmaps: list[JsonValue] = [{"node": where, "name": name} for where, name in sources]
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": target, "bitmaps": bitmaps}}


def bitmap_remove_action(node: str, name: str) -> Action:
    """Remove a bitmap, from its image as well."""
    return {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}}


async def blockdev_reopen(qmp: QmpSession, options: Sequence[Options]) -> None:
    """Change the options of nodes, all or none; children are named."""
    await qmp.execute(
        "blockdev-reopen", {"options": [reach(o, qmp.connections) for o in options]}, deadline=BLOCK_DEADLINE
    )


async def read_a_sector(qmp: QmpSession, node: str) -> None:
    """Read the first sector of a node; what it says, and whether it could be read, is nobody's business."""
    command: Options = {"command-line": f'qemu-io {node} "read 0 512"'}
    await qmp.execute("human-monitor-command", command, deadline=BLOCK_DEADLINE)


async def blockdev_mirror(qmp: QmpSession, options: Options) -> None:
    """Begin to copy."""
    await qmp.execute("blockdev-mirror", options, deadline=BLOCK_DEADLINE)


async def block_commit(qmp: QmpSession, options: Options) -> None:
    """Begin to merge downwards."""
    await qmp.execute("block-commit", options, deadline=BLOCK_DEADLINE)


async def block_stream(qmp: QmpSession, options: Options) -> None:
    """Begin to merge upwards."""
    await qmp.execute("block-stream", options, deadline=BLOCK_DEADLINE)


async def query_jobs(qmp: QmpSession) -> dict[str, Job]:
    """All jobs, by id."""
    jobs = cast(Sequence[Options], await qmp.execute("query-jobs"))
    with understood(qmp, "query-jobs"):
        return {
            str(job["id"]): Job(
                id=str(job["id"]),
                kind=str(job["type"]),
                status=str(job["status"]),
                done=int(cast(int, job["current-progress"])),
                total=int(cast(int, job["total-progress"])),
                error=str(job.get("error", "")),
            )
            for job in jobs
        }


async def job_complete(qmp: QmpSession, job: str) -> None:
    """Let a ready job end with its switch."""
    await qmp.execute("job-complete", {"id": job}, deadline=BLOCK_DEADLINE)


async def job_finalize(qmp: QmpSession, job: str) -> None:
    """Let a pending job end."""
    await qmp.execute("job-finalize", {"id": job}, deadline=BLOCK_DEADLINE)


async def job_cancel(qmp: QmpSession, job: str) -> None:
    """End a job without its switch."""
    await qmp.execute("job-cancel", {"id": job}, deadline=BLOCK_DEADLINE)


async def job_dismiss(qmp: QmpSession, job: str) -> None:
    """Drop a concluded job."""
    await qmp.execute("job-dismiss", {"id": job})


async def block_job_set_speed(qmp: QmpSession, job: str, speed: int) -> None:
    """Bytes per second, 0: unlimited."""
    await qmp.execute("block-job-set-speed", {"device": job, "speed": speed})


async def block_resize(qmp: QmpSession, node: str, size: int) -> None:
    """Change an image's size, bytes."""
    await qmp.execute("block_resize", {"node-name": node, "size": size}, deadline=BLOCK_DEADLINE)


async def block_set_io_throttle(qmp: QmpSession, options: Options) -> None:
    """Limit a device."""
    await qmp.execute("block_set_io_throttle", options)


async def open_tray(qmp: QmpSession, device: str, force: bool) -> None:
    """Open a drive; where the guest has locked it, and without `force`, the guest is asked and nothing else is done."""
    await qmp.execute("blockdev-open-tray", {"id": device, "force": force})


async def close_tray(qmp: QmpSession, device: str) -> None:
    """Close a drive."""
    await qmp.execute("blockdev-close-tray", {"id": device})


async def remove_medium(qmp: QmpSession, device: str) -> None:
    """Take the medium out of an open drive."""
    await qmp.execute("blockdev-remove-medium", {"id": device}, deadline=BLOCK_DEADLINE)


async def insert_medium(qmp: QmpSession, device: str, node: str) -> None:
    """Put a medium into an open drive."""
    await qmp.execute("blockdev-insert-medium", {"id": device, "node-name": node}, deadline=BLOCK_DEADLINE)
