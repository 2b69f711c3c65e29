"""API tokens: what a program shows instead of a password. Only a hash of each is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime

from hostler.model.base import Record, utc_now
from hostler.model.errors import AlreadyExists, InvalidInput, NotAuthenticated, NotFound
from hostler.model.names import check_name, nearest
from hostler.model.principal import Principal, Role
from hostler.model.requests import TokenCreate
from hostler.model.views import TokenSecret, TokenView
from hostler.store.contract import ABSENT, Check, CheckFailed, Delete, Put, Store, Transaction

PREFIX = "hstl"
SECRET_BYTES = 32
"""256 random bits: a plain SHA-256 is enough to keep it by, there is nothing to guess that a slow hash would slow."""


class StoredToken(Record):
    """A token as the store keeps it; `digest` is the SHA-256 of the whole text, hex."""

    id: str
    name: str
    role: Role
    created: datetime
    digest: str

    def view(self) -> TokenView:
        """Without its digest."""
        return TokenView(id=self.id, name=self.name, role=self.role, created=self.created)


class TokenService:
    """Makes, lists, revokes and recognises tokens."""

    def __init__(self, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._now = now

    async def create(self, request: TokenCreate) -> TokenSecret:
        """A new token; its secret is in the answer and nowhere else. AlreadyExists when the name is taken."""
        check_name("token", request.name)
        if request.role is Role.HOST:
            raise InvalidInput(
                f"token {request.name}", "cannot have the role 'host'", "hosts are known by certificate: invite it"
            )
        token_id = secrets.token_hex(6)
        secret = f"{PREFIX}_{token_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        token = StoredToken(
            id=token_id, name=request.name, role=request.role, created=self._now(), digest=_digest(secret)
        )
        index = f"token-name/{request.name}"
        writes = [Put(f"token/{token_id}", token.to_json()), Put(index, {"id": token_id})]
        try:
            await self._store.commit(Transaction(writes, [Check(index, ABSENT)], durable=True))
        except CheckFailed as error:
            raise AlreadyExists(f"token {request.name}", "exists already", "choose another name") from error
        return TokenSecret(**dict(token.view()), secret=secret)

    async def list(self) -> Sequence[TokenView]:
        """All tokens by name."""
        return sorted((t.view() for t in await self._all()), key=lambda view: view.name)

    async def revoke(self, ref: str) -> TokenView:
        """Make the token with this id or name useless, from the next request on. NotFound."""
        tokens = await self._all()
        token = next((t for t in tokens if ref in (t.id, t.name)), None)
        if token is None:
            near = nearest(ref, [t.name for t in tokens])
            raise NotFound(f"token {ref}", "does not exist", f"did you mean {near!r}?" if near else "")
        writes = [Delete(f"token/{token.id}"), Delete(f"token-name/{token.name}")]
        await self._store.commit(Transaction(writes, durable=True))
        return token.view()

    async def authenticate(self, secret: str) -> Principal:
        """The caller who shows this secret. NotAuthenticated, without saying what exactly is wrong with it."""
        parts = secret.split("_", 2)
        token_id = parts[1] if len(parts) == 3 and parts[0] == PREFIX and parts[1].isalnum() else ""
        entry = await self._store.get(f"token/{token_id}") if token_id else None
        token = StoredToken.model_validate(entry.value) if entry else None
        known = token.digest if token else ""
        if not hmac.compare_digest(_digest(secret), known) or token is None:
            raise NotAuthenticated("token", "is not valid (any more)", "ask an administrator for a new one")
        return Principal(name=f"token {token.name}", role=token.role)

    async def _all(self) -> Sequence[StoredToken]:
        return [StoredToken.model_validate(entry.value) for entry in await self._store.list("token/")]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
