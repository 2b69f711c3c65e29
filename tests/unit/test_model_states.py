"""State tables: closed, without dead ends, everything reachable; and they say what the modules' drawings say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest

from hostler.model.checkpoint import CHECKPOINT_TRANSITIONS, CheckpointState
from hostler.model.host import HOST_TRANSITIONS, HostState
from hostler.model.job import ENDED, JOB_TRANSITIONS, Job, JobState
from hostler.model.vm import HAS_PROCESS, TRANSITIONS, VmState
from hostler.model.volume import VOLUME_TRANSITIONS, VolumeState

pytestmark = pytest.mark.unit

Table = Mapping[Any, frozenset[Any]]

TABLES: list[tuple[Table, type[StrEnum], StrEnum]] = [
    (TRANSITIONS, VmState, VmState.OFF),
    (JOB_TRANSITIONS, JobState, JobState.QUEUED),
    (VOLUME_TRANSITIONS, VolumeState, VolumeState.CREATING),
    (CHECKPOINT_TRANSITIONS, CheckpointState, CheckpointState.CREATING),
    (HOST_TRANSITIONS, HostState, HostState.UP),
]


def reachable(table: Table, start: StrEnum) -> set[StrEnum]:
    """Every state a path of legal steps leads to, with the start."""
    seen: set[StrEnum] = set()
    todo = [start]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo.extend(table[state])
    return seen


@pytest.mark.parametrize(("table", "states", "start"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_table_is_closed_over_its_states(table: Table, states: type[StrEnum], start: StrEnum) -> None:
    assert set(table) == set(states)
    assert set().union(*table.values()) <= set(states)
    assert all(state not in following for state, following in table.items())


@pytest.mark.parametrize(("table", "states", "start"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_state_is_reachable(table: Table, states: type[StrEnum], start: StrEnum) -> None:
    assert reachable(table, start) == set(states)


@pytest.mark.parametrize("state", VmState)
def test_a_vm_can_always_be_brought_back_to_off_and_to_running(state: VmState) -> None:
    assert {VmState.OFF, VmState.RUNNING} <= reachable(TRANSITIONS, state)


@pytest.mark.parametrize("state", VmState)
def test_every_vm_state_can_become_critical(state: VmState) -> None:
    assert state is VmState.CRITICAL or VmState.CRITICAL in TRANSITIONS[state]


V = VmState
WAYS = [
    (V.OFF, V.STARTING, V.RUNNING, V.PAUSING, V.PAUSED, V.RESUMING, V.RUNNING),
    (V.RUNNING, V.SAVING, V.SAVED, V.RESTORING, V.RUNNING),
    (V.PAUSED, V.SAVING, V.SAVED, V.RESTORING, V.PAUSED),
    (V.RUNNING, V.STOPPING, V.OFF),
    (V.PAUSED, V.STOPPING, V.OFF),
    (V.RUNNING, V.MIGRATING, V.RUNNING),
    (V.PAUSED, V.MIGRATING, V.PAUSED),
    (V.CRITICAL, V.STOPPING, V.OFF),
    (V.CRITICAL, V.RUNNING),
    (V.SAVED, V.OFF),
    (V.OFF, V.SAVED, V.RESTORING, V.RUNNING),
    (V.STARTING, V.OFF),
    (V.PAUSING, V.RUNNING),
    (V.RESUMING, V.PAUSED),
    (V.SAVING, V.RUNNING),
    (V.SAVING, V.PAUSED),
    (V.RESTORING, V.SAVED),
]
"""The drawing at the head of hostler.model.vm, and its failures."""


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_the_ways_of_the_drawing_are_legal(way: tuple[VmState, ...]) -> None:
    assert all(after in TRANSITIONS[before] for before, after in itertools.pairwise(way))


@pytest.mark.parametrize(
    ("before", "after"),
    [(V.OFF, V.RUNNING), (V.SAVED, V.RUNNING), (V.SAVED, V.STARTING), (V.OFF, V.PAUSED)],
)
def test_no_step_skips_the_work_between(before: VmState, after: VmState) -> None:
    assert after not in TRANSITIONS[before]


def test_only_off_saved_and_critical_may_be_without_a_process() -> None:
    assert set(VmState) - HAS_PROCESS == {VmState.OFF, VmState.SAVED, VmState.CRITICAL}


def test_a_job_that_ended_stays_as_it_is_and_only_then() -> None:
    assert {state for state, following in JOB_TRANSITIONS.items() if not following} == ENDED


@pytest.mark.parametrize("state", JobState)
def test_every_job_can_end_and_says_whether_it_has(state: JobState) -> None:
    assert reachable(JOB_TRANSITIONS, state) & ENDED
    job = Job.model_validate(
        {"id": "1", "kind": "vm.start", "target": "x", "state": state, "created": "2026-01-01T00:00:00Z"}
    )
    assert job.is_over is (state in ENDED)


def test_a_started_job_never_fails_without_unwinding() -> None:
    assert JobState.FAILED not in JOB_TRANSITIONS[JobState.RUNNING]
    assert JobState.CANCELLED not in JOB_TRANSITIONS[JobState.RUNNING]
