"""The client for programs and the command line. Blocking; see `async_client` for asyncio.

    with Client() as client:
        client.vms.start("web1", wait=60)

Every failure is the HostlerError the host raised, or PeerUnreachable, TimedOut, NotAuthenticated or NotPermitted when
the host could not be asked. `wait` is how many seconds the host may take to finish the job before it answers with the
unfinished one; look at `job.is_over`, or use `client.jobs.finish(job)`, which raises what made it fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from hostler.client import answers, calls, wire
from hostler.client.calls import Call
from hostler.client.checkpoints import Checkpoints
from hostler.client.http import Transport
from hostler.client.target import Target, find_target
from hostler.model.errors import Cancelled, InternalError, TimedOut

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hostler.model.backup import BackupView, Pruned
    from hostler.model.backup_requests import (
        BackupChoice,
        BackupExport,
        BackupList,
        BackupPrune,
        BackupRestore,
        BackupRun,
    )
    from hostler.model.chain import ChainReport, ChainRequest, FlattenRequest
    from hostler.model.disk_requests import DiskChange, DiskFlatten, DiskGrow, DiskLimits, DiskMedium, DiskMove
    from hostler.model.foreign import ImportReport
    from hostler.model.image import ImageDetails, VolumeView
    from hostler.model.job import Job, JobState
    from hostler.model.limits import Limits
    from hostler.model.pool import Discover, PoolChange, PoolCreate, PoolScan, PoolView, ScanReport, StorageTarget
    from hostler.model.requests import (
        DiskAdd,
        InspectRequest,
        JoinRequest,
        MigrateRequest,
        NicAdd,
        ShutdownRequest,
        TokenCreate,
        VmChange,
        VmCreate,
        VolumeCreate,
        VolumeRegister,
    )
    from hostler.model.transfer import ExportReport, ExportRequest, ImportRequest
    from hostler.model.views import (
        Deleted,
        Event,
        HostView,
        Invitation,
        MigrationPlan,
        TokenSecret,
        TokenView,
        Version,
    )
    from hostler.model.vm import VmRecord
    from hostler.model.volume import Volume

T = TypeVar("T")

POLL = 10.0
"""Seconds the host holds back its answer while a job that is waited for runs on."""


class Sender(Protocol):
    """Sends a call and reads its answer."""

    def __call__(self, call: Call[T]) -> T: ...


def outcome(job: Job) -> Job:
    """The job, if it is done; raises what made it fail."""
    if job.error is not None:
        raise job.error.to_error()
    if str(job.state) == "cancelled":
        raise Cancelled(f"job {job.id}", f"{job.kind} of {job.target_name or job.target} was cancelled", job=job.id)
    if str(job.state) == "failed":
        raise InternalError(f"job {job.id}", f"{job.kind} failed without saying why", "look at the host's log")
    return job


class Vms:
    """Virtual machines. `ref` is an id or a name."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self) -> list[VmRecord]:
        return self._send(calls.vms())

    def get(self, ref: str) -> VmRecord:
        return self._send(calls.vm(ref))

    def create(self, request: VmCreate, *, dry_run: bool = False) -> VmRecord:
        return self._send(calls.vm_create(request, dry_run=dry_run))

    def change(self, ref: str, change: VmChange, *, when_off: bool = False) -> VmRecord:
        return self._send(calls.vm_change(ref, change, when_off=when_off))

    def delete(self, ref: str, *, disks: bool = False, dry_run: bool = False) -> Deleted:
        return self._send(calls.vm_delete(ref, disks=disks, dry_run=dry_run))

    def act(self, ref: str, action: str, *, wait: float = 0.0) -> Job:
        """`action`: one of calls.ACTIONS."""
        return self._send(calls.vm_act(ref, action, wait=wait))

    def start(self, ref: str, *, wait: float = 0.0) -> Job:
        return self.act(ref, "start", wait=wait)

    def shutdown(self, ref: str, request: ShutdownRequest, *, wait: float = 0.0) -> Job:
        return self._send(calls.vm_shutdown(ref, request, wait=wait))

    def migrate(self, ref: str, request: MigrateRequest, *, wait: float = 0.0) -> Job:
        return self._send(calls.vm_migrate(ref, request, wait=wait))

    def check_migration(self, ref: str, request: MigrateRequest) -> MigrationPlan:
        return self._send(calls.vm_migrate_check(ref, request))

    def screenshot(self, ref: str) -> bytes:
        """The screen as PNG."""
        return self._send(calls.vm_screenshot(ref))

    def attach_disk(self, ref: str, disk: DiskAdd, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_add(ref, disk, wait=wait))

    def check_disk(self, ref: str, disk: DiskAdd) -> VmRecord:
        """The VM as it would be with this disk; nothing is changed."""
        return self._send(calls.disk_add_check(ref, disk))

    def detach_disk(self, ref: str, disk: str, *, timeout: float | None = None, wait: float = 0.0) -> Job:
        return self._send(calls.disk_remove(ref, disk, timeout=timeout, wait=wait))

    def add_nic(self, ref: str, nic: NicAdd) -> VmRecord:
        return self._send(calls.nic_add(ref, nic))

    def remove_nic(self, ref: str, nic: str) -> VmRecord:
        return self._send(calls.nic_remove(ref, nic))


class Disks:
    """Disks that VMs have. (Attaching and detaching are in `Vms`.)"""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def move(self, ref: str, disk: str, request: DiskMove, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_move(ref, disk, request, wait=wait))

    def check_move(self, ref: str, disk: str, request: DiskMove) -> VmRecord:
        """The VM as it would be with the disk there; nothing is changed."""
        return self._send(calls.disk_move_check(ref, disk, request))

    def flatten(self, ref: str, disk: str, request: DiskFlatten, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_flatten(ref, disk, request, wait=wait))

    def grow(self, ref: str, disk: str, request: DiskGrow, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_grow(ref, disk, request, wait=wait))

    def limit(self, ref: str, disk: str, request: DiskLimits, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_limit(ref, disk, request, wait=wait))

    def change_medium(self, ref: str, disk: str, request: DiskMedium, *, wait: float = 0.0) -> Job:
        return self._send(calls.disk_medium(ref, disk, request, wait=wait))

    def change(self, ref: str, disk: str, request: DiskChange, *, when_off: bool = False) -> VmRecord:
        return self._send(calls.disk_change(ref, disk, request, when_off=when_off))


class Volumes:
    """Volumes: disk images a host knows by name."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self, pool: str | None = None) -> list[Volume]:
        return self._send(calls.volumes(pool))

    def get(self, ref: str) -> VolumeView:
        return self._send(calls.volume(ref))

    def create(self, request: VolumeCreate, *, wait: float = 0.0) -> Job:
        return self._send(calls.volume_create(request, wait=wait))

    def register(self, request: VolumeRegister) -> Volume:
        return self._send(calls.volume_register(request))

    def inspect(self, request: InspectRequest) -> ImageDetails:
        return self._send(calls.volume_inspect(request))

    def details(self, ref: str) -> ImageDetails:
        return self._send(calls.volume_details(ref))

    def act(self, ref: str, action: str, request: BaseModel | None = None, *, wait: float = 0.0) -> Job:
        """`action` is one of calls.VOLUME_ACTIONS, `request` its body (hostler.model.volume_requests)."""
        return self._send(calls.volume_act(ref, action, request, wait=wait))

    def chain(self, request: ChainRequest) -> ChainReport:
        """An image with its parents, or every image of a directory."""
        return self._send(calls.volume_chain(request))

    def flatten(self, request: FlattenRequest, *, wait: float = 0.0) -> Job:
        return self._send(calls.volume_flatten(request, wait=wait))

    def delete(self, ref: str, *, keep_file: bool = False, dry_run: bool = False) -> Deleted:
        return self._send(calls.volume_delete(ref, keep_file=keep_file, dry_run=dry_run))


class Pools:
    """Pools: places where volumes are."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self) -> list[PoolView]:
        return self._send(calls.pools())

    def get(self, name: str) -> PoolView:
        return self._send(calls.pool(name))

    def create(self, request: PoolCreate) -> PoolView:
        return self._send(calls.pool_create(request))

    def change(self, name: str, request: PoolChange) -> PoolView:
        return self._send(calls.pool_change(name, request))

    def delete(self, name: str, *, dry_run: bool = False) -> Deleted:
        return self._send(calls.pool_delete(name, dry_run=dry_run))

    def scan(self, name: str, request: PoolScan) -> ScanReport:
        return self._send(calls.pool_scan(name, request))

    def discover(self, request: Discover) -> Sequence[StorageTarget]:
        return self._send(calls.pool_discover(request))


class Backups:
    """Backups of VMs, in directories of the host."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def run(self, vm: str, request: BackupRun, *, wait: float = 0.0) -> Job:
        return self._send(calls.backup_run(vm, request, wait=wait))

    def list(self, request: BackupList) -> list[BackupView]:
        return self._send(calls.backups(request))

    def show(self, request: BackupChoice) -> BackupView:
        return self._send(calls.backup(request))

    def verify(self, request: BackupChoice, *, wait: float = 0.0) -> Job:
        return self._send(calls.backup_verify(request, wait=wait))

    def restore(self, request: BackupRestore, *, wait: float = 0.0) -> Job:
        return self._send(calls.backup_restore(request, wait=wait))

    def export(self, request: BackupExport) -> Job:
        """The job goes on; its progress has the addresses."""
        return self._send(calls.backup_export(request))

    def delete(self, request: BackupChoice, *, dry_run: bool = False) -> Deleted:
        return self._send(calls.backup_delete(request, dry_run=dry_run))

    def prune(self, request: BackupPrune, *, dry_run: bool = False) -> Pruned:
        return self._send(calls.backup_prune(request, dry_run=dry_run))


class Imports:
    """Machines from elsewhere."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def inspect(self, request: ImportRequest) -> ImportReport:
        """What an import would do; nothing is changed."""
        return self._send(calls.import_inspect(request))

    def run(self, request: ImportRequest, *, wait: float = 0.0) -> Job:
        return self._send(calls.import_run(request, wait=wait))


class Exports:
    """Machines that go out. `ref` is an id or a name of a VM."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def check(self, ref: str, request: ExportRequest) -> ExportReport:
        """What would be written; nothing is changed."""
        return self._send(calls.export_check(ref, request))

    def run(self, ref: str, request: ExportRequest, *, wait: float = 0.0) -> Job:
        return self._send(calls.export_run(ref, request, wait=wait))


class Hosts:
    """The host that answers, and its peers."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def this(self) -> HostView:
        return self._send(calls.this_host())

    def list(self) -> list[HostView]:
        return self._send(calls.hosts())

    def limits(self) -> Limits:
        return self._send(calls.limits())

    def invite(self) -> Invitation:
        return self._send(calls.host_invite())

    def join(self, request: JoinRequest) -> HostView:
        return self._send(calls.host_join(request))

    def remove(self, ref: str) -> None:
        self._send(calls.host_remove(ref))


class Jobs:
    """Long work."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self, *, state: JobState | None = None, target: str | None = None) -> Sequence[Job]:
        return self._send(calls.jobs(state=state, target=target))

    def get(self, ref: str, *, wait: float = 0.0) -> Job:
        return self._send(calls.job(ref, wait=wait))

    def cancel(self, ref: str) -> Job:
        return self._send(calls.job_cancel(ref))

    def finish(self, job: Job, *, timeout: float | None = None, on_change: Callable[[Job], None] | None = None) -> Job:
        """Waits until the job is over and raises what made it fail. `timeout` in seconds, None: for ever; TimedOut
        leaves it running."""
        end = None if timeout is None else time.monotonic() + timeout
        while not job.is_over:
            left = POLL if end is None else end - time.monotonic()
            if left <= 0:
                raise TimedOut(f"job {job.id}", f"is not over after {timeout:g} s", "it runs on", job=job.id)
            job = self.get(job.id, wait=min(left, POLL if on_change is None else 1.0))
            if on_change is not None:
                on_change(job)
        return outcome(job)


class Tokens:
    """API tokens."""

    def __init__(self, send: Sender) -> None:
        self._send = send

    def list(self) -> list[TokenView]:
        return self._send(calls.tokens())

    def create(self, request: TokenCreate) -> TokenSecret:
        return self._send(calls.token_create(request))

    def revoke(self, ref: str) -> None:
        self._send(calls.token_revoke(ref))


class Client:
    """A connection to one host. `host`: see `hostler.client.target`; `deadline`: seconds for each answer."""

    def __init__(self, host: str | Target | None = None, *, deadline: float = wire.DEADLINE) -> None:
        target = host if isinstance(host, Target) else find_target(host)
        self.transport = Transport(target, deadline)
        self.vms = Vms(self.send)
        self.disks = Disks(self.send)
        self.checkpoints = Checkpoints(self.send)
        self.volumes = Volumes(self.send)
        self.pools = Pools(self.send)
        self.imports = Imports(self.send)
        self.backups = Backups(self.send)
        self.exports = Exports(self.send)
        self.hosts = Hosts(self.send)
        self.jobs = Jobs(self.send)
        self.tokens = Tokens(self.send)

    def send(self, call: Call[T]) -> T:
        """Any call of `hostler.client.calls`, and its answer."""
        return wire.parse(call, self.raw(call))

    def raw(self, call: Call[Any]) -> bytes:
        """Any call, and its answer as the host wrote it."""
        return self.transport.send(call)

    def version(self) -> Version:
        """`version` and `api_extensions` of the host."""
        return self.send(calls.version())

    def events(self, kind: str | None = None, key: str | None = None) -> Iterator[Event]:
        """Changes from now on; close the iterator to stop. It ends when the host stops (read the present state before
        listening again); PeerUnreachable when the connection breaks."""
        with self.transport.lines("/v1/events", calls.events_query(kind, key)) as lines:
            for line in lines:
                if line.startswith("data:"):
                    yield answers.EVENT.parse(line.removeprefix("data:").strip().encode())

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
