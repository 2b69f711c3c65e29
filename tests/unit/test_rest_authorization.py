"""Every door is guarded: each route of the API stands in the authorization table and refuses whoever may not pass,
before anything of the application is touched and before a byte of the body is read."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI

from hostler.api.rest.app import bare_app
from hostler.api.rest.guard import ADMITTED, check_routes, endpoints, noun_router
from hostler.api.rest.openapi import document, text
from hostler.api.rest.protocol import CALLER
from hostler.api.rest.state import Rest
from hostler.identity.audit import AuditTrail
from hostler.identity.authorize import TABLE, Access, decide
from hostler.identity.certificates import load_or_create
from hostler.identity.gate import Caller, Identity
from hostler.identity.tls import Trust
from hostler.identity.tokens import TokenService
from hostler.model.errors import InternalError, NotPermitted
from hostler.model.host import Peer
from hostler.model.principal import GRANTS, Permission, Principal, Role
from hostler.model.requests import TokenCreate
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.unit

ENDPOINTS = endpoints(bare_app().routes)
DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


class Reached(BaseException):
    """A refused request came through to the application."""


class Untouchable:
    def __getattr__(self, name: str) -> Any:
        raise Reached(name)


class World:
    """The API with nothing behind it, and a caller of each role."""

    def __init__(self, app: FastAPI, identity: Identity, certificate: bytes) -> None:
        self.app = app
        self.identity = identity
        self.certificate = certificate
        self.tokens: dict[Role, str] = {}

    async def call(self, endpoint: str, role: Role | None, caller: Caller | None = None) -> tuple[int, dict[str, Any]]:
        """Status and problem. The body of the request is never given: who must not come in is not read."""
        if role is Role.HOST:
            caller = Caller(certificate=self.certificate)
        scope = _scope(endpoint, caller or Caller(address="192.0.2.7"))
        if role in self.tokens:
            scope["headers"].append((b"authorization", f"Bearer {self.tokens[role]}".encode()))
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            if scope["type"] == "websocket" and not sent:
                return {"type": "websocket.connect"}
            raise Reached("the body was read")

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        assert sent[0]["type"].endswith("http.response.start"), sent[0]
        return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def _scope(endpoint: str, caller: Caller) -> dict[str, Any]:
    method, template = endpoint.split(" ", 1)
    path = re.sub(r"\{\w+\}", "x1", template)
    kind = "websocket" if method == "WEBSOCKET" else "http"
    return {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "http_version": "1.1",
        "scheme": "https",
        "headers": [(b"content-type", b"application/json")],
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}, CALLER: caller},
    }


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await SqliteStore.open(tmp_path / "state" / "hostler.db")
    ours = load_or_create(tmp_path / "ours", "a")
    theirs = load_or_create(tmp_path / "theirs", "b")
    peer = Peer(
        id=theirs.host_id, name="b", address="b:1", fingerprint=theirs.fingerprint, certificate=theirs.certificate
    )
    trust = Trust(ours, [peer])
    identity = Identity(trust, TokenService(store), AuditTrail(tmp_path / "audit.jsonl"))
    app = bare_app()
    app.state.rest = Rest(Untouchable(), identity)  # type: ignore[arg-type]  # nothing may reach it
    found = World(app, identity, ssl.PEM_cert_to_DER_cert(theirs.certificate))
    for role in (Role.ADMIN, Role.OPERATOR, Role.VIEWER):
        found.tokens[role] = (await identity.tokens.create(TokenCreate(name=role, role=role))).secret
    yield found
    identity.audit.close()
    await store.close()


def test_every_route_is_in_the_table_and_the_table_has_no_other() -> None:
    assert sorted(ENDPOINTS) == sorted(TABLE)
    assert len(ENDPOINTS) > 45
    assert sum(e.startswith("WEBSOCKET ") for e in ENDPOINTS) == 2
    assert sum(" /peer/" in e for e in ENDPOINTS) == 8


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if TABLE[e] is not Access.INVITED])
async def test_a_stranger_is_refused_everywhere(world: World, endpoint: str) -> None:
    status, problem = await world.call(endpoint, None)
    assert (status, problem["code"]) == (401, "not-authenticated")
    status, problem = await world.call(endpoint, None, Caller(certificate=b"of no peer"))
    assert (status, problem["code"]) == (401, "not-authenticated")


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if isinstance(TABLE[e], Permission)])
async def test_every_role_without_the_permission_is_refused(world: World, endpoint: str) -> None:
    rule = TABLE[endpoint]
    without = [role for role in Role if rule not in GRANTS[role]]
    assert without
    for role in without:
        status, problem = await world.call(endpoint, role)
        assert (status, problem["code"]) == (403, "not-permitted"), role


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e != "GET /v1/version"])  # needs no application
async def test_whoever_may_gets_past_the_guard(world: World, endpoint: str) -> None:
    """The other half: the refusals above are not simply of everybody."""
    rule = TABLE[endpoint]
    role = next(role for role in Role if not isinstance(rule, Permission) or rule in GRANTS[role])
    with pytest.raises((Reached, BaseExceptionGroup)):
        await world.call(endpoint, role)


async def test_the_version_is_for_everybody_who_is_known(world: World) -> None:
    for role in Role:
        scope = _scope("GET /v1/version", Caller(certificate=world.certificate) if role is Role.HOST else Caller())
        if role in world.tokens:
            scope["headers"].append((b"authorization", f"Bearer {world.tokens[role]}".encode()))
        sent: list[MutableMapping[str, Any]] = []

        async def send(message: MutableMapping[str, Any], sent: list[MutableMapping[str, Any]] = sent) -> None:
            sent.append(message)

        await world.app(scope, _no_body, send)
        assert sent[0]["status"] == 200
        assert any(name == b"date" for name, _ in sent[0]["headers"])


async def _no_body() -> MutableMapping[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_refused_requests_are_in_the_audit_trail_but_strangers_cannot_flood_it(
    world: World, tmp_path: Path
) -> None:
    await world.call("GET /v1/tokens", Role.VIEWER)
    for _ in range(70):
        await world.call("POST /v1/vms", None)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert lines[0]["who"] == "token viewer"
    assert (lines[0]["what"], lines[0]["outcome"], lines[0]["status"]) == ("GET /v1/tokens", "not-permitted", 403)
    strangers = [line for line in lines if line["outcome"] == "not-authenticated"]
    assert len(strangers) == 60
    assert strangers[0]["who"] == "unknown (192.0.2.7)"


def test_a_route_that_is_not_guarded_does_not_start() -> None:
    app = bare_app()

    @app.get("/v1/open")
    async def open_to_all() -> str:
        return "secret"

    with pytest.raises(InternalError, match="not guarded"):
        check_routes(app.routes)


def test_a_web_socket_that_is_not_guarded_does_not_start() -> None:
    router: APIRouter = noun_router("x")

    async def socket() -> None: ...

    router.add_api_websocket_route("/socket", socket)
    with pytest.raises(InternalError, match="not guarded"):
        check_routes(router.routes)
    guarded: APIRouter = noun_router("x")
    guarded.add_api_websocket_route("/socket", socket, dependencies=ADMITTED)
    with pytest.raises(InternalError, match="WEBSOCKET /v1/socket"):
        check_routes(guarded.routes)


def test_a_guarded_route_that_is_not_in_the_table_does_not_start() -> None:
    app = bare_app()
    router = noun_router("x")

    @router.get("/forgotten")
    async def forgotten() -> str:
        return ""

    app.router.routes.extend(router.routes)
    with pytest.raises(InternalError, match="GET /v1/forgotten"):
        check_routes(app.routes)


def test_an_endpoint_without_a_rule_is_refused_even_to_an_administrator() -> None:
    with pytest.raises(NotPermitted):
        decide("GET /v1/nowhere", Principal(name="uid 0", role=Role.ADMIN))


def test_the_committed_description_is_the_codes() -> None:
    assert DOCUMENT.read_text() == text(), "run: python -m hostler.api.rest.openapi > docs/openapi.json"


def test_the_description_is_complete_and_useful() -> None:
    found = document()
    described = {f"{method.upper()} {path}" for path, operations in found["paths"].items() for method in operations}
    assert described == {e for e in TABLE if not e.startswith("WEBSOCKET ")}
    ids = [op["operationId"] for operations in found["paths"].values() for op in operations.values()]
    assert len(set(ids)) == len(ids)
    for operations in found["paths"].values():
        for operation in operations.values():
            assert operation["description"]
            assert operation["responses"]["default"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/Problem"
            }
            good = [code for code in operation["responses"] if code.startswith("2")]
            for code in good:
                content = operation["responses"][code].get("content")
                assert code == "204" or content, operation["operationId"]
                for media in (content or {}).values():
                    assert media["schema"], operation["operationId"]


async def test_many_at_once_get_each_their_own_answer(world: World) -> None:
    answers = await asyncio.gather(
        *(world.call("GET /v1/tokens", role) for role in (None, Role.VIEWER, Role.OPERATOR, None))
    )
    assert [status for status, _ in answers] == [401, 403, 403, 401]
