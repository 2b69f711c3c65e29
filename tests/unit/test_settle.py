"""What state a VM is in, by what its QEMU says."""

from __future__ import annotations

import pytest

from hostler.host.settle import verdict_gone, verdict_running
from hostler.model.machine import RunStatus
from hostler.model.vm import CriticalReason, VmRecord, VmState
from hostler.testing.vm_variants import config

pytestmark = pytest.mark.unit

EXPECTED: dict[RunStatus, VmState] = dict.fromkeys(RunStatus, VmState.PAUSED) | {
    RunStatus.RUNNING: VmState.RUNNING,
    RunStatus.SHUTDOWN: VmState.STOPPING,
    RunStatus.IO_ERROR: VmState.CRITICAL,
    RunStatus.GUEST_PANICKED: VmState.CRITICAL,
    RunStatus.INTERNAL_ERROR: VmState.CRITICAL,
}


def record(state: VmState, **changes: object) -> VmRecord:
    return VmRecord(config=config()).but(state=state, **changes)


@pytest.mark.parametrize("status", RunStatus)
def test_every_run_state_of_qemu_means_something(status: RunStatus) -> None:
    verdict = verdict_running(status, {})
    assert verdict.state is EXPECTED[status]
    assert (verdict.reason is not None) == (verdict.state is VmState.CRITICAL)
    assert bool(verdict.text) == (verdict.state is VmState.CRITICAL)


@pytest.mark.parametrize(
    ("trouble", "reason", "named"),
    [
        ({"disk1": "failed", "disk0": "failed"}, CriticalReason.IO_ERROR, "disk0, disk1"),
        ({"disk0": "nospace"}, CriticalReason.NO_SPACE, "disk0"),
        ({"disk0": "failed", "disk1": "nospace"}, CriticalReason.NO_SPACE, "disk0, disk1"),
        ({}, CriticalReason.IO_ERROR, "a disk"),
    ],
)
def test_an_io_error_names_the_disks(trouble: dict[str, str], reason: CriticalReason, named: str) -> None:
    verdict = verdict_running(RunStatus.IO_ERROR, trouble)
    assert (verdict.state, verdict.reason) == (VmState.CRITICAL, reason)
    assert named in verdict.text


@pytest.mark.parametrize("state", [s for s in VmState if s not in (VmState.OFF, VmState.SAVED)])
def test_who_is_gone_is_off_and_says_why(state: VmState) -> None:
    assert verdict_gone(record(state), True, "bye") == verdict_gone(record(state), True, "")
    assert verdict_gone(record(state), True, "bye").reason is None
    unexpected = verdict_gone(record(state), False, "assertion failed\n")
    assert (unexpected.state, unexpected.reason) == (VmState.OFF, CriticalReason.QEMU_DIED)
    assert unexpected.text.endswith("assertion failed")
    assert "last words" not in verdict_gone(record(state), False, " \n").text
    assert len(verdict_gone(record(state), False, "x" * 9000).text) < 1200


@pytest.mark.parametrize("expected", [True, False])
def test_who_was_off_or_saved_stays_so(expected: bool) -> None:
    for state in (VmState.OFF, VmState.SAVED):
        assert verdict_gone(record(state), expected, "").state is state
    for state in (VmState.RESTORING, VmState.CRITICAL):
        assert verdict_gone(record(state, saved="/x"), expected, "").state is VmState.SAVED
