"""The repository's own promises: packages, lock, entrance and documents say the same as the code."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import structure_rules as rules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
)

PROGRAMS = {
    "7z": "p7zip-full",
    "busybox": "busybox-static",
    "gcc": "gcc",
    "getfacl": "acl",
    "ip": "iproute2",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "nbdinfo": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setfacl": "acl",
    "mkfs.btrfs": "btrfs-progs",
    "vhdiinfo": "libvhdi-utils",
    "shellcheck": "shellcheck",
    "swtpm": "swtpm",
    "tgtadm": "tgt",
    "tgtd": "tgt",
    "vhdimount": "libvhdi-utils",
    "virsh": "libvirt-clients",
    "libvirtd": "libvirt-daemon-system",
}
"""Every system program that the code may start, and the Debian package it is in."""

OF_THE_BASE_SYSTEM = {
    "mount",
    "umount",
    "true",
    "false",
    "sleep",
    "cat",
    "sh",
    "setpriv",
    "prlimit",
    "stdbuf",
    "cp",
    "dd",
    "kill",
    "sha256sum",
    "sync",
    "tee",
    "unshare",
    "nsenter",
}
"""In packages that no Debian can be without (coreutils, dash, util-linux, mount)."""

OF_THE_ENVIRONMENT = {"hostler", "hostlerd", "uv"}
"""Programs of the Python environment, and what only a maintainer uses."""

FILES_ONLY = {"python3", "python3-venv", "qemu-block-extra", "ovmf", "linux-image-cloud-amd64", "libc6-dev"}
"""Packages of which the code uses files, or which a program of another package calls."""


def packages() -> dict[str, str]:
    """Package to reason, of all groups of packages.txt."""
    lines = (ROOT / "packages.txt").read_text().splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line and line[0] not in "#["]
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


def test_every_package_has_its_reason() -> None:
    assert {name for name, reason in packages().items() if len(reason) < 8} == set()


def test_every_program_the_code_starts_is_in_the_package_list() -> None:
    unknown, unlisted, used = [], [], set()
    for path in sorted(p for d in ("src", "tests", "tools", "bench") for p in (ROOT / d).rglob("*.py")):
        if path.parent == Path(__file__).parent:
            continue  # examples of the rules themselves; unit tests start nothing
        source = path.read_text()
        for line, word in [*rules.programs(source), *rules.mentions(source, PROGRAMS)]:
            program = word.rsplit("/", maxsplit=1)[-1]
            if program in OF_THE_BASE_SYSTEM | OF_THE_ENVIRONMENT or not program:
                continue
            used.add(program)
            if program not in PROGRAMS:
                unknown.append(f"{path.relative_to(ROOT)}:{line}: which package is {program!r} in?")
            elif PROGRAMS[program] not in packages():
                unlisted.append(f"{path.relative_to(ROOT)}:{line}: {PROGRAMS[program]} is not in packages.txt")
    rules.nothing_of(unknown + unlisted)
    assert {"gcc", "qemu-img"} <= used  # the search does find something


def test_no_package_is_listed_without_use() -> None:
    assert set(packages()) - set(PROGRAMS.values()) - FILES_ONLY == set()


def locked() -> dict[str, Version]:
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_the_lock_fulfils_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    wanted += project["build-system"]["requires"]
    pins = locked()
    wrong = []
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}: locked is {version}; run tools/lock.py")
    rules.nothing_of(wrong)


def test_the_lock_names_no_place_and_every_entry_has_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|--(extra-)?index|find-links|\bfile:", text)
    blocks = [block for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE) if not block.startswith("#")]
    assert len(blocks) == len(locked()) > 20
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []


def run_commands() -> set[str]:
    """Commands that ./run knows: the patterns of its last `case`."""
    last = (ROOT / "run").read_text().rpartition("case $command in")[2]
    return {word for line in re.findall(r"^([a-z |-]+)\)$", last, re.MULTILINE) for word in line.split(" | ")}


def test_the_help_of_run_tells_exactly_what_it_can_do() -> None:
    result = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, timeout=60, check=True)
    told = set(re.findall(r"^  ([a-z]+) ", result.stdout, re.MULTILINE))
    assert told == {name for name in run_commands() if not name.startswith("-")}


def test_the_documents_use_only_commands_that_run_has() -> None:
    used = {
        f"{path.name}: ./run {word}"
        for path in DOCUMENTS
        for word in re.findall(r"\./run ([a-z][a-z-]*)", path.read_text())
        if word not in run_commands()
    }
    rules.nothing_of(sorted(used))


def test_an_unknown_command_of_run_is_refused_with_the_help() -> None:
    result = subprocess.run([ROOT / "run", "tset"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "no such command: tset" in result.stderr
    assert "Usage" in result.stderr
