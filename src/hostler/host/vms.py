"""Everything people and programs ask of VMs: look, create, change, act, attach, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from hostler.host.actor import VmActor, vm_key
from hostler.host.belongings import belongings
from hostler.host.checkpoints.book import remove as forget_checkpoint
from hostler.host.checkpoints.layer_changes import remove_layer
from hostler.host.configure import (
    change_config,
    needs_stop,
    new_config,
    next_disk,
    next_nic,
    with_nic,
    without_nic,
)
from hostler.host.context import Host
from hostler.host.hypervisor import Machine
from hostler.host.operation import Operation, Params
from hostler.host.operations import OPERATIONS
from hostler.host.operations.disks import ATTACH, DETACH, require_disk, require_free_place, with_disk
from hostler.host.operations.stop import SHUTDOWN
from hostler.host.roster import Roster
from hostler.host.volumes.overlays import plan_overlay
from hostler.model.errors import AlreadyExists, InUse, InvalidInput, NotFound, WrongState
from hostler.model.job import Job
from hostler.model.names import nearest, new_id
from hostler.model.requests import DiskAdd, NicAdd, ShutdownRequest, VmChange, VmCreate
from hostler.model.views import Deleted
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.store.contract import ABSENT, Check, Put, Transaction

log = structlog.get_logger()

ACTIONS = ("start", "pause", "resume", "save", "restore", "discard-saved", "turn-off", "reset")
"""What `act` can do; each is the operation `vm.<action>`."""


class VmService:
    """The application functions about VMs; REST, CLI and WMI all end here."""

    def __init__(self, host: Host, roster: Roster) -> None:
        self._host = host
        self._roster = roster
        self._names = asyncio.Lock()
        self._macs = asyncio.Lock()

    # looking

    def list(self) -> Sequence[VmRecord]:
        """Every VM of this host, by name."""
        return sorted((a.record for a in self._host.actors.values()), key=lambda r: r.name)

    def get(self, ref: str) -> VmRecord:
        """The VM with that id or name."""
        return self._host.actor(ref).record

    def serial_socket(self, ref: str) -> str:
        """Where its serial console listens. WrongState when it has none now."""
        return self._socket(ref, "serial.sock")

    def vnc_socket(self, ref: str) -> str:
        """Where its screen listens (RFB). WrongState when it has none now."""
        return self._socket(ref, "vnc.sock")

    def _socket(self, ref: str, name: str) -> str:
        actor = self._host.actor(ref)
        self._machine(actor)
        return str(self._host.paths.vm_run(actor.record.id) / name)

    async def screenshot(self, ref: str) -> bytes:
        """Its screen as PNG."""
        return await self._machine(self._host.actor(ref)).screenshot()

    @staticmethod
    def _machine(actor: VmActor) -> Machine:
        if actor.machine is None:
            raise WrongState(actor.subject, f"is {actor.record.state}: it has no console now", "start it first")
        return actor.machine

    # creating and changing

    async def create(self, request: VmCreate, by: str, dry_run: bool = False) -> VmRecord:
        """Define a VM; it is off. `dry_run`: every check, no change."""
        async with self._names:
            self._require_free_name(request.name)
            config = await new_config(self._host, request)
            if dry_run:
                return VmRecord(config=config)
            actor = await self._insert(VmRecord(config=config))
        log.info("vm.created", vm=config.id, name=config.name, by=by)
        return actor.record

    async def define(self, config: VmConfig, by: str) -> VmRecord:
        """Define a VM whose configuration is complete already: one that comes from elsewhere. AlreadyExists (its name
        or id), InUse (a MAC address)."""
        async with self._names, self._macs:
            self._require_free_name(config.name)
            self._require_free_identity(config)
            actor = await self._insert(VmRecord(config=config))
        log.info("vm.created", vm=config.id, name=config.name, by=by)
        return actor.record

    def _require_free_identity(self, config: VmConfig) -> None:
        if config.id in self._host.actors:
            raise AlreadyExists(f"vm {config.id}", "a VM of this id exists on this host", "take another id")
        taken = {n.mac for a in self._host.actors.values() for n in a.record.config.nics}
        for nic in config.nics:
            if nic.mac in taken:
                raise InUse(f"MAC address {nic.mac}", "belongs to an adapter of this host already", "take new ones")

    def _require_free_name(self, name: str) -> None:
        if any(a.record.name == name for a in self._host.actors.values()):
            raise AlreadyExists(f"vm {name}", "a VM of this name exists on this host", "choose another name")

    async def _insert(self, record: VmRecord) -> VmActor:
        key = vm_key(record.id)
        put = Transaction([Put(key, record.to_json())], [Check(key, ABSENT)], durable=True)
        revision = await self._host.store.commit(put)
        return self._roster.add(record, revision)

    async def change(self, ref: str, request: VmChange, by: str, when_off: bool = False) -> VmRecord:
        """Change it. What needs a stop is refused while it runs, or kept for the next start with `when_off`."""
        host, actor = self._host, self._host.actor(ref)
        async with self._names:
            if request.name is not None and request.name != actor.record.name:
                self._require_free_name(request.name)
            await host.volumes.check_kernel(request.kernel)

            def edit(record: VmRecord) -> VmRecord:
                stop = needs_stop(record, request)
                if stop and not when_off:
                    raise WrongState(
                        actor.subject,
                        f"is {record.state}; to change {', '.join(stop)} it must be off",
                        "shut it down first, or keep the change for its next start with '--when-off'",
                        fields=list(stop),
                    )
                now, later = change_config(host, record, request, bool(stop))
                return record.but(config=now, next_config=later)

            record = await actor.change(edit)
        log.info("vm.changed", vm=record.id, by=by, fields=sorted(request.model_fields_set))
        return record

    async def add_nic(self, ref: str, request: NicAdd, by: str) -> VmRecord:
        """Add an adapter. Needs the VM off."""
        actor = self._off(ref, "add a network adapter")
        await self._host.resources.check_nic(next_nic(self._host, actor.record.config, request))
        async with self._macs:
            nic = next_nic(self._host, actor.record.config, request)
            return await self._edit_config(actor, lambda config: with_nic(config, nic), by)

    async def remove_nic(self, ref: str, nic_id: str, by: str) -> VmRecord:
        """Remove an adapter. Needs the VM off."""
        actor = self._off(ref, "remove a network adapter")
        config = actor.record.config
        if all(n.id != nic_id for n in config.nics):
            have = ", ".join(n.id for n in config.nics) or "none"
            raise NotFound(f"adapter {nic_id} of {actor.subject}", f"there is no such adapter; it has: {have}")
        return await self._edit_config(actor, lambda config: without_nic(config, nic_id), by)

    async def _edit_config(self, actor: VmActor, change: Callable[[VmConfig], VmConfig], by: str) -> VmRecord:
        """Change the configuration, and the one that waits for the next start."""

        def edit(record: VmRecord) -> VmRecord:
            if record.state is not VmState.OFF or record.job is not None:
                raise WrongState(actor.subject, f"is {record.state} by now", "shut it down first")
            waiting = change(record.next_config) if record.next_config else None
            return record.but(config=change(record.config), next_config=waiting)

        record = await actor.change(edit)
        log.info("vm.changed", vm=record.id, by=by)
        return record

    def _off(self, ref: str, verb: str) -> VmActor:
        actor = self._host.actor(ref)
        if actor.record.state is not VmState.OFF or actor.record.job is not None:
            raise WrongState(actor.subject, f"is {actor.record.state}; to {verb} it must be off", "shut it down first")
        return actor

    async def delete(self, ref: str, by: str, disks: bool = False, dry_run: bool = False) -> Deleted:
        """Delete a VM that is off. Its volumes stay unless `disks`; passed-through devices always stay."""
        actor = self._off(ref, "be deleted")
        record = actor.record
        its = await belongings(self._host, record, disks)
        removed = its.removed
        outcome = Deleted(id=record.id, removed=(*removed, *its.memory), kept=its.kept)
        await self._host.volumes.require_unused(removed, but=record.id)
        if dry_run:
            return outcome
        holder = new_id()
        await actor.hold(holder, OPERATIONS["vm.start"].allow)
        try:
            await actor.delete(Transaction([forget_checkpoint(point) for point in its.checkpoints]))
        except BaseException:  # nothing is deleted: whoever tries again must not find it held by nobody
            await actor.let_go(holder)
            raise
        self._host.actors.pop(record.id, None)
        await self._host.claims.release(record.id)
        await self._host.resources.release(record.config, forget=True)
        for path in its.memory:
            await asyncio.to_thread(remove_layer, path)
        for path in removed:
            await self._host.volumes.delete_file(path)
        log.info("vm.deleted", vm=record.id, name=record.name, by=by, removed=list(removed))
        return outcome

    # acting

    async def act(self, ref: str, action: str, by: str) -> Job:
        """Begin one of ACTIONS."""
        operation = OPERATIONS.get(f"vm.{action}") if action in ACTIONS else None
        if operation is None:
            near = nearest(action, ACTIONS)
            raise InvalidInput(f"action {action!r}", "is not one", f"did you mean {near!r}?" if near else "")
        actor = self._host.actor(ref)
        if action == "turn-off":
            await self._cancel_for_turn_off(actor, by)
        return await self._begin(operation, actor, by)

    async def _cancel_for_turn_off(self, actor: VmActor, by: str) -> None:
        """Turning off must work also while a shut-down waits for its guest."""
        job_id = actor.record.job
        if job_id is None:
            return
        try:
            await self._host.jobs.cancel(job_id, by)
        except (WrongState, NotFound):
            return
        await self._host.jobs.wait(job_id, 15.0)

    async def _begin(self, operation: Operation, actor: VmActor, by: str) -> Job:
        return await operation.begin(self._host, actor, by)

    async def shutdown(self, ref: str, request: ShutdownRequest, by: str) -> Job:
        """Begin an orderly shut-down, by the VM's settings unless the request says otherwise."""
        actor = self._host.actor(ref)
        settings = actor.record.config.shutdown
        timeout = request.timeout if request.timeout is not None else settings.timeout
        then = request.then if request.then is not None else settings.then
        return await SHUTDOWN.begin(self._host, actor, by, {"timeout": timeout, "then": str(then)})

    async def attach_disk(self, ref: str, request: DiskAdd, by: str, dry_run: bool = False) -> Job | VmRecord:
        """Begin to attach a disk; with `dry_run` the VM as it would be."""
        actor = self._host.actor(ref)
        ATTACH.allow(actor.record)
        source = await self._host.volumes.resolve(request)
        disk = next_disk(self._host, actor.record, request, source)
        params: Params = {}
        if request.overlay:
            disk, params["overlay"] = await plan_overlay(self._host, actor.record, disk)
        if dry_run:
            return actor.record.but(config=with_disk(actor.record.config, disk))
        params["disk"] = disk.to_json()
        return await ATTACH.begin(self._host, actor, by, params, require=lambda now: require_free_place(now, disk))

    async def detach_disk(self, ref: str, disk_id: str, by: str, timeout: float | None = None) -> Job:
        """Begin to detach a disk; `timeout` seconds (default 30) for the guest to let go."""
        actor = self._host.actor(ref)
        require_disk(actor.record, disk_id)
        limit = 30.0 if timeout is None else timeout
        return await DETACH.begin(self._host, actor, by, {"disk_id": disk_id, "timeout": limit})
