"""Every kind of job, as something that can be begun on in-process hosts: for the tests that repeat, fail, unwind and
interrupt each step of each. `picture` is what is compared before and after."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from hostler.cluster.migrations import settings_of
from hostler.host.operation import Operation, Params
from hostler.host.operations import OPERATIONS
from hostler.host.steps import Plan, Step
from hostler.host.volumes.operations import VOLUME_OPERATIONS
from hostler.model.backup_requests import BackupList, BackupRestore, BackupRun
from hostler.model.checkpoint import Checkpoint, CheckpointState
from hostler.model.checkpoint_requests import CheckpointCreate
from hostler.model.disk import Disk, ImageFormat, Media
from hostler.model.disk_requests import DiskFlatten, DiskMedium, DiskMove
from hostler.model.job import Job, JobState
from hostler.model.requests import DiskAdd, MigrateRequest, VmCreate, VolumeCreate, VolumeRegister
from hostler.model.transfer import ImportRequest
from hostler.model.units import MiB
from hostler.model.vm import VmRecord
from hostler.qemu import access
from hostler.testing.exported import exported_folder
from hostler.testing.inprocess import Node, Site
from hostler.testing.simulated_world import SimulatedQemu

VM = "web"
NEVER = "never"
EARLY = datetime(2026, 1, 1, tzinfo=UTC)
NEW_DISK = "disk1"
BACKUP = "20261124T100000Z-00000000"
Change = Callable[[Sequence[Step]], Sequence[Step]]


def as_they_are(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps of a production job."""
    return steps


def each_done_twice(steps: Sequence[Step]) -> Sequence[Step]:
    """As if each step had been interrupted at its very end, and repeated."""
    return [again for step in steps for again in (step, step)]


def each_undone_twice(steps: Sequence[Step]) -> Sequence[Step]:
    """As if each undo had been interrupted at its very end, and repeated."""

    def twice(step: Step) -> Step:
        async def undo(context: Any) -> None:
            await step.undo(context)
            await step.undo(context)

        return dataclasses.replace(step, undo=undo)

    return [twice(step) for step in steps]


@dataclass(frozen=True)
class Scenario:
    """One kind of job: how to get to where it may begin, its steps, and the step with which it has happened.

    `done_by`: a failure after this step (None: after the last) leaves the outcome, one before it the beginning.
    `forward_from` ("STEP:before|after", None: after the last): a crash from there on leads to the outcome.
    `insists`: where a failure leaves the outcome, the step is tried again, and the job succeeds.
    """

    kind: str
    steps: tuple[str, ...]
    before: tuple[str, ...] = ()
    """Actions that lead to where it begins."""
    params: Params = field(default_factory=dict)
    disk: bool = False
    """Whether its parameter is a new disk."""
    plan: Callable[[Node], Awaitable[Params]] | None = None
    """What finds out its parameters, where they depend on the host."""
    drive: bool = False
    """Whether the VM has an empty CD drive too."""
    variant: str = ""
    """Tells scenarios of one kind apart."""
    done_by: str | None = None
    forward_from: str | None = None
    insists: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.variant}".strip()

    def happened(self, step: str, edge: str) -> bool:
        """Whether a failure there leaves the outcome."""
        last = self.done_by or self.steps[-1]
        return (self.steps.index(step), edge == "after") >= (self.steps.index(last), True)

    def goes_forward(self, step: str, edge: str) -> bool:
        """Whether the daemon that finds the job interrupted there finishes it."""
        if self.forward_from == NEVER:
            return False
        first, _, when = (self.forward_from or f"{self.steps[-1]}:after").partition(":")
        return (self.steps.index(step), edge == "after") >= (self.steps.index(first), when == "after")

    async def prepare(self, node: Node) -> None:
        """A VM with one disk, in the state from which the job begins."""
        path = node.site.image("a.img")
        await node.application.volumes.register(VolumeRegister(name="a", path=path, format=ImageFormat.RAW), "test")
        disks = (DiskAdd(volume="a"), *((DiskAdd(media=Media.CDROM),) if self.drive else ()))
        await node.application.vms.create(VmCreate(name=VM, memory=64 * MiB, disks=disks), "test")
        node.site.image("b.img")
        for action in self.before:
            await act(node, action)

    async def begin(self, node: Node, change: Change = as_they_are) -> Job:
        """Begin the job, with its steps changed."""
        if self.kind in _WITHOUT_VM:
            plan = await _WITHOUT_VM[self.kind](node)
            return await node.application.jobs.start(_changed(plan, change), "test")
        if self.kind in VOLUME_OPERATIONS:
            params = dict(self.params)
            if "path" in params:
                params["path"] = str(node.site.directory / str(params["path"]))
            return await node.application.volume_work.begin(self.kind, "data", params, "test", change)
        host, actor = node.application.host, node.application.host.actor(VM)
        operation, params = _operation(node, self.kind), await self._params(node)
        steps = change(operation.steps(host, actor, params))
        return await operation.begin(host, actor, "test", params, steps=steps)

    async def _params(self, node: Node) -> Params:
        if self.disk:
            return {"disk": await _disk(node)}
        if self.plan is not None:
            return await self.plan(node)
        if self.kind.startswith("checkpoint."):
            return await _of_checkpoint(node, self.kind)
        if self.kind == "vm.export":
            out = node.site.directory / "out"
            out.mkdir(exist_ok=True)
            return {"form": "folder", "format": None, "path": str(out / VM)}
        if self.kind == "vm.migrate":
            other = next(n for n in node.site.nodes if n is not node)
            settings = settings_of(MigrateRequest(host=other.name))
            return {"target": other.identity.host_id, "settings": settings.to_json()}
        if self.kind == "vm.backup":
            return {**self.params, "directory": _backups(node), "backup": BACKUP}
        if self.kind == "vm.restore-backup":
            disks: list[JsonValue] = [{"disk": "disk0", "volume": "web-disk0", "format": "raw", "path": None}]
            return {"directory": _backups(node), "backup": await _backup(node), "disks": disks}
        return self.params

    async def run(self, node: Node, change: Change = as_they_are) -> Job:
        """Begin it and wait for its end."""
        return await node.finish(await self.begin(node, change))


def _operation(node: Node, kind: str) -> Operation:
    moves = node.application.migrations.operation
    return moves if kind == moves.kind else OPERATIONS[kind]


async def _plan_create(node: Node) -> Plan:
    return node.application.volumes.plan_create(VolumeCreate(name="v", size=4096, format=ImageFormat.RAW))


async def _plan_import(node: Node) -> Plan:
    folder = exported_folder(node.site.directory / "exported", {"disk0": b"boot" * 1024, "disk1": b"data" * 2048})
    return await node.application.imports.plan(ImportRequest(path=str(folder)))


async def _plan_restore(node: Node) -> Plan:
    request = BackupRestore(directory=_backups(node), backup=await _backup(node), vm="again")
    return await node.application.backups.plan_restore(request)


async def _plan_restore_volume(node: Node) -> Plan:
    request = BackupRestore(directory=_backups(node), backup=await _backup(node), disk="disk0", volume="one")
    return await node.application.backups.plan_restore(request)


async def _plan_verify(node: Node) -> Plan:
    return node.application.backups.plan_verify({"directory": _backups(node), "backup": await _backup(node)})


_WITHOUT_VM: dict[str, Callable[[Node], Awaitable[Plan]]] = {
    "volume.create": _plan_create,
    "vm.import": _plan_import,
    "backup.restore": _plan_restore,
    "backup.restore-volume": _plan_restore_volume,
    "backup.verify": _plan_verify,
}
"""Jobs that hold no VM when they begin, by kind, and how they are planned."""


def _changed(plan: Plan, change: Change) -> Plan:
    return dataclasses.replace(plan, steps=change(plan.steps))


async def _disk(node: Node) -> Any:
    request = DiskAdd(volume=node.site.image("b.img"), format=ImageFormat.RAW)
    planned = await node.application.vms.attach_disk(VM, request, "test", dry_run=True)
    assert isinstance(planned, VmRecord)
    return planned.config.disks[-1].to_json()


async def _move(node: Node) -> Params:
    record = node.application.vms.get(VM)
    request = DiskMove(to=str(node.site.directory / "c.img"))
    return await node.application.disks.plan_move(record, record.config.disks[0], request)


async def _overlay(node: Node) -> Params:
    """A new disk, on an overlay of its own."""
    request = DiskAdd(volume=node.site.image("b.img"), format=ImageFormat.RAW, overlay=True)
    planned = await node.application.vms.attach_disk(VM, request, "test", dry_run=True)
    assert isinstance(planned, VmRecord)
    disk = planned.config.disks[-1]
    return {"disk": disk.to_json(), "overlay": Path(disk.source.path).stem}


async def _flatten(node: Node) -> Params:
    record = node.application.vms.get(VM)
    return await node.application.disks.plan_flatten(record, record.config.disks[1], DiskFlatten())


async def _medium(node: Node) -> Params:
    drive = node.application.vms.get(VM).config.disks[1]
    return await node.application.disks.plan_medium(
        drive, DiskMedium(volume=str(node.site.directory / "b.img"), format=ImageFormat.RAW)
    )


async def _of_checkpoint(node: Node, kind: str) -> Params:
    """The parameters that a request leads to, always the same."""
    record = node.application.vms.get(VM)
    points = await node.application.host.checkpoints.of(record.id)
    if kind == "checkpoint.create":
        point = Checkpoint(id="point", vm=record.id, name="p", state=CheckpointState.CREATING, created=EARLY)
        return {"checkpoint": point.to_json(), "token": "b1"}
    if kind == "checkpoint.delete":
        return {"ids": [points[0].id], "memory": []}
    if kind == "checkpoint.apply":
        return {"point": points[0].to_json(), "token": "b2", "generation_id": "another"}
    assert points[0].config is not None
    config = points[0].config.but(id="clone", name="clone", generation_id="clone", run_as=None)
    return {"config": config.to_json(), "token": "b3", "full": False}


def _backups(node: Node) -> str:
    return str(node.site.directory / "backups")


async def _backup(node: Node) -> str:
    """The id of the backup there is."""
    return (await node.application.backups.list(BackupList()))[0].id


async def act(node: Node, action: str) -> None:
    """Do one thing to the VM, and see that it worked."""
    job: Job | VmRecord
    if action == "volume":  # with data, then zeroes that take space, then a hole
        path = Path(node.site.image("data.img", size=4 * MiB))
        path.write_bytes(b"x" * MiB + bytes(MiB))
        os.truncate(path, 4 * MiB)
        known = VolumeRegister(name="data", path=str(path), format=ImageFormat.RAW)
        await node.application.volumes.register(known, "test")
        return
    if action == "checkpoint":
        job = await node.application.checkpoints.create(VM, CheckpointCreate(name="first"), "test")
    elif action in ("attach", "overlay"):
        overlay = action == "overlay"
        request = DiskAdd(volume=node.site.image("b.img"), format=ImageFormat.RAW, overlay=overlay)
        job = await node.application.vms.attach_disk(VM, request, "test")
    elif action == "backup":
        job = await node.application.backups.run(VM, BackupRun(directory=_backups(node)), "test")
    else:
        job = await node.application.vms.act(VM, action, "test")
    assert isinstance(job, Job)
    ended = await node.finish(job)
    assert ended.state is JobState.DONE, ended


MOVING = ("create", "copy", "switch", "clean-up")
FIRST = "grow:before"
_COPY: Params = {"name": "copy", "path": "copy.img", "format": "raw", "pool": ""}

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("vm.start", ("reserve", "prepare", "launch", "run"), forward_from="launch:after", insists=True),
    Scenario(
        "vm.shutdown",
        ("ask", "end"),
        ("start",),
        {"timeout": 60, "then": "leave"},
        done_by="ask",
        forward_from="ask:after",
    ),
    Scenario("vm.turn-off", ("end",), ("start",), forward_from="end:before"),
    Scenario("vm.pause", ("stop",), ("start",), forward_from="stop:before"),
    Scenario("vm.resume", ("run",), ("start", "pause"), forward_from="run:before"),
    Scenario("vm.reset", ("reset",), ("start",), forward_from=NEVER),
    Scenario("vm.save", ("write", "end"), ("start",), forward_from="end:after"),
    Scenario(
        "vm.restore",
        ("reserve", "prepare", "launch", "load", "run"),
        ("start", "save"),
        forward_from="run:before",
        insists=True,
    ),
    Scenario("vm.discard-saved", ("discard",), ("start", "save"), forward_from="discard:before"),
    Scenario("disk.attach", ("take", "plug", "record"), ("start",), disk=True),
    Scenario("disk.attach", ("overlay", "take", "plug", "record"), ("start",), plan=_overlay, variant="overlay"),
    Scenario(
        "disk.detach",
        ("unplug", "record"),
        ("start", "attach"),
        {"disk_id": NEW_DISK, "timeout": 30},
        forward_from="unplug:before",
    ),
    Scenario(
        "vm.migrate",
        ("check", "prepare-target", "pre-copy", "switch-over", "resume", "clean-up"),
        ("start",),
        done_by="switch-over",
        insists=True,
        forward_from="switch-over:after",
    ),
    Scenario(
        "vm.migrate",
        ("check", "prepare-target", "pre-copy", "switch-over", "resume", "clean-up"),
        ("start", "checkpoint"),
        done_by="switch-over",
        insists=True,
        forward_from="switch-over:after",
        variant="with a checkpoint",
    ),
    Scenario(
        "vm.backup",
        ("open", "snapshot", "copy", "commit", "close"),
        ("start",),
        {"mode": "auto", "consistency": "crash"},
        done_by="commit",
        insists=True,
        forward_from="snapshot:after",
    ),
    Scenario(
        "checkpoint.create",
        ("layers", "take", "record", "freeze", "ready"),
        ("start",),
        done_by="freeze",
        forward_from="freeze:before",
        insists=True,
    ),
    Scenario(
        "checkpoint.create",
        ("layers", "take", "record", "freeze", "ready"),
        ("start", "save"),
        done_by="freeze",
        forward_from="freeze:before",
        insists=True,
        variant="saved",
    ),
    Scenario(
        "checkpoint.delete",
        ("mark", "merge", "forget"),
        ("checkpoint",),
        done_by="merge",
        forward_from="merge:before",
        insists=True,
        variant="off",
    ),
    Scenario(
        "checkpoint.delete",
        ("mark", "merge", "forget"),
        ("start", "checkpoint"),
        done_by="merge",
        forward_from="merge:before",
        insists=True,
    ),
    Scenario(
        "checkpoint.apply",
        ("layers", "end", "switch", "tidy"),
        ("start", "checkpoint", "turn-off"),
        done_by="switch",
        forward_from="end:before",
        insists=True,
    ),
    Scenario(
        "checkpoint.clone", ("disks", "define"), ("start", "checkpoint"), forward_from="define:after", insists=True
    ),
    Scenario(
        "vm.restore-backup",
        ("volumes", "switch"),
        ("start", "backup", "turn-off"),
        insists=True,
        forward_from="switch:after",
    ),
    Scenario("backup.restore", ("volumes", "define"), ("start", "backup", "turn-off"), insists=True),
    Scenario("backup.restore-volume", ("restore",), ("start", "backup", "turn-off")),
    Scenario("backup.verify", ("verify",), ("start", "backup", "turn-off"), forward_from="verify:before"),
    Scenario("volume.create", ("create",)),
    Scenario("vm.export", ("write", "publish"), insists=True),
    Scenario("vm.import", ("verify", "volumes", "define"), insists=True),
    Scenario(
        "volume.replace",
        ("copy", "switch"),
        ("volume",),
        {"path": "data.new", "format": "raw", "size": 4 * MiB, "pool": ""},
        forward_from="switch:before",
        insists=True,
    ),
    Scenario("volume.compact", ("change",), ("volume",), {}, forward_from="change:before", insists=True),
    Scenario("volume.convert", ("copy",), ("volume",), _COPY),
    Scenario("volume.clone", ("copy",), ("volume",), _COPY),
    Scenario("volume.checksum", ("read",), ("volume",), forward_from=NEVER),
    Scenario("volume.validate", ("check",), ("volume",), forward_from=NEVER),
    Scenario("volume.repair", ("check",), ("volume",), {"repair": True}, forward_from=NEVER),
    Scenario("volume.grow", ("change",), ("volume",), {"size": 8 * MiB}, forward_from="change:before", insists=True),
    Scenario(
        "volume.shrink", ("look", "change"), ("volume",), {"size": 2 * MiB}, forward_from="change:before", insists=True
    ),
    Scenario(
        "disk.move",
        MOVING,
        ("start",),
        plan=_move,
        done_by="switch",
        insists=True,
        forward_from="copy:before",
    ),
    Scenario(
        "disk.move",
        MOVING,
        plan=_move,
        done_by="switch",
        insists=True,
        forward_from="switch:after",
        variant="off",
    ),
    Scenario(
        "disk.flatten",
        ("copy", "record", "clean-up"),
        ("start", "overlay"),
        plan=_flatten,
        done_by="copy",
        insists=True,
        forward_from="copy:before",
    ),
    Scenario("disk.grow", ("grow",), ("start",), {"disk_id": "disk0", "size": 8192}, insists=True, forward_from=FIRST),
    Scenario(
        "disk.grow", ("grow",), (), {"disk_id": "disk0", "size": 8192}, insists=True, forward_from=FIRST, variant="off"
    ),
    Scenario(
        "disk.limit",
        ("apply", "record"),
        ("start",),
        {"disk_id": "disk0", "limits": {"iops": 100}},
        forward_from="apply:before",
    ),
    Scenario("disk.media", ("take", "change", "record"), ("start",), plan=_medium, drive=True, insists=True),
)
"""One for each kind of job there is."""

PLACES = [(s, step, edge) for s in SCENARIOS for step in s.steps for edge in ("before", "after")]
"""Every moment at which something can go wrong."""


async def picture(site: Site) -> dict[str, object]:
    """Everything that a job may leave changed, in a form that two runs can be compared by."""
    found: dict[str, object] = {
        "running": sorted(
            (_owner(site, run_dir), q.status, sorted(map(_disk_picture, q.disks.values())))
            for run_dir, q in site.world.running.items()
        ),
        "locks": sorted(f"{name[0]}.{name[-1]}" for name in (Path(p).name.split(".") for p in site.world.locks)),
        "wire": sorted(site.world.wire),
        "backups": sorted(p.name for p in site.directory.glob("backups/*/*/*")),
        "exported": sorted(p.name for p in (site.directory / "out").rglob("*")),
        "noted": sorted(_noted(qemu) for qemu in site.world.running.values()),
        "images": sorted(path.name for path in site.directory.glob("*.img")),
        "granted": {path.name: users for path in site.directory.glob("*.img") if (users := granted(path))},
        "layers": Counter(path.name.split(".")[0] for path in site.directory.glob("*.qcow2")),
    }
    for node in site.nodes:
        found[node.name] = await _of_node(node)
    return found


def _noted(qemu: SimulatedQemu) -> tuple[str, ...]:
    """What is kept of its disks, and which of its changes are noted."""
    return (*sorted(qemu.moments), *sorted(name for names in qemu.bitmaps.values() for name in names))


def _disk_picture(disk: Disk) -> tuple[object, ...]:
    name = Path(disk.source.path).name.split(".")  # of a layer's name the middle is by chance
    layers = sum(1 for _ in disk.source.layers())
    return (disk.id, name[0], name[-1], layers, disk.source.size, disk.limits.iops)


def _owner(site: Site, run_dir: str) -> str:
    return next(n.name for n in site.nodes if run_dir.startswith(str(n.paths.run_dir)))


def granted(path: Path) -> int:
    """How many users have been let in by name."""
    with suppress(OSError):
        entries = access.decode(os.getxattr(path, "system.posix_acl_access"))
        return sum(e.tag is access.Tag.USER for e in entries)
    return 0


async def _of_node(node: Node) -> dict[str, object]:
    host = node.application.host
    return {
        "vms": [await _of_vm(node, a.record) for a in sorted(host.actors.values(), key=lambda a: a.record.name)],
        "volumes": sorted(
            (v.name.split(".")[0], v.state, v.format, v.size, v.generation)
            for v in await node.application.volumes.list()
        ),
        "files": sorted(p.name for p in host.paths.volumes.glob("*")),
        "volumes elsewhere": sorted(p.name for kind in ("copy*", "data*") for p in node.site.directory.glob(kind)),
        "parts": sorted(p.name for p in node.site.directory.glob(".*.hostler-part")),
        "scratch": sorted(p.name for p in host.paths.state_dir.glob("scratch/*")),
        "run dirs": len(list((host.paths.run_dir / "vms").glob("*"))),
        "claims": len(await host.store.list("claim/")),
        "coming": [c.name for c in node.application.incoming.coming()],
        "busy": [j.kind for j in node.application.jobs.list() if not j.is_over],
        "leftover state": sorted(p.name for p in (host.paths.state_dir / "vms").glob("*") if p.name not in host.actors),
    }


async def _of_vm(node: Node, record: VmRecord) -> dict[str, object]:
    host = node.application.host
    process = host.actor(record.id).machine
    assert (record.process is None) == (process is None), f"{record.process} but {process}"
    return {
        "state": record.state,
        "reason": record.reason,
        "job": record.job,
        "handed to": record.handed_to,
        "disks": [_disk_picture(d) for d in record.config.disks],
        "checkpoints": [(p.name, p.state) for p in await host.checkpoints.of(record.id)],
        "at a checkpoint": record.checkpoint is not None,
        "claims": sorted(c.disk for c in await host.claims.of(record.id)),
        "saved": record.saved is not None,
        "saved files": sorted(p.name for p in host.paths.vm_state(record.id).glob("saved*")),
        "machine": process is not None,
    }
