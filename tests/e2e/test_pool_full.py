"""A pool that runs full under running guests: they stand still, their owner is told, and when there is room they go on
by themselves with nothing lost."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from userview import PATIENCE, User, converse

from hostler.model.units import MiB
from hostler.testing import microguest, patterns
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")]

ROOM = 64 * MiB
DISK = 32 * MiB
NAMES = ("one", "two")


@dataclass
class Small:
    """A host whose pool "small" is a file system of 64 MiB, and two guests with a thin disk of 32 MiB each in it."""

    user: User
    pool: Path
    ids: dict[str, str]

    @property
    def ballast(self) -> Path:
        return self.pool / "ballast"

    def leave(self, free: int) -> None:
        """Fill it by something else until only so much is free."""
        found = os.statvfs(self.pool)
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - free)


@pytest.fixture(scope="module")
def small(short_dir: Path) -> Iterator[Small]:
    pool = short_dir / "small"
    pool.mkdir()
    image = short_dir / "small.img"
    image.touch()
    os.truncate(image, ROOM)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, pool], check=True)
    pool.chmod(0o755)
    try:
        with Lab(short_dir, isolated=False) as lab:
            user = User(lab.add_host("h"))
            user("pool", "create", "small", "--path", str(pool))
            built = microguest.build(short_dir / "guest")
            boot = ["--kernel", str(built.kernel), "--initrd", str(built.initrd), "--append", built.cmdline]
            for name in NAMES:
                user("volume", "create", name, str(DISK), "--pool", "small")
                user("vm", "create", name, "--memory", "96M", *boot, "--disk", f"{name},serial={name}", "--start")
            yield Small(user, pool, {name: user("vm", "show", name)["config"]["id"] for name in NAMES})
    finally:
        subprocess.run(["umount", pool], check=True)


def test_what_a_full_pool_says(small: Small) -> None:
    shown = small.user("pool", "show", "small")
    assert (shown["promised"], shown["volumes"]) == (2 * DISK, 2)
    assert shown["state"] == "ready" and any("may grow" in warning for warning in shown["warnings"])
    small.leave(6 * MiB)
    assert small.user("pool", "show", "small")["state"] == "low"
    small.ballast.unlink()


def test_guests_go_on_by_themselves_when_there_is_room(small: Small) -> None:
    """Both write more than there is, and get their answers when there is."""
    small.leave(6 * MiB)
    length = 8 * MiB

    async def write(name: str) -> None:
        socket = small.user.host.run_dir / "vms" / small.ids[name] / "serial.sock"
        async with GuestSerial.unix(socket) as guest:
            await guest.wait_ready()
            await guest.wait_disk(name)
            await guest.write(name, 7, length, deadline=PATIENCE)
            assert (await guest.verify(name, 7, length)).bad_sectors == 0

    async def both() -> None:
        writing = [asyncio.ensure_future(write(name)) for name in NAMES]
        for name in NAMES:
            await asyncio.to_thread(small.user.until_state, name, "critical")
        assert not any(task.done() for task in writing)
        shown = [await asyncio.to_thread(small.user, "vm", "show", name) for name in NAMES]
        assert {vm["reason"] for vm in shown} == {"no-space"}
        assert all("goes on by itself" in vm["reason_text"] for vm in shown)
        assert (await asyncio.to_thread(small.user, "pool", "show", "small"))["state"] == "full"
        await asyncio.to_thread(small.ballast.unlink)
        await asyncio.gather(*writing)

    asyncio.run(both())
    for name in NAMES:
        assert small.user("vm", "show", name)["state"] == "running"
    jobs = [job for job in small.user("job", "list") if job["kind"] == "vm.resume"]
    assert {job["by"] for job in jobs} == {"hostlerd"} and {job["state"] for job in jobs} == {"done"}


def test_what_they_wrote_is_whole(small: Small) -> None:
    for name in NAMES:

        async def again(guest: GuestSerial, name: str = name) -> int:
            return (await guest.verify(name, 7, 8 * MiB)).bad_sectors

        assert converse(small.user.host, small.ids[name], again) == 0
        small.user("vm", "turn-off", name)
        raw = small.pool.parent / f"{name}.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", small.pool / f"{name}.qcow2", raw], check=True)
        assert raw.read_bytes()[: 8 * MiB] == patterns.pattern(7, 8 * MiB)
        raw.unlink()
