"""What a daemon does first: find the VMs its predecessor left, finish or unwind what was under way, tidy the rest.

for each VM:  its QEMU lives and answers -> adopted;  is gone -> off, with its last output;
              lives but does not answer -> critical, tried again until it answers or is gone
then for each: an interrupted job -> resumed or unwound;  none -> settled
last: processes, run directories and taps that belong to no VM go away
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Operation
from hostler.host.roster import Roster
from hostler.host.steps import Plan, Step, nothing
from hostler.host.volumes.chains import FLATTEN
from hostler.host.volumes.operations import VOLUME_OPERATIONS
from hostler.model.errors import HostlerError
from hostler.model.job import Job, JobState, StepState
from hostler.model.vm import CriticalReason, VmRecord, VmState
from hostler.storage.claims import job_of
from hostler.store.contract import Put, Transaction, Value

log = structlog.get_logger()

RETRY = 5.0
"""Seconds between two attempts to adopt a QEMU that lives but does not answer."""
AUTOSTART_PATIENCE = 300.0
"""Seconds until the next VM is started even if the one before has not finished starting."""


class Adoption:
    """Takes over what is there. `operations`: every kind of job on a VM, and how it is recovered; `recoveries`: by
    kind, how a job is recovered that has no VM (yet)."""

    def __init__(
        self,
        host: Host,
        roster: Roster,
        operations: dict[str, Operation],
        recoveries: Mapping[str, Callable[[Job], Awaitable[None]]] | None = None,
    ) -> None:
        self._host = host
        self._roster = roster
        self._operations = operations
        on_volumes = dict.fromkeys(VOLUME_OPERATIONS, host.volumes.work.recover)
        of_volumes = {"volume.create": host.volumes.recover, FLATTEN: host.volumes.chains.recover}
        self._recoveries = {**of_volumes, **on_volumes, **(recoveries or {})}
        self._retrying: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Adopt everything. Returns when all is settled but what does not answer."""
        host = self._host
        unfinished = {job.id: job for job in await host.jobs.load()}
        for entry in await host.store.list("vm/"):
            self._roster.add(VmRecord.model_validate(entry.value), entry.revision)
        held = {actor.record.job for actor in host.actors.values()}
        await asyncio.gather(*(self._adopt(actor, unfinished) for actor in list(host.actors.values())))
        for job in unfinished.values():
            if job.target not in host.actors:
                await self._recover_without_vm(job)
            elif job.id not in held:
                self._end_unheld(job)

    async def _adopt(self, actor: VmActor, unfinished: dict[str, Job]) -> None:
        try:
            found = await self._attach(actor)
        except HostlerError as error:
            log.warning("vm.adoption-failed", vm=actor.record.id, why=str(error))
            await self._mark_silent(actor, error)
            task = asyncio.create_task(self._keep_trying(actor, unfinished), name=f"adopt {actor.record.id}")
            self._retrying.add(task)
            task.add_done_callback(self._retrying.discard)
            return
        log.info("vm.adopted", vm=actor.record.id, state=actor.record.state, qemu=found)
        await self._recover(actor, unfinished)

    async def _attach(self, actor: VmActor) -> bool:
        host, vm_id = self._host, actor.record.id
        run_dir = str(host.paths.vm_run(vm_id))
        machine = await host.hypervisor.adopt(vm_id, run_dir)
        if machine is None:
            with contextlib.suppress(OSError):  # its log lies in its user's directory, and may be anything
                actor.note_last_output(await host.hypervisor.last_output(run_dir))
            return False
        actor.attach(machine)
        return True

    @staticmethod
    async def _mark_silent(actor: VmActor, error: HostlerError) -> None:
        actor.silent = True
        if actor.record.job is None:
            text = f"its QEMU is there but does not answer: {error.cause}"
            await actor.set(state=VmState.CRITICAL, reason=CriticalReason.INCONSISTENT, reason_text=text)

    async def _keep_trying(self, actor: VmActor, unfinished: dict[str, Job]) -> None:
        held = actor.record.job
        while True:
            await asyncio.sleep(RETRY)
            if actor.machine is not None or actor.record.state is VmState.OFF:
                actor.silent = False
                return
            with contextlib.suppress(HostlerError):  # it still does not answer; said once is enough
                await self._attach(actor)
                actor.silent = False
                if actor.record.job == held:  # else somebody has begun to turn it off
                    await self._recover(actor, unfinished)
                return

    async def _recover(self, actor: VmActor, unfinished: dict[str, Job]) -> None:
        held = actor.record.job
        job = unfinished.get(held) if held is not None else None
        operation = self._operations.get(job.kind) if job is not None else None
        if job is not None and operation is not None:
            log.info("job.recover", job=job.id, kind=job.kind, vm=actor.record.id)
            await operation.recover(self._host, actor, job)
        elif job is not None:
            log.warning("job.unknown-kind", job=job.id, kind=job.kind)
            await actor.let_go(job.id)
            self._host.jobs.unwind(Plan(job.kind, job.target, job.target_name, ()), job)
        elif held is not None:
            await actor.let_go(held)
        elif actor.record.state is not VmState.MIGRATING:  # such a one has just arrived: see settle_arrivals
            await actor.settle()

    async def settle_arrivals(self) -> None:
        """After the moves to this host were recovered: settle the VMs that had arrived but were not yet let go on."""
        for actor in list(self._host.actors.values()):
            if actor.record.job is None:
                await actor.settle()

    def _end_unheld(self, job: Job) -> None:
        """A job gives its VM back as its last deed: only its last word is missing. (One that never reached its last
        step was given up before it began.)"""
        last = job.steps[-1]
        if job.state is JobState.RUNNING and last.state is not StepState.PENDING:
            plan = Plan(job.kind, job.target, job.target_name, (Step(last.name, nothing),))
            self._host.jobs.resume(plan, job, last.name)
        else:
            self._host.jobs.unwind(Plan(job.kind, job.target, job.target_name, ()), job)

    async def _recover_without_vm(self, job: Job) -> None:
        """A job on a volume, or one that has removed its VM from here: then only its last word is missing."""
        recovery = self._recoveries.get(job.kind)
        if recovery is not None:
            await recovery(job)
        elif job.target in self._host.moved:
            last = Step(job.steps[-1].name, nothing)
            self._host.jobs.resume(Plan(job.kind, job.target, job.target_name, (last,)), job, last.name)
        else:
            self._host.jobs.unwind(Plan(job.kind, job.target, job.target_name, ()), job)

    async def tidy(self, keep: Iterable[str]) -> None:
        """Remove what belongs to no VM: `keep` has the ids of VMs that are on their way here."""
        host = self._host
        known = {*host.actors, *keep}
        for entry in await host.store.list("claim-of/"):
            vm_id = entry.key.removeprefix("claim-of/")
            if vm_id not in host.actors and not host.jobs.is_under_way(job_of(vm_id)):
                await host.claims.release(vm_id)
        for actor in list(host.actors.values()):
            await self._one(actor.record.id, self._tidy_off(actor))
        vms = host.paths.run_dir / "vms"
        for directory in sorted(vms.iterdir()) if vms.is_dir() else []:
            if directory.name not in known:
                await self._one(directory.name, self._tidy_leftover(directory))
        await host.resources.remove_stray_taps(
            [a.record.config for a in host.actors.values() if a.machine is not None], keep
        )

    @staticmethod
    async def _one(vm_id: str, tidying: Awaitable[None]) -> None:
        """What belongs to a VM's user may be anything: one VM's trouble must not keep the daemon from starting."""
        try:
            await tidying
        except Exception:  # the top of one VM's tidying; the daemon and the other VMs do not depend on its success
            log.exception("vm.tidy-failed", vm=vm_id)

    async def _tidy_leftover(self, directory: Path) -> None:
        host = self._host
        log.info("host.leftover", run_dir=str(directory))
        await host.hypervisor.kill_leftovers(directory.name, str(directory))
        await host.resources.clear(directory)

    async def _tidy_off(self, actor: VmActor) -> None:
        """A daemon that died just when a VM's end was recorded has not given back what it held."""
        host, record = self._host, actor.record
        if record.state is not VmState.OFF or record.job is not None or actor.machine is not None:
            return
        if host.paths.vm_run(record.id).exists():
            await host.resources.release(record.config)
        await host.claims.release(record.id)

    async def close(self) -> None:
        """Stop trying."""
        for task in self._retrying:
            task.cancel()
        await asyncio.gather(*self._retrying, return_exceptions=True)


async def autostart(host: Host, start: Callable[[str], Awaitable[Job]], boot_key: str = "host/boot") -> None:
    """Start the VMs that start with the host, in order, each followed by its delay. Only once after each boot of the
    host: a daemon that is restarted starts nothing that its owner has stopped, and goes on where it was killed."""
    try:
        begun = await _begun(host, boot_key)
        if begun is None:
            return
        for record in in_start_order([a.record for a in host.actors.values()]):
            if record.id not in begun:
                begun.append(record.id)
                await _note(host, boot_key, begun, complete=False)
                await _autostart_one(host, record, start)
        await _note(host, boot_key, begun, complete=True)
    except HostlerError as error:
        log.error("host.autostart-broken-off", why=str(error))


async def _begun(host: Host, boot_key: str) -> list[str] | None:
    """The VMs that were started after this boot already; None when all were."""
    last = await host.store.get(boot_key)
    if last is None or last.value.get("boot_id") != host.facts.boot_id:
        return []
    begun = last.value.get("begun")
    return None if last.value.get("complete", True) or not isinstance(begun, list) else [str(vm) for vm in begun]


async def _note(host: Host, boot_key: str, begun: Sequence[str], complete: bool) -> None:
    value: Value = {"boot_id": host.facts.boot_id, "begun": [*begun], "complete": complete}
    await host.store.commit(Transaction([Put(boot_key, value)]))


async def _autostart_one(host: Host, record: VmRecord, start: Callable[[str], Awaitable[Job]]) -> None:
    try:
        job = await start(record.id)
    except HostlerError as error:
        log.warning("vm.autostart-failed", vm=record.id, why=str(error))
        return
    ended = await host.jobs.wait(job.id, AUTOSTART_PATIENCE)
    log.info("vm.autostart", vm=record.id, outcome=ended.state)
    if ended.state is JobState.DONE:
        await asyncio.sleep(record.config.autostart.delay)


def in_start_order(records: Sequence[VmRecord]) -> list[VmRecord]:
    """The VMs that start with the host, first one first: by order, then by name."""
    wanted = [r for r in records if r.config.autostart.enabled and r.state in (VmState.OFF, VmState.SAVED)]
    return sorted(wanted, key=lambda r: (r.config.autostart.order, r.name))
