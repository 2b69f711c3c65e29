"""Host to host: for other hosts only, known by their certificate."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from hostler.api.rest.guard import noun_router
from hostler.api.rest.state import App, PeerId
from hostler.model.migration import Blocker, IncomingRequest, IncomingStatus
from hostler.model.views import HostView, OutgoingStatus, PeerIntroduction

router = noun_router("peer", prefix="/peer/v1")

MoveId = Annotated[str, Path(max_length=100, description="Id of the migration")]


@router.post("/join")
async def introduce_peer(introduction: PeerIntroduction, app: App) -> PeerIntroduction:
    """Another host takes an invitation; the secret in it, good once, is all that it is known by."""
    return await app.hosts.introduce(introduction)


@router.get("/facts")
async def get_facts(app: App) -> HostView:
    """What this host has."""
    return await app.hosts.this()


@router.post("/check")
async def check_incoming(request: IncomingRequest, app: App, peer: PeerId) -> list[Blocker]:
    """What would keep this VM from coming here. Changes nothing."""
    return list(await app.incoming.check(request, peer))


@router.post("/incoming")
async def prepare_incoming(request: IncomingRequest, app: App, peer: PeerId) -> IncomingStatus:
    """Make ready for a VM: reserve, start a QEMU that waits for the stream."""
    return await app.incoming.prepare(request, peer)


@router.get("/incoming/{id}")
async def get_incoming(id: MoveId, app: App, peer: PeerId) -> IncomingStatus:
    """How far it is."""
    return await app.incoming.status(id, peer)


@router.post("/incoming/{id}/accept")
async def accept_incoming(id: MoveId, app: App, peer: PeerId) -> IncomingStatus:
    """The hand-over: from the answer on this host owns the VM. The guest stands still meanwhile."""
    return await app.incoming.accept(id, peer)


@router.delete("/incoming/{id}")
async def refuse_incoming(id: MoveId, app: App, peer: PeerId) -> IncomingStatus:
    """It will not come; clear away what was prepared. Answers `accepted` where it is too late."""
    return await app.incoming.refuse(id, peer)


@router.get("/outgoing/{id}")
async def get_outgoing(id: MoveId, app: App, peer: PeerId) -> OutgoingStatus:
    """What this host, the source, says of a move."""
    return await app.migrations.outgoing(id, peer)
