"""The demo, as a newcomer runs it: it plays to its end, says what it measured, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.e2e

DEMO = (sys.executable, "-m", "hostler.testing.demo", "--memory", "128M")
FIGURES = {
    "start",
    "first_word",
    "move_there",
    "hot_add",
    "disk_move",
    "disk_grow",
    "checkpoint",
    "backup",
    "merge",
    "move_back",
    "hot_remove",
    "pause",
    "answered",
    "shutdown",
}


def traces() -> set[str]:
    """What a demo makes outside its own process: directories, and processes that work in them."""
    left = {str(path) for path in Path("/tmp").glob("hd*") if path.is_dir()}
    for process in psutil.process_iter(["cmdline"]):
        left |= set(re.findall(r"/tmp/hd[a-z0-9_]+", " ".join(process.info["cmdline"] or ())))
    return left


def play(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def test_the_demo_plays_to_its_end_and_leaves_nothing() -> None:
    before = traces()
    done = play(*DEMO, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert set(figures) == FIGURES
    assert all(value > 0 for value in figures.values())
    assert traces() <= before


@pytest.mark.skipif(os.geteuid() != 0, reason="runs the demo as another user, which needs root")
def test_the_demo_plays_for_an_ordinary_user_too() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chown(home, 65534, 65534)
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"HOME={home}")
        if play(*user, sys.executable, "-c", "import hostler").returncode != 0:
            pytest.skip("this Python is in a directory that other users must not enter")
        done = play(*user, *DEMO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout
    assert "client: longest silence" in done.stdout


def test_a_wrong_size_is_told_and_nothing_is_started() -> None:
    done = play(*DEMO[:-1], "many")
    assert done.returncode == 1
    assert "demo: size 'many': is not a size" in done.stderr
