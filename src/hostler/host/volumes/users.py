"""Who depends on a volume: VMs, also those that are off, other volumes, and whoever else says so (checkpoints)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

from hostler.host.actor import VmActor
from hostler.model.checkpoint import Checkpoint
from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import InUse
from hostler.model.image import Dependent, UserKind
from hostler.model.vm import VmConfig, VmRecord, VmState
from hostler.model.volume import Volume
from hostler.storage.claims import KEEPER, ClaimBook, job_of, real_path
from hostler.storage.volumes import VolumeService

Source = Callable[[Volume], Awaitable[Iterable[Dependent]]]
"""Something else that knows who depends on a volume."""


class VolumeUsers:
    """The users of this host's volumes. `sources` may be extended by whoever keeps volumes for something."""

    def __init__(self, actors: Mapping[str, VmActor], claims: ClaimBook, service: VolumeService) -> None:
        self._actors = actors
        self._claims = claims
        self._service = service
        self.sources: list[Source] = []

    async def of(self, volume: Volume) -> tuple[Dependent, ...]:
        """Everybody who would miss it, VMs first."""
        found = [*self._vms(volume), *await self._holders(volume)]
        for other in await self._service.list():
            if other.backing is not None and real_path(other.backing) == real_path(volume.path):
                how = f"volume {other.name} holds the changes to it"
                found.append(Dependent(kind=UserKind.VOLUME, id=other.name, name=other.name, how=how))
        for source in self.sources:
            found += await source(volume)
        return tuple({(d.kind, d.id, d.how): d for d in found}.values())

    async def require_none(self, volume: Volume) -> None:
        """InUse, with everybody who depends on it."""
        users = await self.of(volume)
        if users:
            raise refusal(volume, users, "detach or delete those first")

    async def require_alone(self, volume: Volume) -> None:
        """InUse if it is a part of something larger: a layer that others build on, or that builds on others. Its
        content or size must not change, whoever has it open."""
        users = await self.of(volume)
        others = [u for u in users if u.kind in (UserKind.VOLUME, UserKind.CHECKPOINT)]
        layered = volume.backing is not None or any(
            disk.source.backing is not None for actor in self._actors.values() for disk in _disks(actor.record, volume)
        )
        if others or layered:
            raise refusal(volume, others or users, "delete the checkpoints or layers first, or flatten the chain")

    async def require_top(self, volume: Volume) -> None:
        """InUse if something builds on it, now or when it is applied: whoever wrote it would change that, too."""
        users = [u for u in await self.of(volume) if u.kind in (UserKind.VOLUME, UserKind.CHECKPOINT)]
        path = real_path(volume.path)
        for actor in self._actors.values():
            for disk in _disks(actor.record, volume):
                if real_path(disk.source.path) != path:
                    how = f"disk {disk.id} of vm {actor.record.name} builds on it"
                    users.append(Dependent(kind=UserKind.VM, id=actor.record.id, name=actor.record.name, how=how))
        if users:
            raise refusal(volume, users, "attach it with --read-only, or use a copy of it (volume create --from)")

    async def follow(self, old: Volume, new: Volume) -> None:
        """Tell the VMs that have it, all of them off, where it is now, in which format and how large."""
        for actor in list(self._actors.values()):
            if any(True for _ in _disks(actor.record, old)) and actor.record.state is VmState.OFF:
                await actor.change(lambda record: _moved(record, old, new))

    def _vms(self, volume: Volume) -> Iterator[Dependent]:
        for actor in self._actors.values():
            record = actor.record
            for disk in _disks(record, volume):
                how = f"it is disk {disk.id} of vm {record.name} ({record.state})"
                yield Dependent(kind=UserKind.VM, id=record.id, name=record.name, how=how)

    async def _holders(self, volume: Volume) -> list[Dependent]:
        found = []
        for claim in await self._claims.on(volume.path):
            job = job_of(claim.vm)
            if job is not None:
                found.append(Dependent(kind=UserKind.JOB, id=job, name=job[:8], how=f"job {job[:8]} works on it"))
            elif claim.vm not in self._actors and claim.vm != KEEPER:
                how = f"it is disk {claim.disk} of vm {claim.vm}, which is on its way here"
                found.append(Dependent(kind=UserKind.VM, id=claim.vm, name=claim.vm, how=how))
        return found


def of_checkpoints(every: Callable[[], Awaitable[Iterable[Checkpoint]]]) -> Source:
    """The checkpoints that hold a volume as a layer."""

    async def users(volume: Volume) -> list[Dependent]:
        path = real_path(volume.path)
        return [
            Dependent(kind=UserKind.CHECKPOINT, id=point.id, name=point.name, how=f"checkpoint {point.name!r} holds it")
            for point in await every()
            if any(
                layer.local and real_path(layer.path) == path for s in point.frozen().values() for layer in s.layers()
            )
        ]

    return users


def refusal(volume: Volume, users: Iterable[Dependent], advice: str) -> InUse:
    """Says who depends on a volume."""
    listed = list(users)
    shown = "; ".join(user.how for user in listed[:5]) or "it is a layer of a disk"
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return InUse(
        f"volume {volume.name}", f"is in use: {shown}{more}", advice, users=[user.to_json() for user in listed]
    )


def _configs(record: VmRecord) -> Iterator[VmConfig]:
    yield record.config
    if record.next_config is not None:
        yield record.next_config


def _disks(record: VmRecord, volume: Volume) -> Iterator[Disk]:
    path = real_path(volume.path)
    for config in _configs(record):
        for disk in config.disks:
            if any(layer.local and real_path(layer.path) == path for layer in disk.source.layers()):
                yield disk


def _moved(record: VmRecord, old: Volume, new: Volume) -> VmRecord:
    if record.state is not VmState.OFF:
        return record
    path = real_path(old.path)

    def source(found: DiskSource) -> DiskSource:
        if found.local and found.backing is None and real_path(found.path) == path:
            return found.but(path=new.path, format=new.format, size=new.size)
        return found

    def config(found: VmConfig) -> VmConfig:
        return found.but(disks=tuple(d.but(source=source(d.source)) for d in found.disks))

    waiting = None if record.next_config is None else config(record.next_config)
    return record.but(config=config(record.config), next_config=waiting)
