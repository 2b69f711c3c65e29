"""API tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from hostler.api.rest.guard import noun_router
from hostler.api.rest.state import Shared
from hostler.model.requests import TokenCreate
from hostler.model.views import TokenSecret, TokenView

router = noun_router("token")

TokenRef = Annotated[str, Path(max_length=300, description="Id or name of a token")]


@router.get("/tokens")
async def list_tokens(rest: Shared) -> list[TokenView]:
    """All tokens, without their secrets."""
    return list(await rest.identity.tokens.list())


@router.post("/tokens", status_code=201)
async def create_token(request: TokenCreate, rest: Shared) -> TokenSecret:
    """A new token. Its secret is in this answer only."""
    return await rest.identity.tokens.create(request)


@router.delete("/tokens/{token}", status_code=204)
async def revoke_token(token: TokenRef, rest: Shared) -> None:
    """Make a token useless, from the next request on."""
    await rest.identity.tokens.revoke(token)
