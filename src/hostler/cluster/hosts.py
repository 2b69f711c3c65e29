"""The hosts: this one, those it trusts, and how two come to trust each other."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Sequence

import structlog

from hostler.cluster.peers import PeerBook, PeerLink
from hostler.hardware.memory import free_memory
from hostler.host.context import Host
from hostler.identity.certificates import HostIdentity, check_peer_certificate
from hostler.identity.invitations import InvitationService, read_invitation
from hostler.identity.tls import Trust
from hostler.model.errors import HostlerError, InvalidInput, NotPermitted
from hostler.model.host import HostState, Peer
from hostler.model.views import HostView, Invitation, PeerIntroduction

log = structlog.get_logger()

Connect = Callable[[str, ssl.SSLContext], PeerLink]
"""Makes a link to https://host:port with that TLS context."""


class HostService:
    """The application functions about hosts."""

    def __init__(
        self,
        host: Host,
        peers: PeerBook,
        identity: HostIdentity,
        trust: Trust,
        invitations: InvitationService,
        connect: Connect,
        address: Callable[[], str],
    ) -> None:
        self._host = host
        self._peers = peers
        self._identity = identity
        self._trust = trust
        self._invitations = invitations
        self._connect = connect
        self._address = address

    async def this(self) -> HostView:
        """This host."""
        running = [r.config for r in self._host.running()]
        facts = self._host.facts
        return HostView(
            id=facts.id,
            name=facts.name,
            address=self._address(),
            state=HostState.UP,
            this=True,
            facts=facts,
            running_vms=len(running),
            memory_in_use=sum(c.memory for c in running),
            memory_free=free_memory(),
            fingerprint=self._identity.fingerprint,
        )

    async def list(self) -> Sequence[HostView]:
        """This host and every other it knows, each asked at the same time."""
        others = await asyncio.gather(*(self._look(peer) for peer in self._peers.all()))
        return [await self.this(), *others]

    async def _look(self, peer: Peer) -> HostView:
        try:
            view = await self._peers.link(peer.id).facts()
            return view.but(this=False, address=peer.address, fingerprint=peer.fingerprint)
        except HostlerError as error:
            return HostView(
                id=peer.id,
                name=peer.name,
                address=peer.address,
                state=HostState.UNREACHABLE,
                this=False,
                fingerprint=peer.fingerprint,
                text=error.cause,
            )

    async def invite(self, by: str) -> Invitation:
        """A one-time invitation for another host to join this one."""
        log.info("host.invited", by=by)
        return await self._invitations.create(self._listening(), self._identity.fingerprint)

    def _listening(self) -> str:
        address = self._address()
        if not address:
            raise InvalidInput(
                "this host", "listens on no network address, so no other host can reach it", "start it with --listen"
            )
        return address

    async def join(self, token: str, by: str) -> HostView:
        """Use an invitation: both hosts trust each other afterwards."""
        invitation = read_invitation(token)
        link = self._connect(f"https://{invitation.address}", self._trust.client_context(invitation.fingerprint))
        try:
            answer = await link.introduce(self._introduction(invitation.secret))
        finally:
            await link.close()
        found = check_peer_certificate(answer.certificate)
        if found.fingerprint != invitation.fingerprint or found.host_id != answer.id:
            raise NotPermitted(f"host {answer.name}", "presents itself as another than the one that invited")
        peer = Peer(
            id=answer.id,
            name=answer.name,
            address=invitation.address,
            fingerprint=found.fingerprint,
            certificate=found.certificate,
        )
        await self._peers.add(peer)
        log.info("host.joined", peer=peer.id, name=peer.name, by=by)
        return await self._look(peer)

    def _introduction(self, secret: str = "") -> PeerIntroduction:
        return PeerIntroduction(
            id=self._identity.host_id,
            name=self._host.facts.name,
            address=self._listening(),
            certificate=self._identity.certificate,
            secret=secret,
        )

    async def introduce(self, introduction: PeerIntroduction) -> PeerIntroduction:
        """The inviter's side: a host presents itself with the secret of an invitation."""
        found = check_peer_certificate(introduction.certificate)
        if found.host_id != introduction.id:
            raise InvalidInput(f"host {introduction.name}", "gives an id that is not its certificate's")
        if introduction.id == self._identity.host_id:
            raise InvalidInput(f"host {introduction.name}", "is this host itself", "use the invitation on another one")
        await self._invitations.redeem(introduction.secret)  # first: a stranger learns nothing about our peers
        await self._peers.add(
            Peer(
                id=introduction.id,
                name=introduction.name,
                address=introduction.address,
                fingerprint=found.fingerprint,
                certificate=found.certificate,
            )
        )
        log.info("host.introduced", peer=introduction.id, name=introduction.name)
        return self._introduction()

    async def remove(self, ref: str, by: str) -> None:
        """Trust that host no more. The other host must be told separately; until then it asks in vain."""
        peer = self._peers.get(ref)
        await self._peers.remove(peer.id)
        log.info("host.removed", peer=peer.id, name=peer.name, by=by)

    async def close(self) -> None:
        """Close the links."""
        with contextlib.suppress(HostlerError):
            await self._peers.close()
