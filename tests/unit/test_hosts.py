"""How hosts come to know each other, and what they see of each other."""

from __future__ import annotations

import pytest

from hostler.model.errors import AlreadyExists, InvalidInput, NotFound
from hostler.model.host import HostState
from hostler.testing.inprocess import Site

pytestmark = pytest.mark.unit


async def test_two_hosts_join_and_see_each_other(site: Site) -> None:
    a, b = await site.add("a"), await site.add("b")
    invitation = await a.application.hosts.invite("test")
    joined = await b.application.hosts.join(invitation.token, "test")
    assert (joined.name, joined.fingerprint, joined.this) == ("a", a.identity.fingerprint, False)
    this, other = await a.application.hosts.list()
    assert (this.name, this.this, this.fingerprint) == ("a", True, a.identity.fingerprint)
    assert (other.name, other.state, other.fingerprint) == ("b", HostState.UP, b.identity.fingerprint)
    await b.die()
    _, other = await a.application.hosts.list()
    assert (other.state, other.facts, other.fingerprint) == (HostState.UNREACHABLE, None, b.identity.fingerprint)
    assert other.text
    await a.application.hosts.remove("b", "test")
    assert [h.name for h in await a.application.hosts.list()] == ["a"]
    with pytest.raises(NotFound):
        await a.application.hosts.remove("b", "test")


async def test_a_host_does_not_join_itself_or_a_namesake(site: Site) -> None:
    a, b, other = await site.add("a"), await site.add("b"), await site.add("c")
    invitation = await a.application.hosts.invite("test")
    with pytest.raises(InvalidInput, match="this host itself"):
        await a.application.hosts.join(invitation.token, "test")
    await site.join(a, b)
    other.application.host.facts = other.application.host.facts.but(name="b")
    with pytest.raises(AlreadyExists, match="another host"):
        await other.application.hosts.join((await a.application.hosts.invite("test")).token, "test")
    assert [h.name for h in await a.application.hosts.list()] == ["a", "b"]


async def test_a_host_does_not_become_another_one(site: Site) -> None:
    """An invitation lets a host in; it does not give it the place of a known one. Any id can stand in a certificate."""
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    known = a.application.peers.get("b")
    with pytest.raises(AlreadyExists, match="another certificate"):
        await a.application.peers.add(known.but(fingerprint="0" * 64, certificate="another"))
    assert a.application.peers.get("b") == known
    await a.application.peers.add(known.but(address="127.0.0.1:1"))
    assert a.application.peers.get("b").address == "127.0.0.1:1"


async def test_what_was_joined_is_known_after_a_restart(site: Site) -> None:
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    await a.die()
    await a.start()
    assert [(h.name, h.state) for h in await a.application.hosts.list()] == [("a", HostState.UP), ("b", HostState.UP)]
