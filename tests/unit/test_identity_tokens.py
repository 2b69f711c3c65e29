"""API tokens, invitations and local users: who gets in, who does not, and what is kept of their secrets."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hostler.identity import local
from hostler.identity.audit import AuditEntry, AuditTrail
from hostler.identity.invitations import LIFETIME, InvitationService, read_invitation
from hostler.identity.local import Credentials, credentials_of, local_principal
from hostler.identity.tokens import TokenService
from hostler.model.errors import AlreadyExists, InvalidInput, NotAuthenticated, NotFound, NotPermitted
from hostler.model.principal import Role
from hostler.model.requests import TokenCreate
from hostler.store.sqlite import SqliteStore

pytestmark = pytest.mark.unit


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "state" / "hostler.db")
    yield opened
    await opened.close()


async def test_a_token_is_its_role_until_it_is_revoked(store: SqliteStore) -> None:
    tokens = TokenService(store)
    made = await tokens.create(TokenCreate(name="backup", role=Role.OPERATOR))
    assert made.secret.startswith(f"hstl_{made.id}_")
    assert len(made.secret.split("_", 2)[2]) >= 43  # 256 bits in base64
    principal = await tokens.authenticate(made.secret)
    assert (principal.name, principal.role) == ("token backup", Role.OPERATOR)
    assert [view.name for view in await tokens.list()] == ["backup"]
    await tokens.revoke("backup")
    with pytest.raises(NotAuthenticated):
        await tokens.authenticate(made.secret)
    assert await tokens.list() == []


async def test_only_a_hash_of_a_token_is_kept_and_nothing_lists_it(store: SqliteStore) -> None:
    tokens = TokenService(store)
    made = await tokens.create(TokenCreate(name="backup"))
    kept = json.dumps([entry.value for entry in await store.list("")])
    random = made.secret.split("_", 2)[2]
    assert random not in kept
    assert "digest" not in json.dumps([view.to_json() for view in await tokens.list()])


async def test_a_wrong_secret_says_nothing_about_what_is_wrong(store: SqliteStore) -> None:
    tokens = TokenService(store)
    made = await tokens.create(TokenCreate(name="backup"))
    other = await tokens.create(TokenCreate(name="other"))
    prefix, token_id, random = made.secret.split("_", 2)
    texts = set()
    for wrong in [
        "",
        "hstl",
        "hstl__",
        made.secret[:-1],
        made.secret + "x",
        f"{prefix}_{other.id}_{random}",
        f"{prefix}_{'0' * 12}_{random}",
        f"{prefix}_../token-name/backup_{random}",
        f"x_{token_id}_{random}",
        "hstl_\udcff_ä",
    ]:
        with pytest.raises(NotAuthenticated) as caught:
            await tokens.authenticate(wrong)
        texts.add(str(caught.value))
    assert len(texts) == 1


async def test_two_tokens_of_one_name_cannot_be_even_at_once(store: SqliteStore) -> None:
    tokens = TokenService(store)
    outcomes = await asyncio.gather(
        *(tokens.create(TokenCreate(name="backup")) for _ in range(5)), return_exceptions=True
    )
    assert sum(not isinstance(o, BaseException) for o in outcomes) == 1
    assert sum(isinstance(o, AlreadyExists) for o in outcomes) == 4
    await tokens.revoke("backup")
    await tokens.create(TokenCreate(name="backup"))


async def test_a_token_cannot_make_a_host(store: SqliteStore) -> None:
    with pytest.raises(InvalidInput, match="host"):
        await TokenService(store).create(TokenCreate(name="evil", role=Role.HOST))


async def test_a_mistyped_token_name_gets_the_near_one(store: SqliteStore) -> None:
    tokens = TokenService(store)
    await tokens.create(TokenCreate(name="backup"))
    with pytest.raises(NotFound) as caught:
        await tokens.revoke("bakcup")
    assert "backup" in caught.value.advice


async def test_an_invitation_is_good_once(store: SqliteStore) -> None:
    invitations = InvitationService(store)
    made = await invitations.create("10.0.0.1:8690", "ab" * 32)
    text = read_invitation(f"  {made.token}\n")
    assert (text.address, text.fingerprint) == ("10.0.0.1:8690", "ab" * 32)
    kept = json.dumps([[entry.key, entry.value] for entry in await store.list("")])
    assert text.secret not in kept
    outcomes = await asyncio.gather(*(invitations.redeem(text.secret) for _ in range(5)), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, NotPermitted) for outcome in outcomes) == 4


async def test_an_invitation_is_good_for_a_quarter_of_an_hour(store: SqliteStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    invitations = InvitationService(store, lambda: now)
    first = read_invitation((await invitations.create("h:1", "ab" * 32)).token)
    second = read_invitation((await invitations.create("h:1", "ab" * 32)).token)
    now += LIFETIME - timedelta(seconds=1)
    await invitations.redeem(first.secret)
    now += timedelta(seconds=1)
    with pytest.raises(NotPermitted):
        await invitations.redeem(second.secret)
    await invitations.create("h:1", "ab" * 32)
    assert len(await store.list("invitation/")) == 1  # the expired one was forgotten


@pytest.mark.parametrize("text", ["", "x", "!!!", "e30", base64.urlsafe_b64encode(b'{"address":1}').decode(), "ä" * 9])
def test_a_text_that_is_no_invitation_is_told_as_such(text: str) -> None:
    with pytest.raises(InvalidInput, match="invitation"):
        read_invitation(text)


def test_the_kernel_tells_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        found = credentials_of(ours)
    assert (found.pid, found.uid) == (os.getpid(), os.getuid())
    assert found.groups == {os.getgid(), *os.getgroups()}


@pytest.mark.parametrize(
    ("uid", "groups", "admitted"),
    [(0, {0}, True), (os.geteuid(), set(), True), (54321, {54321, 777}, True), (54321, {54321}, False)],
)
def test_root_the_own_user_and_the_group_administer_nobody_else(
    monkeypatch: pytest.MonkeyPatch, uid: int, groups: set[int], admitted: bool
) -> None:
    monkeypatch.setattr(local, "admin_group", lambda: 777)
    who = Credentials(1, uid, frozenset(groups))
    if admitted:
        assert local_principal(who).role is Role.ADMIN
    else:
        with pytest.raises(NotPermitted) as caught:
            local_principal(who)
        assert "hostler" in caught.value.advice


def test_without_the_group_nobody_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ADMIN_GROUP", "no-such-group-on-any-machine")
    assert local.admin_group() is None
    with pytest.raises(NotPermitted):
        local_principal(Credentials(1, 54321, frozenset({54321})))


def _entry(number: int) -> AuditEntry:
    return AuditEntry(
        who="uid 0", what="POST /v1/vms", object="/v1/vms", outcome="done", status=201, facts={"n": str(number)}
    )


def test_the_audit_trail_is_private_appended_to_and_rotated(tmp_path: Path) -> None:
    path = tmp_path / "log" / "audit.jsonl"
    first = AuditTrail(path, max_bytes=1000, keep=2)
    for number in range(5):
        first.record(_entry(number))
    first.close()
    second = AuditTrail(path, max_bytes=1000, keep=2)  # a later daemon
    for number in range(5, 40):
        second.record(_entry(number))
    second.close()
    files = sorted(path.parent.iterdir())
    assert [f.name for f in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(f.stat().st_mode & 0o777 == 0o600 and f.stat().st_size <= 1000 for f in files)
    lines = [json.loads(line) for f in reversed(files) for line in f.read_text().splitlines()]
    numbers = [int(line["facts"]["n"]) for line in lines]
    assert numbers == list(range(numbers[0], 40))
    assert {"time", "who", "what", "object", "outcome", "status"} <= set(lines[0])


def test_a_name_cannot_forge_a_line_of_the_audit_trail(tmp_path: Path) -> None:
    trail = AuditTrail(tmp_path / "audit.jsonl")
    trail.record(AuditEntry(who='x"}\n{"who":"uid 0', what="w", object="\ud800\r\n", outcome="done", status=1))
    trail.close()
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["who"] == 'x"}\n{"who":"uid 0'
