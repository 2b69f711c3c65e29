"""The API over HTTPS with real handshakes: who gets in by token, who by certificate, and who not at all."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from rest_world import PATIENCE, World, peer_of, running

from hostler.api.rest import protocol
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.tls import Trust
from hostler.model.principal import Role
from hostler.model.requests import TokenCreate

pytestmark = pytest.mark.component

REFUSED = (OSError, asyncio.IncompleteReadError)
"""How a client sees that the other side ended the handshake: in TLS 1.3 it learns of it with its first read, as an
alert (an OSError) or as the end of the connection."""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


@pytest.fixture
def other(tmp_path: Path) -> HostIdentity:
    return load_or_create(tmp_path / "other", "other")


def as_peer(world: World, identity: HostIdentity) -> ssl.SSLContext:
    return Trust(identity).client_context(world.host.fingerprint, world.host.certificate)


async def test_a_token_opens_what_its_role_opens(world: World) -> None:
    made = await world.tokens.create(TokenCreate(name="t", role=Role.VIEWER))
    bearer = f"Bearer {made.secret}"
    assert (await world.ask("GET", "/v1/vms", context=world.pinned(), authorization=bearer))[0] == 200
    status, answer = await world.ask("POST", "/v1/vms/web1/start", context=world.pinned(), authorization=bearer)
    assert (status, answer["code"], answer["details"]["role"]) == (403, "not-permitted", "viewer")
    assert world.app.calls == []
    assert world.audit()[0]["who"] == "token t"


@pytest.mark.parametrize(
    "wrong", ["", "Bearer", "Bearer x", "Basic cm9vdDpyb290", "Bearer hstl_000000000000_x", "\xff"]
)
async def test_a_wrong_token_opens_nothing(world: World, wrong: str) -> None:
    status, answer = await world.ask("GET", "/v1/vms", context=world.pinned(), authorization=wrong)
    assert (status, answer["code"]) == (401, "not-authenticated")


async def test_a_stranger_cannot_hold_a_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STRANGER_TIME", 0.1)
    connection = await world.connect(world.pinned())
    assert (await connection.ask("GET", "/v1/vms"))[0] == 401
    async with asyncio.timeout(PATIENCE):
        assert await connection.reader.read() == b""
    await connection.close()


async def test_a_flood_over_the_network_does_not_lock_out_the_machine_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    held = [await world.connect(world.pinned()) for _ in range(2)]
    for connection in held:
        assert (await connection.ask("GET", "/v1/vms"))[0] == 401
    refused = await world.connect(world.pinned())
    status, answer = await refused.answer()
    assert (status, answer["code"]) == (503, "busy")
    assert (await world.ask("GET", "/v1/vms"))[0] == 200
    for connection in [*held, refused]:
        await connection.close()


async def test_no_token_opens_nothing(world: World) -> None:
    status, answer = await world.ask("GET", "/v1/version", context=world.pinned())
    assert (status, answer["code"]) == (401, "not-authenticated")


async def test_a_revoked_token_is_out_on_the_connection_it_has(world: World) -> None:
    made = await world.tokens.create(TokenCreate(name="t", role=Role.ADMIN))
    connection = await world.connect(world.pinned())
    bearer = f"Bearer {made.secret}"
    assert (await connection.ask("GET", "/v1/vms", authorization=bearer))[0] == 200
    await world.tokens.revoke("t")
    assert (await connection.ask("GET", "/v1/vms", authorization=bearer))[0] == 401
    await connection.close()


async def test_a_wrong_token_on_the_unix_socket_is_not_made_good_by_who_gives_it(world: World) -> None:
    assert (await world.ask("GET", "/v1/vms", authorization="Bearer x"))[0] == 401


async def test_a_peer_is_known_by_its_certificate_and_is_a_host_only(world: World, other: HostIdentity) -> None:
    world.identity.trust.replace([peer_of(other, "other")])
    context = as_peer(world, other)
    status, answer = await world.ask("POST", "/peer/v1/incoming/m1/accept", context=context)
    assert (status, answer["phase"]) == (200, "accepted")
    assert world.app.calls == [("accept", "m1", other.host_id)]
    assert world.audit()[0]["who"] == "host other"
    assert (await world.ask("GET", "/v1/version", context=context))[0] == 200
    assert (await world.ask("GET", "/v1/vms", context=context))[0] == 403
    assert (await world.ask("POST", "/v1/tokens", {"name": "x"}, context=context))[0] == 403


async def test_an_unknown_certificate_does_not_get_past_the_handshake(world: World, other: HostIdentity) -> None:
    with pytest.raises(REFUSED):
        await world.ask("GET", "/v1/version", context=as_peer(world, other))
    made = await world.tokens.create(TokenCreate(name="t", role=Role.ADMIN))
    with pytest.raises(REFUSED):  # not with a good token either
        await world.ask("GET", "/v1/vms", context=as_peer(world, other), authorization=f"Bearer {made.secret}")
    assert (await world.ask("GET", "/v1/vms", context=world.pinned(), authorization=f"Bearer {made.secret}"))[0] == 200


async def test_peers_come_and_go_while_the_server_runs(world: World, other: HostIdentity) -> None:
    trust = world.identity.trust
    context = as_peer(world, other)
    with pytest.raises(REFUSED):
        await world.ask("GET", "/v1/version", context=context)
    trust.replace([peer_of(other, "other")])
    connection = await world.connect(context)
    assert (await connection.ask("GET", "/v1/version"))[0] == 200
    trust.replace([])
    assert (await connection.ask("GET", "/v1/version"))[0] == 401  # on the connection it still has
    await connection.close()
    with pytest.raises(REFUSED):
        await world.ask("GET", "/v1/version", context=context)


async def test_a_certificate_made_by_a_peer_is_not_that_peer(world: World, other: HostIdentity, tmp_path: Path) -> None:
    """A peer could sign others with its key; its certificate must not count as an authority."""
    world.identity.trust.replace([peer_of(other, "other")])
    context = as_peer(world, other)
    context.load_cert_chain(_signed_by(other, tmp_path), tmp_path / "child.key")
    with pytest.raises(REFUSED):
        await world.ask("GET", "/v1/version", context=context)


async def test_a_client_refuses_any_other_host_than_the_one_it_knows(world: World, other: HostIdentity) -> None:
    ours = Trust(load_or_create(world.directory / "third", "third"))
    for context in (ours.client_context(other.fingerprint, other.certificate), ours.client_context(other.fingerprint)):
        with pytest.raises(ssl.SSLCertVerificationError):
            await world.connect(context)
    # The certificate alone is not enough either: the pin decides.
    with pytest.raises(ssl.SSLCertVerificationError, match="not the host it should be"):
        await world.connect(ours.client_context(other.fingerprint, world.host.certificate))


async def test_the_pin_holds_for_blocking_clients_too(world: World, other: HostIdentity) -> None:
    ours = Trust(load_or_create(world.directory / "third", "third"))

    def connect(fingerprint: str) -> bytes | None:
        raw = socket.create_connection(("127.0.0.1", world.port), timeout=PATIENCE)
        with raw, ours.client_context(fingerprint).wrap_socket(raw) as secured:
            return secured.getpeercert(binary_form=True)

    assert await asyncio.to_thread(connect, world.host.fingerprint)
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(connect, other.fingerprint)


async def test_the_first_contact_needs_the_fingerprint_alone_and_shows_no_certificate(
    world: World, other: HostIdentity
) -> None:
    context = Trust(other).client_context(world.host.fingerprint)
    introduction = {"id": "i", "name": "n", "address": "a:1", "certificate": "c", "secret": "s"}
    status, answer = await world.ask("POST", "/peer/v1/join", introduction, context=context)
    assert (status, answer["code"]) == (500, "internal")  # it came through: the stand-in has no such function
    assert world.audit()[0]["what"] == "POST /peer/v1/join"
    assert (await world.ask("GET", "/peer/v1/facts", context=context))[0] == 401


async def test_older_tls_is_not_spoken(world: World) -> None:
    context = world.pinned()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(REFUSED):
        await world.connect(context)
    connection = await world.connect(world.pinned())
    assert connection.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    await connection.close()


async def test_small_answers_are_not_held_back(world: World) -> None:
    connection = await world.connect(world.pinned())
    await connection.ask("GET", "/v1/vms")
    (served,) = world.server._served[1][1].connections
    accepted = served.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    await connection.close()


async def test_plain_http_on_the_https_port_disturbs_nobody(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionError):
            assert b"200" not in await reader.read()
    writer.close()
    assert (await world.ask("GET", "/v1/version"))[0] == 200


def _signed_by(authority: HostIdentity, directory: Path) -> Path:
    signer = serialization.load_pem_private_key(authority.key_path.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "child")]))
        .issuer_name(x509.load_pem_x509_certificate(authority.certificate.encode()).subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    none = serialization.NoEncryption()
    (directory / "child.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    chain = directory / "child.crt"
    chain.write_bytes(certificate.public_bytes(pem) + authority.certificate.encode())
    return chain
