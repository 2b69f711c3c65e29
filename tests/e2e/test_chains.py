"""Differencing images from Hyper-V: looked at, read by a running guest as they are, and made one disk."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from userview import User, converse

from hostler.model.errors import ErrorCode
from hostler.model.requests import VmCreate
from hostler.model.units import KiB, MiB
from hostler.testing import hyperv_vhd, hyperv_vhdx, patterns
from hostler.testing.bench_vm import UNFINISHED, Bench
from hostler.testing.guestclient import GuestSerial, RangeVerdict

pytestmark = pytest.mark.e2e

SIZE = 8 * MiB
LENGTH = 128 * KiB
SEEDS = (71, 72)
"""Of what is at the disk's start, and in its middle."""


def sectors(content: bytes, first: int) -> dict[int, bytes]:
    return {first + n: content[n * 512 : n * 512 + 512] for n in range(len(content) // 512)}


def make(place: Path) -> dict[str, Path]:
    """A chain of each kind: each layer has every second 4 KiB of the pattern, the base rubbish at the others."""
    place.mkdir()
    first = sectors(patterns.pattern(SEEDS[0], LENGTH), 0)
    middle = sectors(patterns.pattern(SEEDS[1], LENGTH, SIZE // 2), SIZE // 2 // 512)
    wanted = {**first, **middle}
    base = {n: data if n // 8 % 2 else b"old!" * 128 for n, data in wanted.items()}
    over = {n: data for n, data in wanted.items() if not n // 8 % 2}
    (place / "Virtual Hard Disks").mkdir()
    (place / "Snapshots").mkdir()
    parent = place / "Virtual Hard Disks" / "web.vhd"
    id = hyperv_vhd.dynamic(parent, SIZE, base)
    top = place / "Snapshots" / "web_4C2F.avhd"
    names = {b"W2ru": "..\\Virtual Hard Disks\\web.vhd", b"W2ku": "D:\\Export\\web\\Virtual Hard Disks\\web.vhd"}
    hyperv_vhd.differencing(top, SIZE, over, (id, parent), names=names)
    basex = place / "web.vhdx"
    guid = hyperv_vhdx.Vhdx(SIZE, base).write(basex)
    topx = place / "web_4C2F.avhdx"
    hyperv_vhdx.Vhdx(SIZE, over, hyperv_vhdx.Parent.of(guid, basex)).write(topx)
    return {"avhd": top, "avhdx": topx}


@pytest.fixture(scope="module")
def chains(guest: Bench) -> dict[str, Path]:
    return make(guest.shared / "web")


@pytest.fixture(scope="module")
def user(guest: Bench) -> User:
    return User(guest.hosts[0])


def has_the_content(guest: Bench, serial: str) -> None:
    """The running guest reads the patterns."""

    async def verify(line: GuestSerial) -> list[RangeVerdict]:
        await line.wait_disk(serial)
        return [await line.verify(serial, seed, LENGTH, at) for seed, at in zip(SEEDS, (0, SIZE // 2), strict=True)]

    verdicts = guest.ask(guest.owner(), verify)
    assert all((v.bytes, v.bad_sectors) == (LENGTH, 0) for v in verdicts), verdicts


def test_a_directory_is_shown_as_a_tree(chains: dict[str, Path], user: User) -> None:
    shown = user.run("volume", "chain", str(chains["avhdx"].parent))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[0].startswith("web.vhdx  vhdx dynamic, 8 MiB")
    assert shown.stdout.splitlines()[1].startswith("`-- web_4C2F.avhdx  vhdx differencing, 8 MiB")
    alone = user("volume", "chain", str(chains["avhd"]))
    assert (alone["sound"], alone["images"][0]["link"]) == (False, "missing")
    found = user("volume", "chain", str(chains["avhd"]), "--search", str(chains["avhd"].parents[1]))
    assert (found["sound"], [Path(image["path"]).name for image in found["images"]]) == (
        True,
        ["web_4C2F.avhd", "web.vhd"],
    )


@pytest.mark.parametrize("kind", ["avhd", "avhdx"])
def test_a_running_guest_reads_it_as_it_is(guest: Bench, chains: dict[str, Path], kind: str) -> None:
    """Through restart of the daemon, save and a move; to write it is refused with the way out."""
    host = guest.owner()
    refused = User(host).refused(ErrorCode.BAD_IMAGE, 1, "disk", "add", "guest", "--volume", str(chains[kind]))
    assert "hostler volume flatten" in refused["advice"]
    User(host)("disk", "add", "guest", "--volume", str(chains[kind]), "--read-only", "--serial", f"C-{kind}")
    has_the_content(guest, f"C-{kind}")
    host.kill()
    host.start()
    has_the_content(guest, f"C-{kind}")
    User(host)("vm", "save", "guest")
    User(host)("vm", "restore", "guest")
    has_the_content(guest, f"C-{kind}")
    User(host)("vm", "move", "guest", guest.other(host).name)
    has_the_content(guest, f"C-{kind}")
    owner = User(guest.owner())
    disk = next(d for d in owner("vm", "show", "guest")["config"]["disks"] if d["serial"] == f"C-{kind}")
    owner("disk", "remove", "guest", disk["id"])
    guest.check(guest.owner())


@pytest.mark.parametrize("kind", ["avhd", "avhdx"])
def test_it_is_made_one_disk_that_a_guest_writes(guest: Bench, chains: dict[str, Path], kind: str) -> None:
    user = User(guest.owner())
    search = ("--search", str(chains["avhd"].parents[1]))
    job = user("volume", "flatten", str(chains[kind]), f"flat-{kind}", "--format", "vhdx", *search)
    assert (job["state"], job["result"]["size"]) == ("done", SIZE)
    user("disk", "add", "guest", "--volume", f"flat-{kind}", "--serial", f"F-{kind}")
    has_the_content(guest, f"F-{kind}")

    async def write(line: GuestSerial) -> RangeVerdict:
        await line.write(f"F-{kind}", 99, LENGTH, 2 * MiB)
        return await line.verify(f"F-{kind}", 99, LENGTH, 2 * MiB)

    assert guest.ask(guest.owner(), write).bad_sectors == 0


def slow_flatten(user: User, vm: str, disk: str, rate: str) -> str:
    """Begun, and copying; the job's id."""
    job: str = user("disk", "flatten", vm, disk, "--limit", rate, "--no-wait")["id"]
    until(lambda: user("job", "show", job)["progress"]["fraction"])
    return job


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_guest_writes_on_top_of_it_and_needs_it_no_more(guest: Bench) -> None:
    """At once, without a copy; then everything is copied while it writes, the daemon is killed in the middle, and the
    chain is deleted."""
    host, name = guest.hosts[0], "over"
    user, place = User(host), guest.shared / name
    chain = make(place)["avhd"]
    before = {path: path.read_bytes() for path in place.rglob("*.*vhd*")}
    like = guest.record(guest.owner())
    assert like is not None
    with host.client() as client:
        vm = client.vms.create(VmCreate(name=name, memory=like.config.memory, kernel=like.config.kernel)).id
    disk = user("disk", "add", name, "--volume", str(chain), "--overlay", "--serial", "OVER")["params"]["disk"]["id"]
    user("vm", "start", name)
    seeds = list(zip(SEEDS, (0, SIZE // 2), strict=True))

    async def write(line: GuestSerial, seed: int, at: int) -> None:
        await line.wait_disk("OVER")
        await line.write("OVER", seed, LENGTH, at)

    def sound() -> None:
        async def verify(line: GuestSerial) -> list[RangeVerdict]:
            await line.wait_disk("OVER")
            return [await line.verify("OVER", seed, LENGTH, at) for seed, at in seeds]

        verdicts = converse(host, vm, verify)
        assert all((v.bytes, v.bad_sectors) == (LENGTH, 0) for v in verdicts), verdicts

    def more(seed: int, at: int) -> None:
        converse(host, vm, lambda line: write(line, seed, at))
        seeds.append((seed, at))

    more(81, 1 * MiB)
    sound()
    job = slow_flatten(user, name, disk, "2M")
    more(82, 2 * MiB)
    assert user("job", "show", job)["state"] == "running"
    host.kill()
    host.start()
    more(83, 7 * MiB)
    until(lambda: user("job", "show", job)["state"] not in UNFINISHED)
    ended = user("job", "show", job)
    assert (ended["state"], ended["result"]["freed"]) == ("done", [str(chain)]), ended
    sound()
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(place)
    sound()
    os.kill(user("vm", "show", name)["process"]["pid"], signal.SIGKILL)  # nothing was in its memory only
    user.until_state(name, "off")
    user("vm", "start", name)
    sound()
    user("vm", "turn-off", name)
    assert user("vm", "delete", name, "--disks")["removed"] == [ended["result"]["path"]]
