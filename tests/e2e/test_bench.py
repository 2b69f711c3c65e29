"""The benchmarks run: against the real daemon, and with a result that can be read later. Never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def test_hot_add_is_measured_beside_bare_qemu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "hotadd", "--rounds", "1", "--results", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HOSTLER_BENCH_LIBVIRT": "no"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "without virsh" in done.stdout
    (kept,) = tmp_path.glob("hotadd-*.json")
    rows = json.loads(kept.read_text())["rows"]
    assert {row["contender"] for row in rows} == {"qemu", "hostler"}
    assert all(row["median"] > 0 for row in rows)
    assert {row["metric"].split()[0] for row in rows} == {"raw", "qcow2", "vhdx", "vhd"}
