"""The endpoints, one module per noun. No logic: each calls one function of the application."""

from __future__ import annotations

from fastapi import APIRouter

from hostler.api.rest.routes import (
    backups,
    checkpoints,
    consoles,
    devices,
    disks,
    events,
    hosts,
    imports,
    jobs,
    peers,
    pools,
    tokens,
    vms,
    volume_work,
    volumes,
)

ROUTERS: tuple[APIRouter, ...] = (
    hosts.router,
    vms.router,
    devices.router,
    checkpoints.router,
    disks.router,
    consoles.router,
    volumes.router,
    backups.router,
    volume_work.router,
    pools.router,
    imports.router,
    jobs.router,
    events.router,
    tokens.router,
    peers.router,
)
