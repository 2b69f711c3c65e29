"""Working on volumes as a person does: on the command line, with a VM that boots from what came of it, and with the
daemon killed in the middle."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from userview import User

from hostler.model.errors import ErrorCode
from hostler.model.units import MiB
from hostler.testing.lab import Lab

pytestmark = pytest.mark.e2e

SIZE = 64 * MiB


@pytest.fixture(scope="module")
def user(short_dir: Path) -> Iterator[User]:
    with Lab(short_dir, isolated=False) as lab:
        yield User(lab.add_host("v"))


@pytest.fixture
def source(short_dir: Path) -> Iterator[Path]:
    path = short_dir / "source.img"
    with path.open("wb") as file:
        file.write(os.urandom(24 * MiB))
        file.truncate(SIZE)
    yield path
    path.unlink()


def sha256(path: Path, size: int) -> str:
    return hashlib.sha256(path.read_bytes().ljust(size, b"\0")).hexdigest()


def test_the_life_of_a_volume(user: User, source: Path) -> None:
    user("volume", "import", "web", str(source), "--source-format", "raw", "--format", "vhd")
    assert user("volume", "checksum", "web")["result"]["sha256"] == sha256(source, SIZE)
    assert user("volume", "validate", "web")["result"]["verdict"] == "sound"
    assert user("volume", "inspect", "web")["subformat"] == "dynamic"
    user("volume", "grow", "web", "128M")
    for format in ("raw", "qcow2", "vhd-fixed", "vhdx", "vhd"):
        user("volume", "convert", "web", "--format", format, "--replace")
        assert user("volume", "checksum", "web")["result"]["sha256"] == sha256(source, 128 * MiB), format
    user("volume", "shrink", "web", "64M")
    user("volume", "compact", "web")
    user("volume", "clone", "web", "copy")
    user("volume", "convert", "copy", "--format", "vhdx", "--name", "other")
    for name in ("web", "copy", "other"):
        assert user("volume", "checksum", name)["result"]["sha256"] == sha256(source, SIZE)
        user("volume", "delete", name, "--yes")
    left = user.host.state_dir / "volumes"
    assert list(left.iterdir()) == []


def test_a_vm_that_is_off_finds_its_converted_and_grown_disk(user: User, source: Path) -> None:
    user("volume", "import", "disk", str(source), "--source-format", "raw", "--format", "qcow2")
    user("vm", "create", "box", "--memory", "64M", "--disk", "disk")
    shown = user("volume", "show", "disk")
    assert [(u["kind"], u["name"]) for u in shown["users"]] == [("vm", "box")]
    problem = user.refused(ErrorCode.IN_USE, 4, "volume", "delete", "disk", "--yes")
    assert "it is disk disk0 of vm box (off)" in problem["cause"]
    user("volume", "convert", "disk", "--format", "vhdx", "--replace")
    user("volume", "grow", "disk", "80M")
    (disk,) = user("vm", "show", "box")["config"]["disks"]
    assert (disk["source"]["format"], disk["source"]["size"]) == ("vhdx", 80 * MiB)
    assert disk["source"]["path"].endswith(".vhdx")
    user("vm", "start", "box")
    for words in (("grow", "disk", "96M"), ("compact", "disk"), ("convert", "disk", "--format", "raw", "--replace")):
        problem = user.refused(ErrorCode.IN_USE, 4, "volume", *words)
        assert "VM box" in problem["cause"]
    user("vm", "turn-off", "box")
    user("volume", "compact", "disk")
    user("vm", "delete", "box", "--yes")
    user("volume", "delete", "disk", "--yes")


JOBS = {
    "convert in place": ("convert", "v", "--format", "qcow2", "--replace"),
    "convert": ("convert", "v", "--format", "vhdx", "--name", "w"),
    "compact": ("compact", "v"),
    "clone": ("clone", "v", "w"),
    "checksum": ("checksum", "v"),
    "grow": ("grow", "v", "256M"),
}


@pytest.mark.parametrize("case", JOBS)
@pytest.mark.parametrize("after", [0.05])
def test_the_daemon_is_killed_in_the_middle(user: User, source: Path, case: str, after: float) -> None:
    """Done or undone: nothing half made, the content as it was, and the volume can be worked on."""
    user("volume", "import", "v", str(source), "--source-format", "raw", "--format", "vhd")
    user.run("volume", *JOBS[case], "--no-wait")
    time.sleep(after)  # anywhere in its work
    user.host.kill()
    user.host.start()
    jobs = [job for job in user("job", "list") if job["kind"].startswith("volume.") and job["target"] == "v"]
    assert jobs
    for job in jobs:
        user.run("job", "watch", job["id"])
    names = [v["name"] for v in user("volume", "list")]
    assert names in (["v"], ["v", "w"])
    size = user("volume", "show", "v")["size"]
    assert size in (SIZE, 256 * MiB)
    assert user("volume", "checksum", "v")["result"]["sha256"] == sha256(source, size)
    assert user("volume", "validate", "v")["result"]["verdict"] == "sound"
    assert len(list((user.host.state_dir / "volumes").iterdir())) == len(names)
    for name in names:
        user("volume", "delete", name, "--yes")
