"""Limits: each is refused one above, with its name, value and profile; and errors survive the wire."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from hostler.model.errors import BY_CODE, ErrorCode, HostlerError, LimitExceeded
from hostler.model.limits import PROFILES, Limits, Profile
from hostler.model.problem import Problem
from hostler.model.units import GiB, TiB

pytestmark = pytest.mark.unit

NAMES = sorted(set(Limits.model_fields) - {"profile"})
CASES = [(profile, name) for profile in Profile for name in NAMES]


@pytest.mark.parametrize(("profile", "name"), CASES)
def test_a_limit_holds_up_to_its_value_and_is_refused_above(profile: Profile, name: str) -> None:
    limits = PROFILES[profile]
    maximum = getattr(limits, name)
    if maximum is None:
        limits.refuse_above("vm web1", name, 2**62, "the number")
        return
    limits.refuse_above("vm web1", name, maximum, "the number")
    with pytest.raises(LimitExceeded) as caught:
        limits.refuse_above("vm web1", name, maximum + 1, "the number")
    error = caught.value
    assert error.object == "vm web1"
    assert {name, str(profile)} <= set(error.cause.split())
    assert error.details == {"limit": name, "value": maximum + 1, "maximum": maximum, "profile": str(profile)}


def test_only_the_narrow_profile_advises_the_wide_one() -> None:
    for profile, said in ((Profile.HYPER_V_2008_R2, True), (Profile.HOSTLER, False)):
        with pytest.raises(LimitExceeded) as caught:
            PROFILES[profile].refuse_above("vm web1", "vm_vcpus", 256, "vCPUs")
        assert ("profile 'hostler'" in caught.value.advice) is said


def test_the_figures_of_hyper_v_2008_r2() -> None:
    figures = PROFILES[Profile.HYPER_V_2008_R2].model_dump(mode="json")
    assert figures == {
        "profile": "hyper-v-2008-r2",
        "host_logical_processors": 64,
        "host_running_vms": 384,
        "host_vcpus": 512,
        "vm_vcpus": 4,
        "vm_memory": 64 * GiB,
        "vm_ide_disks": 4,
        "vm_scsi_controllers": 4,
        "scsi_disks_per_controller": 64,
        "vm_nics": 12,
        "vm_checkpoints": 50,
        "chain_depth": 64,
        "vhd_size": 2040 * GiB,
        "volume_size": 64 * TiB,
    }


def test_the_default_profile_is_never_narrower() -> None:
    narrow, wide = PROFILES[Profile.HYPER_V_2008_R2], PROFILES[Profile.HOSTLER]
    for name in NAMES:
        ours, theirs = getattr(wide, name), getattr(narrow, name)
        assert ours is None or ours >= theirs, name
    assert wide.vm_vcpus >= 255
    assert wide.vm_memory >= TiB


def test_every_code_has_exactly_one_class() -> None:
    assert set(BY_CODE) == set(ErrorCode)
    subclasses = HostlerError.__subclasses__()
    assert {cls.code for cls in subclasses if cls.__module__ == HostlerError.__module__} == set(ErrorCode)
    assert len(BY_CODE) == len(set(BY_CODE.values()))


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_of_each_code_survives_the_wire(code: ErrorCode) -> None:
    details: dict[str, JsonValue] = {
        "holder": "vm db1",
        "blockers": [{"kind": "no-memory"}],
        "object": "tricky",
        "n": None,
    }
    sent = BY_CODE[code]("vm web1", "it is in use", "stop it")
    sent.details.update(details)
    wire = json.dumps(Problem.of(sent).to_json())
    back = Problem.model_validate_json(wire).to_error()
    assert type(back) is BY_CODE[code]
    assert (back.object, back.cause, back.advice, back.details) == ("vm web1", "it is in use", "stop it", details)
    assert str(back) == str(sent) == "vm web1: it is in use"


def test_a_problem_does_not_change_when_its_error_does() -> None:
    error = LimitExceeded("vm web1", "too big", limit="vm_vcpus")
    problem = Problem.of(error)
    error.details["limit"] = "other"
    assert problem.details == {"limit": "vm_vcpus"}


@given(st.text(), st.text(), st.text(), st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=4))
def test_any_text_and_facts_survive(object: str, cause: str, advice: str, facts: dict[str, JsonValue]) -> None:
    problem = Problem(code=ErrorCode.BUSY, object=object, cause=cause, advice=advice, details=facts)
    assert Problem.of(Problem.model_validate(problem.to_json()).to_error()) == problem
