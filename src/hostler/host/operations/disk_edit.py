"""What the operations on a VM's disks share: a disk changed in the record, wherever it stands there, and claims that
follow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operations.launching import CLAIM_TRIES, outrun
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import Busy
from hostler.model.vm import VmConfig, VmRecord
from hostler.store.contract import CheckFailed

DiskEdit = Callable[[Disk], Disk]


def edit_disk(record: VmRecord, disk_id: str, edit: DiskEdit) -> VmRecord:
    """The record with that disk changed, now and in the configuration that waits for the next start."""
    waiting = _edited(record.next_config, disk_id, edit) if record.next_config else None
    return record.but(config=_edited(record.config, disk_id, edit), next_config=waiting)


def _edited(config: VmConfig, disk_id: str, edit: DiskEdit) -> VmConfig:
    return config.but(disks=tuple(edit(d) if d.id == disk_id else d for d in config.disks))


async def change_disk(actor: VmActor, disk_id: str, durable: bool = False, **changes: object) -> None:
    """Change fields of a disk in the VM's record."""
    await actor.change(lambda now: edit_disk(now, disk_id, lambda d: d.but(**changes)), durable=durable)


async def claim_exactly(host: Host, actor: VmActor, disks: Sequence[Disk]) -> None:
    """Make the VM's claims for those disks be what the disks are made of, and nothing else."""
    for left in reversed(range(CLAIM_TRIES)):
        extra = await host.claims.plan_exactly(actor.record.id, disks, actor.record.generation)
        if not extra.writes:
            return
        try:
            await actor.set(False, extra)
            return
        except CheckFailed as error:
            if not left:
                raise outrun(actor) from error


def require_same(record: VmRecord, disk: Disk) -> None:
    """Busy when the disk was changed since the request was looked at."""
    if record.config.disk(disk.id) != disk:
        raise Busy(f"disk {disk.id} of vm {record.name}", "was changed at the same moment", "try again")


def source_of(params: object) -> DiskSource:
    """A source as a job's parameters have it."""
    return DiskSource.model_validate(params)
