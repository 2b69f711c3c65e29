"""The orphan scan of one pool: what is in it against what is on record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hostler.model.disk import SourceKind
from hostler.model.errors import AlreadyExists, HostlerError
from hostler.model.pool import Found, Leftover, Pool, PoolScan, Refused, ScanReport
from hostler.model.volume import Volume, VolumeState
from hostler.storage.pools.contract import Contents, PoolDriver
from hostler.storage.qemu_img import part_prefix
from hostler.storage.volumes import VolumeService


async def scan(driver: PoolDriver, service: VolumeService, in_use: frozenset[str], request: PoolScan) -> ScanReport:
    """Look, and do what is asked. `in_use`: paths of disks of this host's VMs."""
    volumes = await service.records()
    known = known_paths(volumes) | in_use
    contents = await driver.scan(frozenset(known))
    here = [v for v in volumes if v.pool == driver.pool.name]
    missing, changed = await _compare(driver, here)
    unknown = unrecorded(contents, volumes)
    adopted, clashes = await _adopt(driver.pool, service, unknown, request)
    deleted, undeleted = await _delete(driver, contents.leftovers, request)
    return ScanReport(
        pool=driver.pool.name,
        unknown=tuple(unknown),
        missing=tuple(missing),
        changed=tuple(changed),
        leftovers=tuple(contents.leftovers),
        refused=(*contents.refused, *clashes, *undeleted),
        adopted=tuple(adopted),
        deleted=tuple(deleted),
        truncated=contents.truncated,
        dry_run=request.dry_run,
    )


def known_paths(volumes: Iterable[Volume]) -> frozenset[str]:
    """Paths on record, and how the temporary files of those being made begin."""
    found = set()
    for volume in volumes:
        found.add(volume.path)
        if volume.state is VolumeState.CREATING:
            found.add(part_prefix(volume.path))
    return frozenset(found)


def unrecorded(contents: Contents, volumes: Sequence[Volume]) -> list[Found]:
    """What is in the pool and in no record, neither by its path nor, for a LUN, by what it calls itself."""
    paths = {v.path for v in volumes}
    identities = {v.identity for v in volumes if v.identity}
    return [f for f in contents.found if f.path not in paths and not (f.identity and f.identity in identities)]


async def _compare(driver: PoolDriver, volumes: Sequence[Volume]) -> tuple[list[str], list[Refused]]:
    """Volumes whose file or LUN is gone, and those that are something else by now."""
    missing: list[str] = []
    changed: list[Refused] = []
    there = await driver.present([v for v in volumes if v.state is VolumeState.READY])
    for volume in volumes:
        if volume.state is not VolumeState.READY:
            continue
        found = there.get(volume.path)
        if found is None:
            missing.append(volume.name)
        elif found.identity != volume.identity and volume.identity:
            changed.append(Refused(path=volume.path, why=f"is {found.identity}, not {volume.identity} as recorded"))
        elif volume.kind is not SourceKind.VOLUME and found.size != volume.size:
            changed.append(Refused(path=volume.path, why=f"has {found.size} bytes, not {volume.size} as recorded"))
    return missing, changed


async def _adopt(
    pool: Pool, service: VolumeService, unknown: Sequence[Found], request: PoolScan
) -> tuple[list[Volume], list[Refused]]:
    if not request.adopt:
        return [], []
    adopted: list[Volume] = []
    refused: list[Refused] = []
    names = {v.name for v in await service.records()}
    for found in unknown:
        volume = _volume(pool, found, names)
        try:
            adopted.append(volume if request.dry_run else await service.add(volume))
            names.add(volume.name)
        except AlreadyExists:
            continue  # recorded by somebody else meanwhile
        except HostlerError as error:
            refused.append(Refused(path=found.path, why=error.cause))
    return adopted, refused


def _volume(pool: Pool, found: Found, names: set[str]) -> Volume:
    """Named like the file; where that is taken, with the pool's name behind it."""
    stem = "".join(c for c in found.name if c.isprintable() and c not in "/\\").strip().lstrip("-")[:50] or "volume"
    name, number = stem, 1
    while name in names:
        name = f"{stem} ({pool.name})" if number == 1 else f"{stem} ({pool.name} {number})"
        number += 1
    return Volume(
        name=name,
        path=found.path,
        format=found.format,
        size=found.size,
        allocated=found.allocated,
        kind=found.kind,
        pool=pool.name,
        identity=found.identity,
    )


async def _delete(
    driver: PoolDriver, leftovers: Sequence[Leftover], request: PoolScan
) -> tuple[list[str], list[Refused]]:
    if not request.delete_leftovers:
        return [], []
    deleted: list[str] = []
    refused: list[Refused] = []
    for leftover in leftovers:
        try:
            if not request.dry_run:
                await driver.remove_leftover(leftover)
        except HostlerError as error:
            refused.append(Refused(path=leftover.path, why=error.cause))
        else:
            deleted.append(leftover.path)
    return deleted, refused
