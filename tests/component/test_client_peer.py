"""Host-to-host calls over mutual TLS: what a move can do, and what a failed call tells about it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from client_host import RunningHost, running_host

from hostler.client.peer import PeerClient
from hostler.cluster.peers import PeerLink, never_sent
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.tls import Trust
from hostler.model.errors import (
    GuestRefused,
    HostlerError,
    NotFound,
    PeerRefused,
    PeerUnreachable,
    TimedOut,
)
from hostler.model.host import Accelerator, Peer
from hostler.model.migration import IncomingPhase, IncomingRequest, MigrationSettings
from hostler.model.views import PeerIntroduction
from hostler.model.vm import VmConfig

pytestmark = pytest.mark.component


@pytest.fixture
def host() -> Iterator[RunningHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def us(host: RunningHost, tmp_path: Path) -> tuple[HostIdentity, Trust]:
    """Another host that this one trusts."""
    identity = load_or_create(tmp_path / "us", "us")
    peer = Peer(
        id=identity.host_id,
        name="us",
        address="127.0.0.1:1",
        fingerprint=identity.fingerprint,
        certificate=identity.certificate,
    )
    host.loop.call_soon_threadsafe(host.trust.replace, [peer])
    return identity, Trust(identity)


@pytest.fixture
async def peer(host: RunningHost, us: tuple[HostIdentity, Trust]) -> AsyncIterator[PeerClient]:
    _, trust = us
    client = PeerClient(host.url, trust.client_context(host.identity.fingerprint, host.identity.certificate))
    yield client
    await client.close()


def a_move() -> IncomingRequest:
    config = VmConfig(id="v", name="v", machine="pc-q35-7.2", cpu_model="qemu64")
    return IncomingRequest(
        id="m1", config=config, generation=2, settings=MigrationSettings(), accelerator=Accelerator.TCG, secret=""
    )


async def test_a_peer_can_do_all_a_move_needs(peer: PeerClient, us: tuple[HostIdentity, Trust]) -> None:
    link: PeerLink = peer
    await link.warm()
    assert (await link.facts()).name == "alpha"
    assert await link.check(a_move()) == []
    assert (await link.prepare(a_move())).address == "127.0.0.1:1"
    assert (await link.status("m1")).loaded
    assert (await link.accept("m1")).phase is IncomingPhase.ACCEPTED
    assert (await link.refuse("m1")).phase is IncomingPhase.REFUSED
    assert await link.outgoing("m1") == (await link.outgoing("m1")).but(owner=us[0].host_id)
    introduction = PeerIntroduction(id="x", name="x", address="h:1", certificate="pem", secret="s")
    assert await link.introduce(introduction) == introduction


async def test_a_peer_keeps_its_connection(peer: PeerClient, host: RunningHost) -> None:
    """So that `accept`, in the guest's pause, needs no handshake."""
    handshakes = 0
    original = ssl.SSLObject.do_handshake

    def counted(self: ssl.SSLObject) -> None:
        nonlocal handshakes
        handshakes += not self.server_side
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLObject, "do_handshake", counted)
        await peer.warm()
        before = handshakes
        for _ in range(5):
            await peer.accept("m1")
    assert before >= 1
    assert handshakes == before


async def test_a_refusal_of_the_peer_is_its_own_error(peer: PeerClient) -> None:
    with pytest.raises(GuestRefused, match="will not"):
        await peer.accept("refused")
    with pytest.raises(NotFound):
        await peer.status("unknown")


async def test_a_defect_of_the_peer_is_no_defect_of_ours(peer: PeerClient) -> None:
    with pytest.raises(PeerRefused) as error:
        await peer.accept("broken")
    assert error.value.details["code"] == "internal"
    assert "secret insides" not in str(error.value)


async def test_a_host_that_is_not_trusted_any_more(peer: PeerClient, host: RunningHost) -> None:
    await peer.warm()
    host.loop.call_soon_threadsafe(host.trust.replace, [])
    with pytest.raises(PeerRefused) as error:
        await peer.accept("m1")
    assert error.value.details["code"] == "not-authenticated"


async def test_a_late_answer_is_unknown_and_may_have_been_done(
    host: RunningHost, us: tuple[HostIdentity, Trust]
) -> None:
    host.app.incoming.slow = 0.5
    peer = PeerClient(
        host.url, us[1].client_context(host.identity.fingerprint, host.identity.certificate), deadline=0.2
    )
    try:
        await peer.warm()
        with pytest.raises(TimedOut) as error:
            await peer.accept("m1")
        assert error.value.details == {"sent": True}
        assert not never_sent(error.value)
    finally:
        await peer.close()


async def test_a_peer_that_is_not_there_got_nothing(us: tuple[HostIdentity, Trust]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{free.getsockname()[1]}"
        peer = PeerClient(url, us[1].client_context("00" * 32))
        try:
            with pytest.raises(PeerUnreachable) as error:
                await peer.accept("m1")
        finally:
            await peer.close()
    assert never_sent(error.value)


async def test_a_peer_with_another_certificate_gets_nothing(host: RunningHost, us: tuple[HostIdentity, Trust]) -> None:
    peer = PeerClient(host.url, us[1].client_context("00" * 32, host.identity.certificate))
    try:
        with pytest.raises(HostlerError) as error:
            await peer.accept("m1")
    finally:
        await peer.close()
    assert error.value.details["sent"] is False
    assert host.app.incoming.accepted == []
