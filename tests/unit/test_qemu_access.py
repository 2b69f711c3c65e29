"""Access control lists as data: nobody but the granted user gains or loses anything."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.errors import HostLacks, InvalidInput, LimitExceeded
from hostler.qemu import access, listener
from hostler.qemu.access import Acl, Entry, Tag

pytestmark = pytest.mark.unit

OWNER, GROUP, UID, OTHER_UID = 1000, 1000, 1_900_000_007, 1_900_000_008
NO_ID = 0xFFFFFFFF
BITS = st.integers(0, 7)


@st.composite
def lists(draw: st.DrawFn) -> Acl:
    """Any legal list: a plain mode, or named entries with a mask."""
    plain = access.from_mode(draw(st.integers(0, 0o777)))
    users = draw(st.dictionaries(st.sampled_from([UID, OTHER_UID, 33]), BITS, max_size=3))
    groups = draw(st.dictionaries(st.sampled_from([33, 44]), BITS, max_size=2))
    named = [Entry(Tag.USER, id, bits) for id, bits in users.items()]
    named += [Entry(Tag.GROUP, id, bits) for id, bits in groups.items()]
    if not named:
        return plain
    return tuple(sorted([*plain, *named, Entry(Tag.MASK, NO_ID, draw(BITS))]))


def status(uid: int = OWNER, gid: int = GROUP) -> os.stat_result:
    return os.stat_result((0o100600, 1, 1, 1, uid, gid, 0, 0, 0, 0))


EVERYBODY = [OWNER, 33, 44, OTHER_UID, 99]


@given(lists(), st.sampled_from([4, 6]))
def test_granting_gives_one_user_exactly_that_and_nobody_else_anything(acl: Acl, bits: int) -> None:
    after = access.with_user(acl, UID, bits)
    assert access.permissions_of(after, status(), UID) == bits
    for uid in EVERYBODY:
        assert access.permissions_of(after, status(), uid) == access.permissions_of(acl, status(), uid)


@given(lists(), st.sampled_from([4, 6]))
def test_revoking_takes_one_user_out_and_changes_nobody_else(acl: Acl, bits: int) -> None:
    granted = access.with_user(acl, UID, bits)
    after = access.without_user(granted, UID)
    assert not [e for e in after if e.tag is Tag.USER and e.id == UID]
    for uid in EVERYBODY:
        assert access.permissions_of(after, status(), uid) == access.permissions_of(acl, status(), uid)


@given(st.integers(0, 0o777), st.sampled_from([4, 6]))
def test_grant_and_revoke_on_a_plain_mode_come_back_to_it(mode: int, bits: int) -> None:
    plain = access.from_mode(mode)
    assert access.without_user(access.with_user(plain, UID, bits), UID) == plain


@given(lists(), st.sampled_from([4, 6]))
def test_granting_twice_is_granting_once(acl: Acl, bits: int) -> None:
    once = access.with_user(acl, UID, bits)
    assert access.with_user(once, UID, bits) == once


@given(lists())
def test_lists_survive_the_attribute(acl: Acl) -> None:
    assert access.decode(access.encode(acl)) == acl


@pytest.mark.parametrize("data", [b"", b"\1\0\0\0", b"\2\0\0\0\1\0"])
def test_a_torn_attribute_is_not_guessed_at(data: bytes) -> None:
    with pytest.raises(ValueError, match="access control list"):
        access.decode(data)


@given(st.uuids().map(str), st.sets(st.integers(100, 131), max_size=31))
def test_a_vms_user_is_free_and_always_the_same(vm: str, taken: set[int]) -> None:
    uid = access.user_for(vm, taken, base=100, span=32)
    assert 100 <= uid < 132
    assert uid not in taken
    assert uid == access.user_for(vm, set(taken), base=100, span=32)


def test_no_user_left_is_a_limit() -> None:
    with pytest.raises(LimitExceeded):
        access.user_for("vm", set(range(100, 132)), base=100, span=32)


def test_default_users_fit_the_kernel_and_belong_to_nobody() -> None:
    assert access.UID_BASE > 1_879_048_191
    assert access.UID_BASE + access.UID_SPAN < 2**31


def test_a_socket_path_the_kernel_cannot_take_is_refused() -> None:
    listener.check_socket_path("/" + "a" * 106)
    with pytest.raises(InvalidInput, match="has 108 bytes"):
        listener.check_socket_path("/" + "ä" * 53 + "b")


def test_reasons_of_the_system_become_ours() -> None:
    error = OSError(28, os.strerror(28))
    assert access.explain("/x", error).code == "no-space"
    assert isinstance(access.explain("/x", OSError(95, "not supported")), HostLacks)
