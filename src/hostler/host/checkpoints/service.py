"""Everything people and programs ask of checkpoints: look, make, rename, apply, make a new VM, delete."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress

import structlog

from hostler.host.actor import VmActor
from hostler.host.checkpoints.book import pick, put
from hostler.host.checkpoints.layer_changes import written
from hostler.host.checkpoints.layers import depth
from hostler.host.configure import check_config
from hostler.host.context import Host
from hostler.host.operation import Params
from hostler.host.operations import checkpoint_apply, checkpoint_clone, checkpoint_create, checkpoint_delete
from hostler.model.base import utc_now
from hostler.model.checkpoint import (
    Checkpoint,
    CheckpointKind,
    CheckpointState,
    CheckpointView,
    default_name,
    in_tree_order,
    subtree,
)
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointChange, CheckpointClone, CheckpointCreate
from hostler.model.disk import SourceKind
from hostler.model.errors import AlreadyExists, InvalidInput, LimitExceeded, WrongState
from hostler.model.job import Job
from hostler.model.names import check_name, new_id
from hostler.model.vm import Autostart, VmConfig, VmRecord, VmState
from hostler.network.mac import new_mac
from hostler.store.contract import Transaction

log = structlog.get_logger()


class Checkpoints:
    """The application functions about checkpoints."""

    def __init__(self, host: Host) -> None:
        self._host = host

    # looking

    async def list(self, ref: str) -> Sequence[CheckpointView]:
        """A VM's checkpoints, each after the one it builds on."""
        record = self._host.actor(ref).record
        points = await self._host.checkpoints.of(record.id)
        ordered = [point for _, point in in_tree_order(points)]
        return await asyncio.to_thread(lambda: [_view(p, record) for p in ordered])

    async def get(self, ref: str, checkpoint: str) -> CheckpointView:
        """One of them, by name or id."""
        actor, point = await self._find(ref, checkpoint)
        return await asyncio.to_thread(_view, point, actor.record)

    async def _find(self, ref: str, checkpoint: str) -> tuple[VmActor, Checkpoint]:
        actor = self._host.actor(ref)
        return actor, pick(await self._host.checkpoints.of(actor.record.id), checkpoint, actor.subject)

    # making

    async def create(self, ref: str, request: CheckpointCreate, by: str) -> Job:
        """Begin to make one; the job's result is the checkpoint."""
        actor = self._host.actor(ref)
        operation = checkpoint_create.OPERATION
        operation.allow(actor.record)
        params = await self._creation(actor, request)
        return await operation.begin(self._host, actor, by, params, lambda now: _require_possible(now, request.kind))

    async def _creation(self, actor: VmActor, request: CheckpointCreate) -> Params:
        """The parameters of a creation, or the refusal."""
        record = actor.record
        _require_possible(record, request.kind)
        points = await self._host.checkpoints.of(record.id)
        prune = _surplus(points, request.keep)
        room = self._room(record, points)
        count = len(points) + 1 - len({p.id for p in [*prune, *room]})
        self._host.limits.refuse_above(actor.subject, "vm_checkpoints", count, "the number of its checkpoints")
        params = _creation_params(record, request)
        for name, going in (("room", room), ("prune", [p for p in prune if p not in room])):
            if going:
                params[name] = _deletion_params(going)
        return params

    def _room(self, record: VmRecord, points: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """The automatic checkpoint that has to go first where a chain would get too long; its layers are merged."""
        limit, needed = self._host.limits.chain_depth, depth(record.config) + 1
        if needed <= limit or not written(record.config):
            return ()
        oldest = next((p for p in points if p.automatic and p.state is CheckpointState.READY), None)
        if oldest is None:
            raise LimitExceeded(
                f"vm {record.name}",
                f"its disks would have {needed} layers, but the limit chain_depth of profile"
                f" {self._host.limits.profile} is {limit}",
                "delete a checkpoint first; its layers are merged while the VM runs",
                limit="chain_depth",
                value=needed,
                maximum=limit,
                profile=str(self._host.limits.profile),
            )
        return (oldest,)

    # changing

    async def change(self, ref: str, checkpoint: str, request: CheckpointChange, by: str) -> CheckpointView:
        """Give it another name, other notes."""
        actor, point = await self._find(ref, checkpoint)
        changes = {name: getattr(request, name) for name in request.model_fields_set}
        if changes.get("name") is not None:
            check_name("checkpoint", str(changes["name"]))
        if None in changes.values():
            raise InvalidInput(f"checkpoint {point.name}", "a name and notes are text", "leave out what shall stay")
        if actor.record.job is not None:
            raise WrongState(actor.subject, "is busy with another operation", "wait for it")
        changed = point.but(**changes)
        await actor.set(extra=Transaction([put(changed)]))
        self._host.events.publish("checkpoint", changed.id, changed)
        log.info("checkpoint.changed", vm=actor.record.id, checkpoint=point.id, by=by)
        return await asyncio.to_thread(_view, changed, actor.record)

    async def delete(self, ref: str, checkpoint: str, by: str, subtree_too: bool = False) -> Job:
        """Begin to delete it, and with `subtree_too` all that build on it; their layers are merged or removed."""
        actor, point = await self._find(ref, checkpoint)
        going = [point]
        if subtree_too:
            going = subtree(await self._host.checkpoints.of(actor.record.id), point.id)
        return await checkpoint_delete.OPERATION.begin(self._host, actor, by, _deletion_params(going))

    async def apply(self, ref: str, checkpoint: str, request: CheckpointApply, by: str) -> Job:
        """Begin to make the VM what it was then; the job's result is the VM."""
        actor, point = await self._find(ref, checkpoint)
        _require_ready(point)
        check_config(self._host, checkpoint_apply.applied(point, actor.record.config, ""))

        def require(now: VmRecord) -> None:
            if now.state is not VmState.OFF and not request.turn_off:
                raise WrongState(
                    f"vm {now.name}",
                    f"is {now.state}; to apply a checkpoint it must be off",
                    "shut it down first, or give '--turn-off'; '--checkpoint-first' keeps what it is now",
                )

        require(actor.record)
        params: Params = {"point": point.to_json(), "token": _token(), "generation_id": new_id()}
        if request.first:
            kind = CheckpointKind.FULL if actor.record.state in (VmState.RUNNING, VmState.SAVED) else None
            first = CheckpointCreate(kind=kind or CheckpointKind.DISKS, notes=f"before {point.name!r} was applied")
            params["first"] = {**await self._creation(actor, first)}
        return await checkpoint_apply.OPERATION.begin(self._host, actor, by, params, require)

    async def clone(self, ref: str, checkpoint: str, request: CheckpointClone, by: str) -> Job:
        """Begin to make a new VM from it; the job's result is the VM."""
        actor, point = await self._find(ref, checkpoint)
        _require_ready(point)
        check_name("vm", request.name)
        if any(a.record.name == request.name for a in self._host.actors.values()):
            raise AlreadyExists(f"vm {request.name}", "a VM of this name exists on this host", "choose another name")
        config = self._cloned(point, request.name)
        check_config(self._host, config)
        params: Params = {"config": config.to_json(), "token": _token(), "full": request.full}
        return await checkpoint_clone.OPERATION.begin(self._host, actor, by, params)

    def _cloned(self, point: Checkpoint, name: str) -> VmConfig:
        """The new VM, with the disks still those of the checkpoint."""
        assert point.config is not None
        others = [a.record.config for a in self._host.actors.values()]
        taken = {n.mac for c in [*others, point.config] for n in c.nics}
        nics = []
        for nic in point.config.nics:
            mac = new_mac(secrets.token_bytes)
            while mac in taken:
                mac = new_mac(secrets.token_bytes)
            taken.add(mac)
            nics.append(nic.but(mac=mac))
        vm_id = new_id()
        return point.config.but(
            id=vm_id,
            name=name,
            generation_id=new_id(),
            nics=tuple(nics),
            autostart=Autostart(),
            run_as=self._host.resources.user_for(vm_id, others),
        )


# pure


def _token() -> str:
    """A name for layers made now."""
    return secrets.token_hex(4)


def _require_possible(record: VmRecord, kind: CheckpointKind) -> None:
    """The refusal of a checkpoint that cannot be made of a VM as it is now."""
    subject = f"vm {record.name}"
    if kind is CheckpointKind.APPLICATION and record.state is not VmState.RUNNING:
        raise WrongState(
            subject, f"is {record.state}: no guest agent can freeze its file systems", "leave out the kind, or start it"
        )
    if kind is CheckpointKind.FULL and record.state is VmState.PAUSED:
        raise WrongState(
            subject, "is paused; a checkpoint with memory is made of a guest that runs", "resume it, or save it first"
        )
    for disk in written(record.config):
        if disk.reservations:
            raise InvalidInput(
                f"disk {disk.id} of {subject}",
                "is a device the guest talks to itself (persistent reservations), which can have no layers",
                "detach it first, or attach it without reservations",
            )
        if disk.source.size <= 0 and disk.source.kind is not SourceKind.EMPTY:
            raise InvalidInput(
                f"disk {disk.id} of {subject}", "its size is not known", "attach it anew, so that it is looked at"
            )


def _require_ready(point: Checkpoint) -> None:
    if point.state is not CheckpointState.READY or point.config is None:
        raise WrongState(
            f"checkpoint {point.name}",
            f"is {point.state}",
            "choose another one; one that is being deleted is no more what it was",
        )


def _creation_params(record: VmRecord, request: CheckpointCreate) -> Params:
    now = utc_now()
    name = check_name("checkpoint", request.name) if request.name is not None else default_name(record.name, now)
    kind = CheckpointKind.DISKS if record.state is VmState.OFF else request.kind
    point = Checkpoint(
        id=new_id(),
        vm=record.id,
        name=name,
        kind=kind,
        state=CheckpointState.CREATING,
        notes=request.notes,
        created=now,
        automatic=request.keep is not None,
    )
    return {"checkpoint": point.to_json(), "token": _token()}


def _surplus(points: Sequence[Checkpoint], keep: int | None) -> list[Checkpoint]:
    """The oldest automatic ones, so that `keep` are left with the one that is being made."""
    if keep is None:
        return []
    automatic = [p for p in points if p.automatic and p.state is not CheckpointState.CREATING]
    return automatic[: max(0, len(automatic) + 1 - keep)]


def _deletion_params(going: Sequence[Checkpoint]) -> Params:
    return {"ids": [p.id for p in going], "memory": [p.memory for p in going if p.memory is not None]}


def _view(point: Checkpoint, record: VmRecord) -> CheckpointView:
    """With what its own files take: the layers made for the VM that are topmost in it, and its memory."""
    paths = [source.path for source in point.frozen().values() if source.node]
    size = 0
    for path in [*paths, *([point.memory] if point.memory else [])]:
        with suppress(OSError):
            size += os.stat(path).st_blocks * 512
    return CheckpointView(**dict(point), size=size, now=record.checkpoint == point.id)
