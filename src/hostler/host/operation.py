"""What an operation on a VM is: which states allow it, its steps, and what becomes of it after a crash.

One file per operation in `host/operations/`; each defines one `Operation`. To add one, write that file and put it into
`host/operations/__init__.py`, and its scenario into `testing/scenarios.py`: the generic tests (each step repeated,
failed, unwound twice, cancelled, with QEMU or the daemon killed or the disk full there) then run on it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.steps import Plan, Step
from hostler.model.errors import WrongState
from hostler.model.job import Job, JobState
from hostler.model.names import new_id
from hostler.model.vm import VmRecord, VmState

Params = dict[str, JsonValue]


async def unwind(_host: Host, _actor: VmActor, _job: Job) -> str | None:
    """The usual recovery: undo what was done."""
    return None


@dataclass(frozen=True, slots=True)
class Operation:
    """`states`: where it may begin. `steps`: pure builder of the steps from host, actor and parameters. `resume_at`:
    the step to go on with after the daemon died, given the interrupted job, or None to unwind."""

    kind: str
    verb: str
    states: frozenset[VmState]
    steps: Callable[[Host, VmActor, Params], Sequence[Step]]
    resume_at: Callable[[Host, VmActor, Job], Awaitable[str | None]] = unwind
    cancellable: bool = True

    def allow(self, record: VmRecord) -> None:
        """Raises WrongState unless the VM is in a state that allows this."""
        if record.handed_to is not None:
            raise WrongState(f"vm {record.name}", "is being handed over to another host", "wait until that has ended")
        if record.state not in self.states:
            allowed = " or ".join(sorted(self.states))
            raise WrongState(
                f"vm {record.name}",
                f"is {record.state}; to {self.verb} it must be {allowed}",
                ADVICE.get(record.state, ""),
                state=str(record.state),
                allowed=[str(s) for s in sorted(self.states)],
            )

    def plan(self, host: Host, actor: VmActor, params: Params, job_id: str) -> Plan:
        """The job to run; it lets go of the VM at its end."""

        async def finish(job: Job) -> None:
            await actor.let_go(job_id, as_wished=job.state is JobState.DONE)

        return Plan(
            kind=self.kind,
            target=actor.record.id,
            target_name=actor.record.name,
            steps=self.steps(host, actor, params),
            params=params,
            cancellable=self.cancellable,
            finish=finish,
        )

    async def begin(
        self,
        host: Host,
        actor: VmActor,
        by: str,
        params: Params | None = None,
        require: Callable[[VmRecord], None] | None = None,
        **plan: Any,
    ) -> Job:
        """Hold the VM and start the job. WrongState or Busy if it may not. `require` raises what else stands in its
        way, judged at the moment from which nobody else changes the VM."""
        job_id = new_id()

        def check(record: VmRecord) -> None:
            self.allow(record)
            if require is not None:
                require(record)

        try:  # whoever is cancelled while it waits may have been given the VM all the same
            await actor.hold(job_id, check)
            made = replace(self.plan(host, actor, params or {}, job_id), **plan)
            return await host.jobs.start(made, by, job_id)
        except BaseException:
            await actor.let_go(job_id)
            raise

    async def recover(self, host: Host, actor: VmActor, job: Job) -> None:
        """After a crash: resume or unwind that job; returns when that has begun."""
        plan = self.plan(host, actor, job.params, job.id)
        step = await self.resume_at(host, actor, job)
        if step is None:
            host.jobs.unwind(plan, job)
        else:
            host.jobs.resume(plan, job, step)


ADVICE: dict[VmState, str] = {
    VmState.OFF: "start it first with 'hostler vm start'",
    VmState.RUNNING: "it runs already; 'hostler vm shutdown' stops it",
    VmState.PAUSED: "resume it first with 'hostler vm resume'",
    VmState.SAVED: "restore it with 'hostler vm restore', or give its memory up with 'hostler vm discard-saved'",
    VmState.CRITICAL: "see 'hostler vm show' for the reason; 'hostler vm turn-off' ends it",
}
