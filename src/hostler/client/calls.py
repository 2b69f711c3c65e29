"""Every request of the API, built in one place and sent by whoever has a connection: the blocking client, the asyncio
one, a peer. A call is a value: method, path, query, body, and what its answer is read as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import quote

from hostler.client import answers
from hostler.client.answers import Answer
from hostler.model.errors import InvalidInput

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
    from hostler.model.checkpoint import CheckpointView
    from hostler.model.checkpoint_requests import (
        CheckpointApply,
        CheckpointChange,
        CheckpointClone,
        CheckpointCreate,
    )
    from hostler.model.disk_requests import DiskChange, DiskFlatten, DiskGrow, DiskLimits, DiskMedium, DiskMove
    from hostler.model.foreign import ImportReport
    from hostler.model.image import ImageDetails, VolumeView
    from hostler.model.job import Job, JobState
    from hostler.model.limits import Limits
    from hostler.model.migration import Blocker, IncomingRequest, IncomingStatus
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
        HostView,
        Invitation,
        MigrationPlan,
        OutgoingStatus,
        PeerIntroduction,
        TokenSecret,
        TokenView,
        Version,
    )
    from hostler.model.vm import VmRecord
    from hostler.model.volume import Volume

T = TypeVar("T")

ACTIONS = ("start", "pause", "resume", "save", "restore", "discard-saved", "turn-off", "reset")
"""What a VM can be told without a body."""
VOLUME_ACTIONS = ("checksum", "validate", "grow", "shrink", "convert", "compact", "clone")
"""What a volume can be told."""
LONGEST_WAIT = 3600.0
"""Seconds; the API waits no longer in one request."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `wait`: seconds the host may take on purpose before it answers, on top of the usual deadline."""

    method: str
    path: str
    answer: Answer[T]
    query: Mapping[str, str] = field(default_factory=dict)
    body: BaseModel | None = None
    wait: float = 0.0

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does no harm."""
        return self.method == "GET"

    def content(self) -> bytes | None:
        """The body as JSON. Of what people ask for only what was said is sent, so that the host's defaults hold."""
        if self.body is None:
            return None
        only_said = self.body.model_config.get("extra") == "forbid"
        return self.body.model_dump_json(exclude_unset=only_said).encode()


def url_part(kind: str, reference: str) -> str:
    """A name or id as one segment of a path. InvalidInput for what cannot be one: "" would be the whole collection,
    "." and ".." another one."""
    if not reference.strip() or reference in (".", "..") or "/" in reference:
        raise InvalidInput(f"{kind} {reference!r}", f"is not the name or id of a {kind}", f"see: hostler {kind} list")
    return quote(reference, safe="")


def _query(wait: float = 0.0, **flags: bool) -> dict[str, str]:
    query = {name: "true" for name, given in flags.items() if given}
    if wait > 0:
        query["wait"] = f"{min(wait, LONGEST_WAIT):g}"
    return query


def _vm(vm: str, rest: str = "") -> str:
    return f"/v1/vms/{url_part('vm', vm)}{rest}"


# virtual machines


def vms() -> Call[list[VmRecord]]:
    return Call("GET", "/v1/vms", answers.VMS)


def vm(ref: str) -> Call[VmRecord]:
    return Call("GET", _vm(ref), answers.VM)


def vm_create(request: VmCreate, *, dry_run: bool = False) -> Call[VmRecord]:
    return Call("POST", "/v1/vms", answers.VM, _query(dry_run=dry_run), request)


def vm_change(ref: str, change: VmChange, *, when_off: bool = False) -> Call[VmRecord]:
    return Call("PATCH", _vm(ref), answers.VM, _query(when_off=when_off), change)


def vm_delete(ref: str, *, disks: bool = False, dry_run: bool = False) -> Call[Deleted]:
    return Call("DELETE", _vm(ref), answers.DELETED, _query(disks=disks, dry_run=dry_run))


def vm_act(ref: str, action: str, *, wait: float = 0.0) -> Call[Job]:
    """`action` is one of ACTIONS."""
    if action not in ACTIONS:
        raise InvalidInput(f"action {action!r}", "is not one a vm knows", f"one of: {', '.join(ACTIONS)}")
    return Call("POST", _vm(ref, f"/{action}"), answers.JOB, _query(wait), wait=wait)


def vm_shutdown(ref: str, request: ShutdownRequest, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/shutdown"), answers.JOB, _query(wait), request, wait)


def vm_migrate(ref: str, request: MigrateRequest, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/migrate"), answers.JOB, _query(wait), request, wait)


def vm_migrate_check(ref: str, request: MigrateRequest) -> Call[MigrationPlan]:
    return Call("POST", _vm(ref, "/migrate/check"), answers.PLAN, body=request)


def vm_screenshot(ref: str) -> Call[bytes]:
    return Call("GET", _vm(ref, "/screenshot"), answers.BYTES)


def disk_add(ref: str, disk: DiskAdd, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/disks"), answers.JOB, _query(wait), disk, wait)


def disk_add_check(ref: str, disk: DiskAdd) -> Call[VmRecord]:
    """The VM as it would be with this disk."""
    return Call("POST", _vm(ref, "/disks"), answers.VM, _query(dry_run=True), disk)


def disk_remove(ref: str, disk: str, *, timeout: float | None = None, wait: float = 0.0) -> Call[Job]:
    query = _query(wait) | ({} if timeout is None else {"timeout": f"{timeout:g}"})
    return Call("DELETE", _vm(ref, f"/disks/{url_part('disk', disk)}"), answers.JOB, query, wait=wait)


def disk_move(ref: str, disk: str, request: DiskMove, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _disk(ref, disk, "/move"), answers.JOB, _query(wait), request, wait)


def disk_move_check(ref: str, disk: str, request: DiskMove) -> Call[VmRecord]:
    """The VM as it would be with the disk there."""
    return Call("POST", _disk(ref, disk, "/move"), answers.VM, _query(dry_run=True), request)


def disk_flatten(ref: str, disk: str, request: DiskFlatten, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _disk(ref, disk, "/flatten"), answers.JOB, _query(wait), request, wait)


def disk_grow(ref: str, disk: str, request: DiskGrow, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _disk(ref, disk, "/grow"), answers.JOB, _query(wait), request, wait)


def disk_limit(ref: str, disk: str, request: DiskLimits, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _disk(ref, disk, "/limits"), answers.JOB, _query(wait), request, wait)


def disk_medium(ref: str, disk: str, request: DiskMedium, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _disk(ref, disk, "/medium"), answers.JOB, _query(wait), request, wait)


def disk_change(ref: str, disk: str, request: DiskChange, *, when_off: bool = False) -> Call[VmRecord]:
    return Call("PATCH", _disk(ref, disk), answers.VM, _query(when_off=when_off), request)


def _disk(ref: str, disk: str, rest: str = "") -> str:
    return _vm(ref, f"/disks/{url_part('disk', disk)}{rest}")


def nic_add(ref: str, nic: NicAdd) -> Call[VmRecord]:
    return Call("POST", _vm(ref, "/nics"), answers.VM, body=nic)


def nic_remove(ref: str, nic: str) -> Call[VmRecord]:
    return Call("DELETE", _vm(ref, f"/nics/{url_part('nic', nic)}"), answers.VM)


def serial_path(ref: str) -> str:
    """Where the websocket of a VM's serial port is."""
    return _vm(ref, "/serial")


def vnc_path(ref: str) -> str:
    """Where the websocket of a VM's screen (raw RFB) is."""
    return _vm(ref, "/vnc")


# checkpoints


def _checkpoint(ref: str, checkpoint: str, rest: str = "") -> str:
    return _vm(ref, f"/checkpoints/{url_part('checkpoint', checkpoint)}{rest}")


def checkpoints(ref: str) -> Call[list[CheckpointView]]:
    return Call("GET", _vm(ref, "/checkpoints"), answers.CHECKPOINTS)


def checkpoint(ref: str, checkpoint: str) -> Call[CheckpointView]:
    return Call("GET", _checkpoint(ref, checkpoint), answers.CHECKPOINT)


def checkpoint_create(ref: str, request: CheckpointCreate, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/checkpoints"), answers.JOB, _query(wait), request, wait)


def checkpoint_change(ref: str, checkpoint: str, request: CheckpointChange) -> Call[CheckpointView]:
    return Call("PATCH", _checkpoint(ref, checkpoint), answers.CHECKPOINT, body=request)


def checkpoint_delete(ref: str, checkpoint: str, *, subtree: bool = False, wait: float = 0.0) -> Call[Job]:
    return Call("DELETE", _checkpoint(ref, checkpoint), answers.JOB, _query(wait, subtree=subtree), wait=wait)


def checkpoint_apply(ref: str, checkpoint: str, request: CheckpointApply, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _checkpoint(ref, checkpoint, "/apply"), answers.JOB, _query(wait), request, wait)


def checkpoint_clone(ref: str, checkpoint: str, request: CheckpointClone, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _checkpoint(ref, checkpoint, "/clone"), answers.JOB, _query(wait), request, wait)


# volumes


def volumes(pool: str | None = None) -> Call[list[Volume]]:
    return Call("GET", "/v1/volumes", answers.VOLUMES, {} if pool is None else {"pool": pool})


def volume(ref: str) -> Call[VolumeView]:
    return Call("GET", f"/v1/volumes/{url_part('volume', ref)}", answers.VOLUME_VIEW)


def volume_create(request: VolumeCreate, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/volumes", answers.JOB, _query(wait), request, wait)


def volume_register(request: VolumeRegister) -> Call[Volume]:
    return Call("POST", "/v1/volumes/register", answers.VOLUME, body=request)


def volume_inspect(request: InspectRequest) -> Call[ImageDetails]:
    return Call("POST", "/v1/volumes/inspect", answers.IMAGE, body=request)


def volume_details(ref: str) -> Call[ImageDetails]:
    return Call("GET", f"/v1/volumes/{url_part('volume', ref)}/details", answers.IMAGE)


def volume_act(ref: str, action: str, request: BaseModel | None = None, *, wait: float = 0.0) -> Call[Job]:
    """`action` and its body: see hostler.model.volume_requests. InvalidInput when no volume knows it."""
    if action not in VOLUME_ACTIONS:
        raise InvalidInput(f"action {action!r}", "is not one a volume knows", f"one of: {', '.join(VOLUME_ACTIONS)}")
    path = f"/v1/volumes/{url_part('volume', ref)}/{action}"
    return Call("POST", path, answers.JOB, _query(wait), request, wait)


def volume_chain(request: ChainRequest) -> Call[ChainReport]:
    return Call("POST", "/v1/volumes/chain", answers.CHAIN, body=request)


def volume_flatten(request: FlattenRequest, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/volumes/flatten", answers.JOB, _query(wait), request, wait)


def volume_delete(ref: str, *, keep_file: bool = False, dry_run: bool = False) -> Call[Deleted]:
    query = _query(keep_file=keep_file, dry_run=dry_run)
    return Call("DELETE", f"/v1/volumes/{url_part('volume', ref)}", answers.DELETED, query)


# pools


def pools() -> Call[list[PoolView]]:
    return Call("GET", "/v1/pools", answers.POOLS)


def pool(name: str) -> Call[PoolView]:
    return Call("GET", f"/v1/pools/{url_part('pool', name)}", answers.POOL)


def pool_create(request: PoolCreate) -> Call[PoolView]:
    return Call("POST", "/v1/pools", answers.POOL, body=request)


def pool_change(name: str, request: PoolChange) -> Call[PoolView]:
    return Call("PATCH", f"/v1/pools/{url_part('pool', name)}", answers.POOL, body=request)


def pool_delete(name: str, *, dry_run: bool = False) -> Call[Deleted]:
    return Call("DELETE", f"/v1/pools/{url_part('pool', name)}", answers.DELETED, _query(dry_run=dry_run))


def pool_scan(name: str, request: PoolScan) -> Call[ScanReport]:
    return Call("POST", f"/v1/pools/{url_part('pool', name)}/scan", answers.SCAN, body=request, wait=90.0)


# backups


def backup_run(ref: str, request: BackupRun, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/backups"), answers.JOB, _query(wait), request, wait)


def backups(request: BackupList) -> Call[list[BackupView]]:
    return Call("POST", "/v1/backups/list", answers.BACKUPS, body=request)


def backup(request: BackupChoice) -> Call[BackupView]:
    return Call("POST", "/v1/backups/show", answers.BACKUP, body=request)


def backup_verify(request: BackupChoice, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/backups/verify", answers.JOB, _query(wait), request, wait)


def backup_restore(request: BackupRestore, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/backups/restore", answers.JOB, _query(wait), request, wait)


def backup_export(request: BackupExport, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/backups/export", answers.JOB, _query(wait), request, wait)


def backup_delete(request: BackupChoice, *, dry_run: bool = False) -> Call[Deleted]:
    return Call("POST", "/v1/backups/delete", answers.DELETED, _query(dry_run=dry_run), request)


def backup_prune(request: BackupPrune, *, dry_run: bool = False) -> Call[Pruned]:
    return Call("POST", "/v1/backups/prune", answers.PRUNED, _query(dry_run=dry_run), request)


# machines from elsewhere


def import_inspect(request: ImportRequest) -> Call[ImportReport]:
    return Call("POST", "/v1/imports/inspect", answers.IMPORT_REPORT, body=request)


def import_run(request: ImportRequest, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", "/v1/imports", answers.JOB, _query(wait), request, wait)


def pool_discover(request: Discover) -> Call[list[StorageTarget]]:
    return Call("POST", "/v1/pools/discover", answers.TARGETS, body=request)


def export_check(ref: str, request: ExportRequest) -> Call[ExportReport]:
    return Call("POST", _vm(ref, "/export/check"), answers.EXPORT_REPORT, body=request)


def export_run(ref: str, request: ExportRequest, *, wait: float = 0.0) -> Call[Job]:
    return Call("POST", _vm(ref, "/export"), answers.JOB, _query(wait), request, wait)


# hosts


def this_host() -> Call[HostView]:
    return Call("GET", "/v1/host", answers.HOST)


def hosts() -> Call[list[HostView]]:
    return Call("GET", "/v1/hosts", answers.HOSTS)


def limits() -> Call[Limits]:
    return Call("GET", "/v1/limits", answers.LIMITS)


def host_invite() -> Call[Invitation]:
    return Call("POST", "/v1/hosts/invitations", answers.INVITATION)


def host_join(request: JoinRequest) -> Call[HostView]:
    return Call("POST", "/v1/hosts/join", answers.HOST, body=request)


def host_remove(ref: str) -> Call[None]:
    return Call("DELETE", f"/v1/hosts/{url_part('host', ref)}", answers.NOTHING)


# jobs, tokens, the rest


def jobs(*, state: JobState | str | None = None, target: str | None = None) -> Call[list[Job]]:
    given = {"state": state, "target": target}
    return Call("GET", "/v1/jobs", answers.JOBS, {name: str(value) for name, value in given.items() if value})


def job(ref: str, *, wait: float = 0.0) -> Call[Job]:
    return Call("GET", f"/v1/jobs/{url_part('job', ref)}", answers.JOB, _query(wait), wait=wait)


def job_cancel(ref: str) -> Call[Job]:
    return Call("POST", f"/v1/jobs/{url_part('job', ref)}/cancel", answers.JOB)


def tokens() -> Call[list[TokenView]]:
    return Call("GET", "/v1/tokens", answers.TOKENS)


def token_create(request: TokenCreate) -> Call[TokenSecret]:
    return Call("POST", "/v1/tokens", answers.TOKEN_SECRET, body=request)


def token_revoke(ref: str) -> Call[None]:
    return Call("DELETE", f"/v1/tokens/{url_part('token', ref)}", answers.NOTHING)


def version() -> Call[Version]:
    return Call("GET", "/v1/version", answers.VERSION)


def events_query(kind: str | None = None, key: str | None = None) -> dict[str, str]:
    """The query of GET /v1/events."""
    return {name: value for name, value in (("kind", kind), ("key", key)) if value}


# host to host


def peer_facts() -> Call[HostView]:
    return Call("GET", "/peer/v1/facts", answers.HOST)


def peer_check(request: IncomingRequest) -> Call[list[Blocker]]:
    return Call("POST", "/peer/v1/check", answers.BLOCKERS, body=request)


def peer_prepare(request: IncomingRequest) -> Call[IncomingStatus]:
    return Call("POST", "/peer/v1/incoming", answers.INCOMING, body=request)


def peer_status(id: str) -> Call[IncomingStatus]:
    return Call("GET", f"/peer/v1/incoming/{url_part('move', id)}", answers.INCOMING)


def peer_accept(id: str) -> Call[IncomingStatus]:
    return Call("POST", f"/peer/v1/incoming/{url_part('move', id)}/accept", answers.INCOMING)


def peer_refuse(id: str) -> Call[IncomingStatus]:
    return Call("DELETE", f"/peer/v1/incoming/{url_part('move', id)}", answers.INCOMING)


def peer_outgoing(id: str) -> Call[OutgoingStatus]:
    return Call("GET", f"/peer/v1/outgoing/{url_part('move', id)}", answers.OUTGOING)


def peer_introduce(introduction: PeerIntroduction) -> Call[PeerIntroduction]:
    return Call("POST", "/peer/v1/join", answers.INTRODUCTION, body=introduction)
