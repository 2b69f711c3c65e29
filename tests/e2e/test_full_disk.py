"""A disk that is full: said so by name, nothing half made left behind, and all is well once there is room again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from userview import User, converse, traces

from hostler.model.errors import ErrorCode
from hostler.model.units import MiB
from hostler.testing import microguest
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")]

DISK = 32 * MiB


class SmallDisk:
    """A file system of 32 MiB with a file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def leave(self, free: int) -> None:
        """Fill it until only about so many bytes are free."""
        self.relieve()
        with self._ballast.open("wb") as file:
            while (room := self._free() - free) > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(4096, room))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break

    def relieve(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def _free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize


@pytest.fixture(scope="module")
def disk(short_dir: Path) -> Iterator[SmallDisk]:
    path = short_dir / "h"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "none", path], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="module")
def user(disk: SmallDisk, short_dir: Path) -> Iterator[User]:
    """On a host with its state and sockets on the small disk; its log is there too."""
    with Lab(short_dir, isolated=False) as lab:
        yield User(lab.add_host("h"))


@pytest.fixture
def full(disk: SmallDisk) -> Iterator[SmallDisk]:
    yield disk
    disk.relieve()


@pytest.mark.parametrize("format", ["raw", "qcow2", "vhd-fixed", "vhd", "vhdx"])
def test_a_volume_copied_onto_it(user: User, full: SmallDisk, short_dir: Path, format: str) -> None:
    source = short_dir / "source"
    source.write_bytes(os.urandom(8 * MiB))
    full.leave(4 * MiB)
    before = traces(user.host)
    words = ("volume", "import", "x", str(source), "--source-format", "raw", "--format", format)
    problem = user.refused(ErrorCode.NO_SPACE, 1, *words)
    assert str(user.host.state_dir) in problem["cause"] + problem["object"], problem
    after = traces(user.host)
    assert (
        after["files"] - {str(user.host.state_dir / "volumes")} == before["files"]
        and after["records"] == before["records"]
    )
    full.relieve()
    user(*words)
    user("volume", "delete", "x", "--yes")


def test_a_guest_is_not_lost_when_it_cannot_be_saved(user: User, full: SmallDisk, short_dir: Path) -> None:
    built = microguest.build(short_dir / "guest")
    boot = ["--kernel", str(built.kernel), "--initrd", str(built.initrd), "--append", built.cmdline]
    user("vm", "create", "guest", "--memory", "128M", *boot, "--start")
    vm_id = user("vm", "show", "guest")["config"]["id"]

    async def boot_id(serial: GuestSerial) -> str:
        return (await serial.ping()).boot

    born = converse(user.host, vm_id, boot_id)
    full.leave(4 * MiB)
    before = traces(user.host)
    problem = user.refused(ErrorCode.NO_SPACE, 1, "vm", "save", "guest")
    assert "saved state" in problem["cause"]
    assert traces(user.host) == before
    assert user("vm", "show", "guest")["state"] == "running"
    assert converse(user.host, vm_id, boot_id) == born
    full.relieve()
    user("vm", "turn-off", "guest")
    user("vm", "delete", "guest", "--yes")


def test_nothing_at_all_fits_any_more(user: User, full: SmallDisk) -> None:
    """Even a record cannot be written: each change is refused or done, looking works, and afterwards all is well."""
    user("vm", "create", "here", "--memory", "64M")
    full.leave(0)
    before = traces(user.host)
    for words in (
        ("vm", "create", "new"),
        ("vm", "set", "here", "--notes", "n" * 16_000),
        ("volume", "create", "new", "1M"),
        ("vm", "start", "here"),
    ):
        done = user.run(*words)
        assert done.returncode in (0, 1), (words, done)
        assert done.returncode == 0 or "space" in done.stderr or "full" in done.stderr, (words, done)
    assert user("vm", "show", "here")["config"]["name"] == "here"
    full.relieve()
    if user("vm", "show", "here")["state"] == "running":
        user("vm", "turn-off", "here")
    user("vm", "start", "here")
    user("vm", "turn-off", "here")
    assert before["processes"] == traces(user.host)["processes"]
    for vm in user("vm", "list"):
        user("vm", "delete", vm["config"]["name"], "--yes")
