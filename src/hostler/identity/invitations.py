"""One-time invitations by which two hosts come to trust each other.

The text that a person carries from one host to the other holds where the inviting host is, the fingerprint of its
certificate (so that the joining host knows whom it talks to) and a secret (so that the inviting host knows who joins).
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import StringConstraints, ValidationError

from hostler.model.base import Record, utc_now
from hostler.model.errors import InvalidInput, NotPermitted
from hostler.model.views import Invitation
from hostler.store.contract import Check, CheckFailed, Delete, Put, Store, Transaction

LIFETIME = timedelta(minutes=15)
"""Time enough to walk to the other machine, and little to lose if the text is left lying about."""

_KEY = "invitation/"


class InvitationText(Record):
    """What the invitation says to the host that joins. `address` is host:port, `fingerprint` hex."""

    address: Annotated[str, StringConstraints(min_length=3, max_length=300)]
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    secret: Annotated[str, StringConstraints(min_length=20, max_length=200)]


class InvitationService:
    """Makes invitations and takes them in, each once."""

    def __init__(self, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._now = now

    async def create(self, address: str, fingerprint: str) -> Invitation:
        """A new invitation to the host at `address` (host:port). Forgets expired ones."""
        secret = secrets.token_urlsafe(32)
        expires = self._now() + LIFETIME
        stale = [e.key for e in await self._store.list(_KEY) if _expired(e.value.get("expires"), self._now())]
        writes: list[Put | Delete] = [
            Put(_KEY + _digest(secret), {"expires": expires.isoformat()}),
            *map(Delete, stale),
        ]
        await self._store.commit(Transaction(writes))
        text = InvitationText(address=address, fingerprint=fingerprint, secret=secret)
        token = base64.urlsafe_b64encode(text.model_dump_json().encode()).decode().rstrip("=")
        return Invitation(token=token, expires=expires)

    async def redeem(self, secret: str) -> None:
        """Use up the invitation with this secret. NotPermitted when it is unknown, used or expired; of two callers at
        once only one succeeds."""
        entry = await self._store.get(_KEY + _digest(secret))
        if entry is None or _expired(entry.value.get("expires"), self._now()):
            raise _unknown()
        try:
            await self._store.commit(Transaction([Delete(entry.key)], [Check(entry.key, entry.revision)]))
        except CheckFailed as error:
            raise _unknown() from error


def read_invitation(token: str) -> InvitationText:
    """What an invitation says. InvalidInput when the text is not one."""
    try:
        raw = base64.b64decode(token.strip() + "=" * (-len(token.strip()) % 4), altchars=b"-_", validate=True)
        return InvitationText.model_validate_json(raw)
    except (ValueError, ValidationError) as error:
        raise InvalidInput(
            "invitation", "is not complete or not an invitation", "copy the whole text that the other host printed"
        ) from error


def _unknown() -> NotPermitted:
    return NotPermitted(
        "invitation", "is not known here, was used already or is older than 15 minutes", "make a new one on this host"
    )


def _expired(expires: object, now: datetime) -> bool:
    return not isinstance(expires, str) or datetime.fromisoformat(expires) <= now


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
