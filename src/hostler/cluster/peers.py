"""Other hosts: whom this one trusts, and the link to each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hostler.model.errors import AlreadyExists, HostlerError, NotFound, PeerUnreachable
from hostler.model.host import Peer
from hostler.model.migration import Blocker, IncomingRequest, IncomingStatus
from hostler.model.names import nearest
from hostler.model.views import HostView, OutgoingStatus, PeerIntroduction
from hostler.store.contract import Delete, Put, Store, Transaction


class PeerLink(Protocol):
    """Calls to one other host, over mutual TLS. Every call has a deadline. A typed error of the other side comes back
    as the same class; PeerUnreachable carries `sent` (False: the request certainly never arrived); TimedOut means that
    it may have."""

    async def warm(self) -> None:
        """Open the connection beforehand, so that the next call costs one round trip."""

    async def facts(self) -> HostView: ...
    async def check(self, request: IncomingRequest) -> Sequence[Blocker]: ...
    async def prepare(self, request: IncomingRequest) -> IncomingStatus: ...
    async def status(self, move_id: str) -> IncomingStatus: ...
    async def accept(self, move_id: str) -> IncomingStatus: ...
    async def refuse(self, move_id: str) -> IncomingStatus: ...
    async def outgoing(self, move_id: str) -> OutgoingStatus: ...
    async def introduce(self, introduction: PeerIntroduction) -> PeerIntroduction: ...
    async def close(self) -> None: ...


LinkFactory = Callable[[Peer], PeerLink]
"""Makes the link to a host we trust (pinned to its certificate, presenting ours)."""

TrustChanged = Callable[[Sequence[Peer]], None]
"""Told whom we trust now, so that the listener's TLS accepts exactly those."""


class PeerBook:
    """The hosts this one trusts, and one link to each, made when first needed."""

    def __init__(self, store: Store, make_link: LinkFactory, trust_changed: TrustChanged) -> None:
        self._store = store
        self._make_link = make_link
        self._trust_changed = trust_changed
        self._peers: dict[str, Peer] = {}
        self._links: dict[str, PeerLink] = {}
        self._heard: dict[str, float] = {}

    async def load(self) -> None:
        """Read them from the store."""
        for entry in await self._store.list("peer/"):
            peer = Peer.model_validate(entry.value)
            self._peers[peer.id] = peer
        self._trust_changed(self.all())

    def all(self) -> list[Peer]:
        """Every trusted host, by name."""
        return sorted(self._peers.values(), key=lambda p: p.name)

    def get(self, ref: str) -> Peer:
        """The peer with that id or name. NotFound with the nearest name otherwise."""
        found = self._peers.get(ref) or next((p for p in self._peers.values() if p.name == ref), None)
        if found is None:
            near = nearest(ref, (p.name for p in self._peers.values()))
            advice = f"did you mean {near!r}?" if near else "'hostler host list' shows the hosts this one knows"
            raise NotFound(f"host {ref}", "is not a host that this one knows", advice)
        return found

    def link(self, ref: str) -> PeerLink:
        """The link to that peer."""
        peer = self.get(ref)
        if peer.id not in self._links:
            self._links[peer.id] = self._make_link(peer)
        return self._links[peer.id]

    async def add(self, peer: Peer) -> None:
        """Trust a host from now on; its name and address replace what was known of it. AlreadyExists when another one
        has that name, or when that id is known with another certificate: who may join must not become somebody else."""
        self._refuse_impostor(peer)
        await self._store.commit(Transaction([Put(f"peer/{peer.id}", peer.to_json())], durable=True))
        self._peers[peer.id] = peer
        await self._drop_link(peer.id)
        self._trust_changed(self.all())

    def _refuse_impostor(self, peer: Peer) -> None:
        known = self._peers.get(peer.id)
        if known is not None and known.fingerprint != peer.fingerprint:
            raise AlreadyExists(
                f"host {known.name}",
                "is known here with another certificate",
                f"if it has really got a new one: 'hostler host remove {known.name}', then invite it again",
            )
        if any(p.name == peer.name and p.id != peer.id for p in self._peers.values()):
            raise AlreadyExists(
                f"host {peer.name}",
                "is the name of another host here",
                "give the new host another --name, and invite it again",
            )

    async def remove(self, peer_id: str) -> None:
        """Trust it no more."""
        await self._store.commit(Transaction([Delete(f"peer/{peer_id}")], durable=True))
        self._peers.pop(peer_id, None)
        await self._drop_link(peer_id)
        self._trust_changed(self.all())

    def heard(self, peer_id: str) -> None:
        """Note that this host called us."""
        self._heard[peer_id] = time.monotonic()

    def silent_for(self, peer_id: str) -> float:
        """Seconds since it called us last (since the first question, if it never did)."""
        return time.monotonic() - self._heard.setdefault(peer_id, time.monotonic())

    async def close(self) -> None:
        """Close every link."""
        for peer_id in list(self._links):
            await self._drop_link(peer_id)

    async def _drop_link(self, peer_id: str) -> None:
        link = self._links.pop(peer_id, None)
        if link is not None:
            await link.close()


def never_sent(error: HostlerError) -> bool:
    """Whether a failed call certainly never reached the other host."""
    return isinstance(error, PeerUnreachable) and error.details.get("sent") is False
