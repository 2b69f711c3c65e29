"""What an answer is read as. The models are imported only when an answer is really read: a command that prints JSON as
it came needs none of them, and they are most of the time such a command would take."""

from __future__ import annotations

import functools
import importlib
import types
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from hostler.model.backup import BackupView, Pruned
    from hostler.model.chain import ChainReport
    from hostler.model.checkpoint import CheckpointView
    from hostler.model.foreign import ImportReport
    from hostler.model.image import ImageDetails, VolumeView
    from hostler.model.job import Job
    from hostler.model.limits import Limits
    from hostler.model.migration import Blocker, IncomingStatus
    from hostler.model.pool import PoolView, ScanReport, StorageTarget
    from hostler.model.transfer import ExportReport
    from hostler.model.views import (
        Deleted,
        Event,
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


class Answer(Generic[T]):
    """How the bytes of an answer become a value."""

    def parse(self, content: bytes) -> T:
        """The value; ValueError (which pydantic's ValidationError is) when it is not what was expected."""
        raise NotImplementedError


class Model(Answer[T]):
    """A model of `hostler.model`, or a list of them."""

    def __init__(self, module: str, name: str, *, many: bool = False) -> None:
        self.module, self.name, self.many = module, name, many

    def model(self) -> Any:
        """The type, imported now."""
        found: Any = getattr(importlib.import_module(f"hostler.model.{self.module}"), self.name)
        return types.GenericAlias(list, found) if self.many else found

    def parse(self, content: bytes) -> T:
        return cast(T, self._adapter.validate_json(content))

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        from pydantic import TypeAdapter  # noqa: PLC0415 - see the head of this module

        return TypeAdapter(self.model())


class _Bytes(Answer[bytes]):
    def parse(self, content: bytes) -> bytes:
        return content


class _Nothing(Answer[None]):
    def parse(self, content: bytes) -> None:
        return None


VM: Answer[VmRecord] = Model("vm", "VmRecord")
VMS: Answer[list[VmRecord]] = Model("vm", "VmRecord", many=True)
VOLUME: Answer[Volume] = Model("volume", "Volume")
VOLUME_VIEW: Answer[VolumeView] = Model("image", "VolumeView")
IMAGE: Answer[ImageDetails] = Model("image", "ImageDetails")
CHAIN: Answer[ChainReport] = Model("chain", "ChainReport")
VOLUMES: Answer[list[Volume]] = Model("volume", "Volume", many=True)
CHECKPOINT: Answer[CheckpointView] = Model("checkpoint", "CheckpointView")
CHECKPOINTS: Answer[list[CheckpointView]] = Model("checkpoint", "CheckpointView", many=True)
POOL: Answer[PoolView] = Model("pool", "PoolView")
POOLS: Answer[list[PoolView]] = Model("pool", "PoolView", many=True)
TARGETS: Answer[list[StorageTarget]] = Model("pool", "StorageTarget", many=True)
SCAN: Answer[ScanReport] = Model("pool", "ScanReport")
BACKUP: Answer[BackupView] = Model("backup", "BackupView")
BACKUPS: Answer[list[BackupView]] = Model("backup", "BackupView", many=True)
PRUNED: Answer[Pruned] = Model("backup", "Pruned")
EXPORT_REPORT: Answer[ExportReport] = Model("transfer", "ExportReport")
IMPORT_REPORT: Answer[ImportReport] = Model("foreign", "ImportReport")
JOB: Answer[Job] = Model("job", "Job")
JOBS: Answer[list[Job]] = Model("job", "Job", many=True)
HOST: Answer[HostView] = Model("views", "HostView")
HOSTS: Answer[list[HostView]] = Model("views", "HostView", many=True)
LIMITS: Answer[Limits] = Model("limits", "Limits")
INVITATION: Answer[Invitation] = Model("views", "Invitation")
DELETED: Answer[Deleted] = Model("views", "Deleted")
PLAN: Answer[MigrationPlan] = Model("views", "MigrationPlan")
EVENT: Answer[Event] = Model("views", "Event")
TOKENS: Answer[list[TokenView]] = Model("views", "TokenView", many=True)
TOKEN_SECRET: Answer[TokenSecret] = Model("views", "TokenSecret")
BLOCKERS: Answer[list[Blocker]] = Model("migration", "Blocker", many=True)
INCOMING: Answer[IncomingStatus] = Model("migration", "IncomingStatus")
OUTGOING: Answer[OutgoingStatus] = Model("views", "OutgoingStatus")
INTRODUCTION: Answer[PeerIntroduction] = Model("views", "PeerIntroduction")
VERSION: Answer[Version] = Model("views", "Version")
BYTES: Answer[bytes] = _Bytes()
NOTHING: Answer[None] = _Nothing()
