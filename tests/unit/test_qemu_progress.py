"""QEMU's counters and words, as Hostler reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.errors import BadImage, HostLacks, HostlerError, InUse, NoSpace, NotFound, NotPermitted, QemuFailed
from hostler.model.machine import MigrationEnd
from hostler.qemu.failures import image_error, start_error
from hostler.qemu.progress import progress_of, result_of

pytestmark = pytest.mark.unit

ACTIVE = {
    "status": "active",
    "expected-downtime": 50,
    "setup-time": 1,
    "total-time": 302,
    "ram": {
        "total": 84_484_096,
        "remaining": 41_943_040,
        "transferred": 50_952,
        "dirty-sync-count": 3,
        "dirty-pages-rate": 1000,
        "page-size": 4096,
        "mbps": 80.0,
    },
}
"""As query-migrate of QEMU 7.2.22 gives it."""


def test_counters() -> None:
    progress = progress_of(ACTIVE)
    assert (progress.status, progress.rounds, progress.elapsed) == ("active", 3, 302)
    assert (progress.total, progress.transferred, progress.remaining) == (84_484_096, 50_952, 41_943_040)
    assert progress.rate == 10_000_000
    assert progress.dirty_rate == 4_096_000
    assert progress.remaining_time == 41_943_040 * 1000 // (10_000_000 - 4_096_000)
    assert progress.expected_pause == 50
    assert progress.downtime is None


def test_no_estimates_without_a_rate() -> None:
    """In the first 100 ms QEMU reports its defaults."""
    progress = progress_of({**ACTIVE, "ram": {**ACTIVE["ram"], "mbps": 0}})  # type: ignore[dict-item]
    assert progress.remaining_time is None
    assert progress.expected_pause is None


def test_nothing_ever_happened() -> None:
    assert progress_of({}).status == "none"


@given(
    st.integers(0, 2**50), st.floats(0, 1e6), st.integers(0, 2**24), st.sampled_from(["setup", "active", "completed"])
)
def test_an_estimate_is_a_time_or_none(remaining: int, mbps: float, dirty: int, status: str) -> None:
    ram = {"remaining": remaining, "mbps": mbps, "dirty-pages-rate": dirty, "page-size": 4096}
    progress = progress_of({"status": status, "ram": ram})  # type: ignore[dict-item]
    if progress.dirty_rate >= progress.rate or status != "active":
        assert progress.remaining_time is None
    else:
        assert progress.remaining_time is not None
        assert progress.remaining_time >= 0


def test_results() -> None:
    done = result_of({"downtime": 21, "total-time": 28, "ram": {"transferred": 845_064}}, MigrationEnd.COMPLETED)
    assert (done.downtime, done.total_time, done.transferred, done.text) == (21, 28, 845_064, "")
    failed = result_of({"status": "failed", "error-desc": "Connection refused"}, MigrationEnd.FAILED)
    assert (failed.text, failed.downtime, failed.transferred) == ("Connection refused", None, 0)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ('Failed to get "write" lock', InUse),
        ('Failed to get shared "write" lock', InUse),
        ("Permission conflict on node 'x': permissions 'write' are both required", InUse),
        ("Could not open '/a': No such file or directory", NotFound),
        ("Could not open '/a': Permission denied", NotPermitted),
        ("Could not open '/a': Is a directory", BadImage),
        ("Image is not in qcow2 format", BadImage),
        ("invalid VPC image", BadImage),
        ("Could not open '/a': Invalid argument", BadImage),
        ("'host_device' driver requires '/a' to be either a character or block device", BadImage),
        ("qcow2: Image is corrupt; cannot be opened read/write", BadImage),
        ("Could not write: No space left on device", NoSpace),
    ],
)
def test_words_about_images(words: str, kind: type[HostlerError]) -> None:
    error = image_error("disk a", words, "/srv/a.img")
    assert type(error) is kind
    assert "/srv/a.img" in error.cause
    assert error.advice
    assert error.details["qemu"] == words


def test_words_about_something_else() -> None:
    assert image_error("disk a", "Bus 'scsi9.0' not found", "/srv/a.img") is None


def test_why_a_start_failed() -> None:
    locked = (
        '2026-11-24T07:00:00.000000Z qemu-system-x86_64: -device {...}: Failed to get "write" lock\n'
        "Is another process using the image [/srv/a.img]?"
    )
    error = start_error("vm a", locked)
    assert isinstance(error, InUse)
    assert "/srv/a.img" in error.cause
    assert error.details["output"] == locked
    error = start_error(
        "vm a", "qemu-system-x86_64: -blockdev ...: Could not open '/srv/b.img': No such file or directory"
    )
    assert isinstance(error, NotFound)
    assert "/srv/b.img" in error.cause
    error = start_error("vm a", "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory")
    assert isinstance(error, HostLacks)
    error = start_error(
        "vm a", "warning\n2026-11-24T07:00:00Z qemu-system-x86_64: -cpu x: unable to find CPU model 'x'.\n"
    )
    assert isinstance(error, QemuFailed)
    assert error.cause == "QEMU ended at its start: -cpu x: unable to find CPU model 'x'"
    assert "wrote nothing" in start_error("vm a", "").cause
