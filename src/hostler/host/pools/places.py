"""Where new volumes go, and whether what is in a pool may be used as a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hostler.host.pools.service import Pools
from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import BadImage, HostLacks, InvalidInput, NoSpace, NotPermitted
from hostler.model.image import Preallocation
from hostler.model.pool import Health, Placement, PoolState
from hostler.model.units import format_size
from hostler.model.volume import Volume
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.volumes import VolumeService


class Places:
    """`in_use`: the paths that disks of this host's VMs name."""

    def __init__(self, pools: Pools, service: VolumeService, in_use: Callable[[], Iterable[str]]) -> None:
        self._pools = pools
        self._service = service
        self._in_use = in_use

    async def plan(self, pool: str, name: str, size: int, format: ImageFormat, needed: int = 0) -> Placement:
        """Where a new volume would go: in a directory a file that is not there yet; elsewhere the smallest free LUN or
        export that is large enough. `needed`: bytes that will be written to it soon. NoSpace, InvalidInput for a pool
        that takes none, HostLacks for one that does not answer."""
        driver = await self._pools.named(pool)
        health = await driver.check()
        if health.state in (PoolState.UNREACHABLE, PoolState.READ_ONLY):
            raise HostLacks(f"pool {pool}", f"is {health.state}: {health.text}", "see 'hostler pool show'")
        if not driver.pool.in_files:
            return await self._free_one(driver, size, health)
        path = driver.place(name, format)
        free = health.usage.free
        if health.state is PoolState.FULL or (free is not None and needed > free):
            raise NoSpace(
                f"pool {pool}",
                f"has {format_size(free or 0)} free, {format_size(needed)} are needed",
                "free some space in it, or choose another pool",
            )
        return Placement(pool=pool, path=path, format=format, size=size, free=free)

    async def _free_one(self, driver: PoolDriver, size: int, health: Health) -> Placement:
        pool = driver.pool.name
        volumes = await self._service.records()
        taken = {v.path for v in volumes} | {*self._in_use()}
        identities = {v.identity for v in volumes if v.identity}
        found = [
            f for f in (await driver.scan(frozenset(taken))).found if f.identity not in identities or not f.identity
        ]
        fitting = sorted((f for f in found if f.size >= size and f.path not in taken), key=lambda f: (f.size, f.path))
        if not fitting:
            largest = format_size(max((f.size for f in found), default=0))
            raise NoSpace(
                f"pool {pool}",
                f"has no free volume of {format_size(size)} or more (the largest of {len(found)} free ones: {largest})",
                "make one on the storage system, then try again",
            )
        best = fitting[0]
        return Placement(
            pool=pool,
            path=best.path,
            kind=best.kind,
            format=ImageFormat.RAW,
            size=best.size,
            free=health.usage.free,
            identity=best.identity,
        )

    async def make(
        self,
        pool: str,
        name: str,
        size: int,
        format: ImageFormat,
        needed: int = 0,
        preallocation: Preallocation = Preallocation.OFF,
    ) -> Volume:
        """A new, empty volume in that pool; errors as `plan` and VolumeService.create. In a pool of LUNs or exports it
        is one that is there, raw, of at least `size`, with whatever it has in it."""
        place = await self.plan(pool, name, size, format, needed)
        if place.kind is SourceKind.VOLUME:
            return await self._service.create(name, size, format, place.path, pool, preallocation)
        return await self._service.add(
            Volume(
                name=name,
                path=place.path,
                format=place.format,
                size=place.size,
                allocated=place.size,
                kind=place.kind,
                pool=pool,
                identity=place.identity,
            )
        )

    async def require_writable(self, volume: Volume) -> None:
        """Raises InvalidInput for a volume in a library, which no disk may write."""
        if volume.pool:
            driver = await self._pools.named(volume.pool)
            if not driver.pool.writes:
                raise InvalidInput(
                    f"volume {volume.name}",
                    f"is in the library {volume.pool}, which is only read",
                    "attach it as a CD drive (media=cdrom) or read-only",
                )

    async def stays(self, volume: Volume) -> bool:
        """Whether what is behind a volume stays when its record goes: a LUN or export. NotPermitted in a library."""
        if volume.kind is not SourceKind.VOLUME:
            return True
        if volume.pool:
            driver = await self._pools.named(volume.pool)
            if not driver.pool.writes:
                raise NotPermitted(
                    f"volume {volume.name}",
                    f"is in the library {volume.pool}, which is only read",
                    "remove its file from the library's directory yourself",
                )
        return False

    async def verify(self, layer: DiskSource, subject: str) -> None:
        """Before a network volume is opened: what is behind its address must be what was recorded. BadImage, and
        errors of the storage."""
        if not layer.networked:
            return
        driver = await self._pools.named(layer.pool)
        found = await driver.find(layer.path)
        if layer.identity and found.identity != layer.identity:
            raise BadImage(
                subject,
                f"{layer.path} is now {found.identity or 'nameless'}, but {layer.identity} was recorded",
                "the storage has changed its LUNs: scan the pool, and attach the right one",
            )
        if found.size < layer.size:
            raise BadImage(
                subject,
                f"{layer.path} has {format_size(found.size)} now, and had {format_size(layer.size)}",
                "look at the storage system",
            )
