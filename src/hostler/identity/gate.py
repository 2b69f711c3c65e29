"""Who is calling: from what the transport knows and what the caller says about itself to a principal."""

from __future__ import annotations

from dataclasses import dataclass

from hostler.identity.audit import AuditTrail
from hostler.identity.local import Credentials, local_principal
from hostler.identity.tls import Trust
from hostler.identity.tokens import TokenService
from hostler.model.errors import NotAuthenticated
from hostler.model.principal import Principal, Role


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of a connection: a local process, the certificate (DER) it proved to own, or neither."""

    credentials: Credentials | None = None
    certificate: bytes | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything the edge needs to know callers and to write down what they did."""

    trust: Trust
    tokens: TokenService
    audit: AuditTrail

    async def identify(self, caller: Caller, authorization: str | None) -> Principal | None:
        """Who it is; None when it says nothing about itself.

        A token comes first, whatever the transport: who gives one wants to be what it says. NotAuthenticated for a
        wrong token or a certificate that is not (any more) a peer's, NotPermitted for a local user without rights.
        """
        if authorization is not None:
            return await self._by_token(authorization)
        if caller.certificate is not None:
            return self._by_certificate(caller.certificate)
        if caller.credentials is not None:
            return local_principal(caller.credentials)
        return None

    async def _by_token(self, authorization: str) -> Principal:
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise NotAuthenticated("Authorization header", "is not of the form 'Bearer TOKEN'")
        return await self.tokens.authenticate(secret.strip())

    def _by_certificate(self, certificate: bytes) -> Principal:
        peer = self.trust.peer_of(certificate)
        if peer is None:
            raise NotAuthenticated("client certificate", "is not that of a host known here", "invite the host again")
        return Principal(name=f"host {peer.name}", role=Role.HOST, host_id=peer.id)
