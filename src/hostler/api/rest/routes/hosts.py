"""Hosts: this one, its peers, and what may be asked of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from hostler import __version__
from hostler.api.rest.guard import noun_router
from hostler.api.rest.state import App, By
from hostler.model.limits import Limits
from hostler.model.requests import JoinRequest
from hostler.model.views import HostView, Invitation, Version

router = noun_router("host")

API_EXTENSIONS: tuple[str, ...] = ()
"""Names of what was added to the API after its first release, in order; append only. Clients look here for what a host
can do, never at its version."""

HostRef = Annotated[str, Path(max_length=300, description="Id or name of a host")]


@router.get("/version")
async def get_version() -> Version:
    """Version of the daemon and what its API has beyond the first release's."""
    return Version(version=__version__, api_extensions=API_EXTENSIONS)


@router.get("/host")
async def get_host(app: App) -> HostView:
    """The host that answers."""
    return await app.hosts.this()


@router.get("/hosts")
async def list_hosts(app: App) -> list[HostView]:
    """This host first, then its peers."""
    return list(await app.hosts.list())


@router.get("/limits")
async def get_limits(app: App) -> Limits:
    """The limits of the profile this host runs with."""
    return app.limits


@router.post("/hosts/invitations", status_code=201)
async def invite_host(app: App, by: By) -> Invitation:
    """A one-time text that lets another host join, good for 15 minutes."""
    return await app.hosts.invite(by)


@router.post("/hosts/join")
async def join_host(request: JoinRequest, app: App, by: By) -> HostView:
    """Take an invitation of another host: from then on the two trust each other."""
    return await app.hosts.join(request.invitation, by)


@router.delete("/hosts/{host}", status_code=204)
async def remove_host(host: HostRef, app: App, by: By) -> None:
    """No longer trust a peer."""
    await app.hosts.remove(host, by)
