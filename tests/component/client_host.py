"""A host for tests of the client and the command line: the real API server over its unix socket and https, in a thread
of its own, with an application behind it that keeps VMs in memory and does what the test says."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hostler.api.rest.app import create_app
from hostler.api.rest.listeners import Listeners
from hostler.api.rest.server import RestServer
from hostler.client.target import Target
from hostler.host.events import EventHub
from hostler.identity.audit import AuditTrail
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.gate import Identity
from hostler.identity.tls import Trust
from hostler.identity.tokens import TokenService
from hostler.model.base import utc_now
from hostler.model.chain import ChainImage, ChainReport, ChainRequest, FlattenRequest
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import GuestRefused, HostlerError, NotFound
from hostler.model.host import Accelerator, AcceleratorChoice, HostFacts, HostState, QemuFacts
from hostler.model.job import Job, JobState, JobStep, Progress, StepState
from hostler.model.limits import PROFILES, Limits, Profile
from hostler.model.links import LinkState
from hostler.model.migration import (
    Blocker,
    IncomingPhase,
    IncomingRequest,
    IncomingStatus,
    MigrationProgress,
    MigrationSettings,
)
from hostler.model.names import nearest, new_id
from hostler.model.nic import Nic
from hostler.model.problem import Problem
from hostler.model.requests import DiskAdd, MigrateRequest, NicAdd, VmChange, VmCreate, VolumeCreate, VolumeRegister
from hostler.model.units import GiB
from hostler.model.views import Deleted, HostView, Invitation, MigrationPlan, OutgoingStatus
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.model.volume import Volume
from hostler.store.sqlite import SqliteStore

PATIENCE = 60.0
"""Seconds for anything that must happen; a loaded machine is slow."""

T = TypeVar("T")

STATES = {
    "start": VmState.RUNNING,
    "restore": VmState.RUNNING,
    "resume": VmState.RUNNING,
    "pause": VmState.PAUSED,
    "save": VmState.SAVED,
}

FACTS = HostFacts(
    id="h1",
    name="alpha",
    logical_processors=2,
    cpu_name="Test CPU",
    memory=8 * GiB,
    accelerator=AcceleratorChoice(kind=Accelerator.TCG, reason="the processor has neither vmx nor svm"),
    qemu=QemuFacts(binary="/usr/bin/qemu-system-x86_64", version="7.2", machines=("pc-q35-7.2",), default_cpu="qemu64"),
    privileged=False,
)


class JobBook:
    """Jobs that end at once, with the error the test set, or, while `held`, when the test lets them."""

    def __init__(self, events: EventHub) -> None:
        self.events = events
        self.by_id: dict[str, Job] = {}
        self.held = False
        self.failure: HostlerError | None = None
        self._changed = asyncio.Condition()

    async def begin(self, kind: str, target: str, params: dict[str, Any], effect: Callable[[], None]) -> Job:
        job = Job(
            id=new_id(), kind=kind, target=f"id-{target}", target_name=target, params=params, by="test",
            created=utc_now(), state=JobState.RUNNING, steps=(JobStep(name="work", state=StepState.RUNNING),),
        )  # fmt: skip
        self.by_id[job.id] = job
        await self.change(job.id)
        if not self.held:
            await self.end(job.id, effect)
        return self.by_id[job.id]

    async def end(self, job_id: str, effect: Callable[[], None] = lambda: None) -> None:
        if self.failure is not None:
            await self.change(job_id, state=JobState.FAILED, error=Problem.of(self.failure), ended=utc_now())
            return
        effect()
        steps = (JobStep(name="work", state=StepState.DONE),)
        await self.change(job_id, state=JobState.DONE, result={}, steps=steps, ended=utc_now())

    async def change(self, job_id: str, **fields: Any) -> None:
        self.by_id[job_id] = self.by_id[job_id].but(**fields)
        async with self._changed:
            self._changed.notify_all()

    async def newest(self, timeout: float) -> Job:
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: bool(self.by_id))
        return [*self.by_id.values()][-1]

    def list(self) -> list[Job]:
        return [*self.by_id.values()]

    def get(self, job_id: str) -> Job:
        found = [job for job in self.by_id.values() if job.id.startswith(job_id)]
        if len(found) != 1:
            raise NotFound(f"job {job_id}", "is not known", "see: hostler job list")
        return found[0]

    async def wait(self, job_id: str, timeout: float) -> Job:
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self.by_id[job_id].is_over)
        except TimeoutError:
            pass
        return self.by_id[job_id]

    async def cancel(self, job_id: str, by: str) -> Job:
        await self.change(job_id, state=JobState.CANCELLED, ended=utc_now())
        return self.by_id[job_id]


class VolumeBook:
    def __init__(self, jobs: JobBook) -> None:
        self.by_name: dict[str, Volume] = {}
        self._jobs = jobs

    async def list(self, pool: str | None = None) -> list[Volume]:
        return [v for v in self.by_name.values() if pool in (None, v.pool)]

    async def get(self, ref: str) -> Volume:
        if ref not in self.by_name:
            raise _missing("volume", ref, self.by_name)
        return self.by_name[ref]

    async def create(self, request: VolumeCreate, by: str) -> Job:
        path = request.path or f"/volumes/{request.name}.{request.format}"
        volume = Volume(name=request.name, path=path, format=request.format, size=request.size or GiB)
        effect = lambda: self.by_name.update({request.name: volume})  # noqa: E731
        return await self._jobs.begin("volume.create", request.name, {}, effect)

    async def register(self, request: VolumeRegister, by: str) -> Volume:
        volume = Volume(name=request.name, path=request.path, format=request.format or "raw", size=GiB)
        self.by_name[request.name] = volume
        return volume

    async def inspect(self, path: str) -> Volume:
        return Volume(name="", path=path, format="qcow2", size=GiB)

    async def chain(self, request: ChainRequest) -> ChainReport:
        image = ChainImage(path=request.path, link=LinkState.MISSING, problem="builds on nothing", advice="find it")
        return ChainReport(path=request.path, images=(image,), sound=False)

    async def flatten(self, request: FlattenRequest, by: str) -> Job:
        return await self.create(VolumeCreate(name=request.name, source=request.source, format=request.format), by)

    async def delete(self, ref: str, by: str, keep_file: bool, dry_run: bool) -> Deleted:
        volume = await self.get(ref)
        if not dry_run:
            del self.by_name[ref]
        paths = {"kept": (volume.path,)} if keep_file else {"removed": (volume.path,)}
        return Deleted(id=ref, **paths)


class VmBook:
    def __init__(self, jobs: JobBook, directory: Path) -> None:
        self.by_name: dict[str, VmRecord] = {}
        self.refuse_create: HostlerError | None = None
        self._jobs, self._directory = jobs, directory

    def list(self) -> list[VmRecord]:
        return list(self.by_name.values())

    def get(self, ref: str) -> VmRecord:
        if ref not in self.by_name:
            raise _missing("vm", ref, self.by_name)
        return self.by_name[ref]

    async def create(self, request: VmCreate, by: str, dry_run: bool) -> VmRecord:
        if self.refuse_create is not None and not dry_run:
            raise self.refuse_create
        fields = request.model_dump(include={"name", "vcpus", "memory", "notes", "tpm", "firmware", "kernel"})
        config = VmConfig(id=f"id-{request.name}", machine="pc-q35-7.2", cpu_model="qemu64", **fields)
        record = VmRecord(config=config)
        for disk in request.disks:
            record = _with_disk(record, disk)
        if not dry_run:
            self.by_name[request.name] = record
        return record

    async def change(self, ref: str, change: VmChange, by: str, when_off: bool) -> VmRecord:
        record = self.by_name.pop(self.get(ref).config.name)
        fields = {name: getattr(change, name) for name in change.model_fields_set}
        record = record.but(config=record.config.but(**fields))
        self.by_name[record.config.name] = record
        return record

    async def delete(self, ref: str, by: str, disks: bool, dry_run: bool) -> Deleted:
        record = self.get(ref)
        if not dry_run:
            del self.by_name[ref]
        paths = tuple(disk.source.path for disk in record.config.disks)
        return Deleted(id=record.config.id, **({"removed": paths} if disks else {"kept": paths}))

    async def act(self, ref: str, action: str, by: str) -> Job:
        return await self._jobs.begin(f"vm.{action}", self.get(ref).config.name, {}, self._to(ref, action))

    async def shutdown(self, ref: str, request: Any, by: str) -> Job:
        return await self._jobs.begin("vm.shutdown", ref, request.model_dump(mode="json"), self._to(ref, "shutdown"))

    def _to(self, ref: str, action: str) -> Callable[[], None]:
        state = STATES.get(action, VmState.OFF)
        return lambda: self.by_name.update({ref: self.get(ref).but(state=state)})

    async def attach_disk(self, ref: str, request: DiskAdd, by: str, dry_run: bool) -> Job | VmRecord:
        record = _with_disk(self.get(ref), request)
        if dry_run:
            return record
        disk = record.config.disks[-1].model_dump(mode="json")
        effect = lambda: self.by_name.update({ref: record})  # noqa: E731
        return await self._jobs.begin("vm.attach-disk", ref, {"disk": disk}, effect)

    async def detach_disk(self, ref: str, disk_id: str, by: str, timeout: float | None) -> Job:
        record = self.get(ref)
        left = tuple(disk for disk in record.config.disks if disk.id != disk_id)
        effect = lambda: self.by_name.update({ref: record.but(config=record.config.but(disks=left))})  # noqa: E731
        return await self._jobs.begin("vm.detach-disk", ref, {"timeout": timeout}, effect)

    async def add_nic(self, ref: str, request: NicAdd, by: str) -> VmRecord:
        record = self.get(ref)
        nic = Nic(id="nic0", mac=request.mac or "52:54:00:00:00:01", **request.model_dump(exclude={"mac"}))
        self.by_name[ref] = record.but(config=record.config.but(nics=(nic,)))
        return self.by_name[ref]

    async def remove_nic(self, ref: str, nic_id: str, by: str) -> VmRecord:
        self.by_name[ref] = self.get(ref).but(config=self.get(ref).config.but(nics=()))
        return self.by_name[ref]

    async def screenshot(self, ref: str) -> bytes:
        return b"\x89PNG of " + self.get(ref).config.name.encode()

    def serial_socket(self, ref: str) -> str:
        return str(self._directory / f"{self.get(ref).config.name}.serial")

    def vnc_socket(self, ref: str) -> str:
        return str(self._directory / f"{self.get(ref).config.name}.vnc")


class HostBook:
    def __init__(self) -> None:
        self.joined: list[str] = []
        self.removed: list[str] = []

    async def this(self) -> HostView:
        return HostView(id="h1", name="alpha", state=HostState.UP, this=True, facts=FACTS, memory_free=4 * GiB)

    async def list(self) -> list[HostView]:
        beta = HostView(id="h2", name="beta", address="10.0.0.2:8690", state=HostState.UNREACHABLE, this=False)
        return [await self.this(), beta]

    async def invite(self, by: str) -> Invitation:
        return Invitation(token="hstj_secret", expires=utc_now())

    async def join(self, token: str, by: str) -> HostView:
        self.joined.append(token)
        return (await self.list())[1]

    async def remove(self, ref: str, by: str) -> None:
        self.removed.append(ref)

    async def introduce(self, introduction: Any) -> Any:
        return introduction


class Moves:
    """The source's and the target's side of moves."""

    def __init__(self, jobs: JobBook) -> None:
        self.blockers: tuple[Blocker, ...] = ()
        self.slow: float = 0.0
        """Seconds until `accept` answers."""
        self.accepted: list[str] = []
        self._jobs = jobs

    async def check(self, *given: Any) -> Any:
        if isinstance(given[0], IncomingRequest):
            return list(self.blockers)
        settings = MigrationSettings(mode=given[1].mode)
        return MigrationPlan(vm="v", source="h1", target="h2", settings=settings, blockers=self.blockers, memory=GiB)

    async def migrate(self, ref: str, request: MigrateRequest, by: str) -> Job:
        return await self._jobs.begin("vm.migrate", ref, request.model_dump(mode="json"), lambda: None)

    async def outgoing(self, move_id: str, peer_id: str) -> OutgoingStatus:
        return OutgoingStatus(known=move_id == "m1", owner=peer_id)

    async def prepare(self, request: IncomingRequest, peer_id: str) -> IncomingStatus:
        return IncomingStatus(phase=IncomingPhase.PREPARED, address="127.0.0.1:1")

    async def status(self, move_id: str, peer_id: str) -> IncomingStatus:
        if move_id != "m1":
            raise NotFound(f"move {move_id}", "is not known here")
        return IncomingStatus(phase=IncomingPhase.PREPARED, loaded=True)

    async def accept(self, move_id: str, peer_id: str) -> IncomingStatus:
        await asyncio.sleep(self.slow)
        self.accepted.append(move_id)
        if move_id == "broken":
            raise RuntimeError("secret insides")
        if move_id == "refused":
            raise GuestRefused("vm v", "will not", "leave it")
        return IncomingStatus(phase=IncomingPhase.ACCEPTED, loaded=True)

    async def refuse(self, move_id: str, peer_id: str) -> IncomingStatus:
        return IncomingStatus(phase=IncomingPhase.REFUSED)


def _missing(kind: str, ref: str, known: Any) -> NotFound:
    near = nearest(ref, known)
    return NotFound(f"{kind} {ref}", "does not exist", f"did you mean {near!r}?" if near else f"see: {kind} list")


def _with_disk(record: VmRecord, request: DiskAdd) -> VmRecord:
    number = len(record.config.disks)
    source = DiskSource(path=str(request.volume or request.device), size=GiB)
    disk = Disk(id=f"disk{number}", source=source, unit=number, read_only=request.read_only)
    return record.but(config=record.config.but(disks=(*record.config.disks, disk)))


@dataclass
class App:
    directory: Path
    limits: Limits = PROFILES[Profile.HOSTLER]
    events: EventHub = field(default_factory=EventHub)

    def __post_init__(self) -> None:
        self.jobs = JobBook(self.events)
        self.volumes = VolumeBook(self.jobs)
        self.vms = VmBook(self.jobs, self.directory)
        self.hosts = HostBook()
        self.migrations = self.incoming = Moves(self.jobs)


@dataclass
class RunningHost:
    """A host that answers. `do` runs something on its loop, where its application lives."""

    app: App
    loop: asyncio.AbstractEventLoop
    socket: Path
    url: str
    identity: HostIdentity
    trust: Trust
    tokens: TokenService

    @property
    def target(self) -> Target:
        return Target(socket=str(self.socket))

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def job(self) -> Job:
        """The newest job; waits until there is one."""
        return self.do(self.app.jobs.newest(PATIENCE))

    def move_on(self, **fields: Any) -> None:
        """Progress of the newest job as of a move."""
        detail = MigrationProgress(**fields).to_json()
        steps = (JobStep(name="pre-copy", state=StepState.RUNNING),)
        change = self.app.jobs.change(self.job().id, progress=Progress(fraction=0.5, detail=detail), steps=steps)
        self.do(change)


async def _serve(directory: Path, ready: Callable[[RunningHost], None], stop: asyncio.Event) -> None:
    store = await SqliteStore.open(directory / "state" / "hostler.db")
    host = load_or_create(directory / "identity", "localhost")
    identity = Identity(Trust(host), TokenService(store), AuditTrail(directory / "audit.jsonl"))
    app = App(directory)
    listeners = Listeners(directory / "api.sock", "127.0.0.1:0")
    server = RestServer(create_app(app, identity), listeners, identity.trust.server_context())  # type: ignore[arg-type]
    await server.start()
    url = f"https://{listeners.https_address}"
    try:
        loop = asyncio.get_running_loop()
        ready(RunningHost(app, loop, directory / "api.sock", url, host, identity.trust, identity.tokens))
        await stop.wait()
    finally:
        await server.stop()
        identity.audit.close()
        await store.close()


@contextmanager
def running_host() -> Iterator[RunningHost]:
    """A host on a short path: a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hc", dir="/tmp") as made:
        found: list[RunningHost] = []
        ready, stop = threading.Event(), asyncio.Event()

        def is_ready(host: RunningHost) -> None:
            found.append(host)
            ready.set()

        def run() -> None:
            try:
                asyncio.run(_serve(Path(made), is_ready, stop))
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="host")
        thread.start()
        ready.wait(PATIENCE)
        try:
            assert found, "the host did not start"
            yield found[0]
        finally:
            if found:
                found[0].loop.call_soon_threadsafe(stop.set)
            thread.join(PATIENCE)
