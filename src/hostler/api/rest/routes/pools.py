"""Pools: places where volumes are."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from hostler.api.rest.guard import noun_router
from hostler.api.rest.routes.vms import DryRun
from hostler.api.rest.state import App, By
from hostler.model.pool import Discover, PoolChange, PoolCreate, PoolScan, PoolView, ScanReport, StorageTarget
from hostler.model.views import Deleted

router = noun_router("pool")

PoolRef = Annotated[str, Path(max_length=100, description="Name of a pool")]


@router.get("/pools")
async def list_pools(app: App) -> list[PoolView]:
    """All pools of this host, as they are now."""
    return list(await app.pools.list())


@router.post("/pools", status_code=201)
async def create_pool(request: PoolCreate, app: App, by: By) -> PoolView:
    """A new pool, of what is there already: a directory, a storage system."""
    return await app.pools.create(request, by)


@router.post("/pools/discover")
async def discover_targets(request: Discover, app: App) -> list[StorageTarget]:
    """The iSCSI targets that a portal tells of. Changes nothing."""
    return list(await app.pools.discover(request))


@router.get("/pools/{pool}")
async def get_pool(pool: PoolRef, app: App) -> PoolView:
    """One pool, as it is now."""
    return await app.pools.get(pool)


@router.patch("/pools/{pool}")
async def change_pool(pool: PoolRef, request: PoolChange, app: App, by: By) -> PoolView:
    """Change its threshold, its notes, or how it is reached."""
    return await app.pools.change(pool, request, by)


@router.delete("/pools/{pool}")
async def delete_pool(pool: PoolRef, app: App, by: By, dry_run: DryRun = False) -> Deleted:
    """Forget a pool. What is in it stays."""
    return await app.pools.delete(pool, by, dry_run)


@router.post("/pools/{pool}/scan")
async def scan_pool(pool: PoolRef, request: PoolScan, app: App, by: By) -> ScanReport:
    """Compare what is in a pool with what is on record."""
    return await app.pools.scan(pool, request, by)
