"""The demo, as a newcomer runs it: it works, says what it measured, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from hostler.testing.demo import pause_in, summary
from hostler.testing.pausereport import Hole, PauseReport

pytestmark = pytest.mark.e2e


def traces() -> set[str]:
    """What the demo makes outside its own process: directories, and processes that work in them."""
    left = {str(path) for path in Path("/tmp").glob("hl-*")}
    for process in psutil.process_iter(["cmdline"]):
        left |= set(re.findall(r"/tmp/hl-[a-z0-9_]+", " ".join(process.info["cmdline"] or ())))
    return left


def play(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hostler.testing.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_the_demo_plays_to_its_end_and_leaves_nothing() -> None:
    before = traces()
    done = play("--memory", "128M")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one guest that never stopped being itself: yes" in done.stdout
    assert len(re.findall(r"silence, \w+ to \w+ +(?:below )?\d+ ms", done.stdout)) == 2
    assert "every byte" in done.stdout
    assert traces() <= before


@pytest.mark.skipif(os.geteuid() != 0, reason="runs the demo as another user, which needs root")
def test_the_demo_plays_for_an_ordinary_user_too() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, 65534, 65534)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"HOME={home}"]
        done = subprocess.run(
            [*command, sys.executable, "-m", "hostler.testing.demo", "--memory", "128M"],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    if "Permission denied" in done.stderr and "python" in done.stderr:
        pytest.skip("this Python is in a directory that other users must not enter")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one guest that never stopped being itself: yes" in done.stdout


def report(*holes: tuple[float, float]) -> PauseReport:
    gaps = tuple(Hole(ms, start, 0, 0) for ms, start in holes)
    return PauseReport(
        sent=9,
        received=9,
        lost=0,
        duplicates=0,
        reordered=0,
        went_back=0,
        boots=1,
        longest_gap=9.0,
        median_gap=2.0,
        gaps=gaps,
        guest_gap=2.0,
        rtt={},
    )


def test_a_pause_is_looked_for_where_the_move_was() -> None:
    found = report((90.0, 5.0), (40.0, 11.0), (30.0, 12.0))
    assert pause_in(found, (10.0, 13.0)) == 40.0
    assert pause_in(found, (20.0, 21.0)) is None
    text = "\n".join(summary(found, {"a to b": (10.0, 13.0), "b to a": (20.0, 21.0)}))
    assert re.search(r"a to b +40 ms", text)
    assert re.search(r"b to a +below 30 ms", text)
