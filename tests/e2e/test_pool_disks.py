"""Disks from storage systems: a VM boots with one and is given another while it runs, both are written and read back,
the storage dies and comes back, and no secret is seen by anybody."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from userview import User, converse

from hostler.model.errors import ErrorCode, GuestRefused
from hostler.model.units import KiB, MiB
from hostler.testing import microguest, patterns
from hostler.testing.guestclient import GuestDisk, GuestSerial, RangeVerdict
from hostler.testing.lab import Lab
from hostler.testing.targets import Authority, IscsiTarget, NbdServer

pytestmark = pytest.mark.e2e

SIZE = 16 * MiB
LENGTH = 512 * KiB
CHAP = ("vms", "hush-hush-hush")


@dataclass
class Place:
    """A host, two storage systems, and a running guest with a disk of each."""

    user: User
    target: IscsiTarget
    server: NbdServer
    directory: Path
    key: str
    other: User
    vm_id: str = ""

    def files(self) -> dict[str, Path]:
        """Where the bytes of each disk end up, by serial number."""
        return {"LUN": self.target.file(1), "EXPORT": self.directory / "n" / "export-data"}


@pytest.fixture(scope="module")
def place(short_dir: Path) -> Iterator[Place]:
    authority = Authority(short_dir / "ca")
    client = authority.client()
    secret = short_dir / "secret"
    secret.write_text(CHAP[1] + "\n")
    secret.chmod(0o600)
    with (
        Lab(short_dir, isolated=False) as lab,
        IscsiTarget(short_dir / "t", CHAP) as target,
        NbdServer(short_dir / "n", authority) as server,
    ):
        target.add(SIZE)
        target.add(SIZE)
        server.add("data", SIZE)
        server.start()
        user, other = User(lab.add_host("h")), User(lab.add_host("i"))
        lab.join(user.host, other.host)
        made = Place(user, target, server, short_dir, (client / "client-key.pem").read_text(), other)
        chap = ("--chap-user", CHAP[0], "--chap-secret-file", str(secret))
        [found] = user("pool", "discover", target.portals[0])
        user("pool", "create", "san", "--iscsi", found["target"], "--portal", target.portals[0], *chap)
        user("pool", "create", "far", "--nbd", server.portal, "--tls", str(client))
        user("volume", "create", "lun", str(SIZE), "--pool", "san")
        user("volume", "create", "data", str(SIZE), "--pool", "far")
        built = microguest.build(short_dir / "guest")
        boot = ["--kernel", str(built.kernel), "--initrd", str(built.initrd), "--append", built.cmdline]
        user("vm", "create", "guest", "--memory", "128M", *boot, "--disk", "lun,serial=LUN", "--start")
        made.vm_id = user("vm", "show", "guest")["config"]["id"]
        yield made


def on_the_storage(place: Place, serial: str, seed: int, offset: int = 0) -> bool:
    """Whether the storage system's own file has the pattern there."""
    with place.files()[serial].open("rb") as file:
        file.seek(offset)
        return file.read(LENGTH) == patterns.pattern(seed, LENGTH, offset)


def write_and_read(place: Place, serial: str, seed: int) -> RangeVerdict:
    async def talk(guest: GuestSerial) -> RangeVerdict:
        seen: GuestDisk = await guest.wait_disk(serial)
        assert (seen.size, seen.read_only) == (SIZE, False)
        await guest.write(serial, seed, LENGTH)
        await guest.write(serial, seed, LENGTH, SIZE - LENGTH)
        assert (await guest.verify(serial, seed, LENGTH)).bad_sectors == 0
        return await guest.verify(serial, seed, LENGTH, SIZE - LENGTH)

    return converse(place.user.host, place.vm_id, talk)


def test_a_vm_boots_with_a_lun_and_is_given_an_export_while_it_runs(place: Place) -> None:
    place.user("disk", "add", "guest", "--volume", "data", "--serial", "EXPORT")
    for seed, serial in enumerate(("LUN", "EXPORT"), start=1):
        assert write_and_read(place, serial, seed).bad_sectors == 0
        assert on_the_storage(place, serial, seed)
    disks = {d["serial"]: d["source"] for d in place.user("vm", "show", "guest")["config"]["disks"]}
    assert (disks["LUN"]["kind"], disks["LUN"]["path"]) == ("iscsi", place.target.url(1))
    assert disks["LUN"]["identity"] and disks["LUN"]["pool"] == "san"
    assert disks["EXPORT"]["path"] == f"nbd://{place.server.portal}/data"


def test_no_secret_is_seen_by_anybody(place: Place) -> None:
    """Not in arguments, logs, views, events or files of others; the files QEMU reads are its user's alone."""
    key = place.key.splitlines()[1]
    shown = [json.dumps(place.user(*words)) for words in (("pool", "list"), ("pool", "show", "san"), ("vm", "list"))]
    shown += [json.dumps(place.user("pool", "scan", "san")), json.dumps(place.user("job", "list"))]
    lines = [" ".join(process.cmdline()) for process in place.user.host.processes()]
    assert any("pool-san.secret" in line for line in lines)
    run_dir = place.user.host.run_dir / "vms" / place.vm_id
    logs = [place.user.host.log.read_text(), (run_dir / "qemu.log").read_text()]
    logs.append((place.user.host.state_dir / "audit.jsonl").read_text())
    for text in (*shown, *lines, *logs):
        assert CHAP[1] not in text and key not in text
    secrets = [path for path in run_dir.glob("pool-*/*") if path.is_file()]
    assert {path.name for path in secrets} == {"secret", "ca-cert.pem", "client-cert.pem", "client-key.pem"}
    for path in (*secrets, *(p.parent for p in secrets)):
        status = path.stat()
        assert status.st_mode & 0o077 == 0
        assert os.geteuid() != 0 or status.st_uid == run_dir.stat().st_uid
    assert os.stat(place.user.host.state_dir / "store" / "hostler.db").st_mode & 0o077 == 0 or (
        os.stat(place.user.host.state_dir / "store").st_mode & 0o077 == 0
    )


@pytest.mark.parametrize("serial", ["LUN", "EXPORT"])
def test_storage_that_dies_and_comes_back_loses_nothing(place: Place, serial: str) -> None:
    system = place.target if serial == "LUN" else place.server

    async def talk(guest: GuestSerial) -> None:
        await guest.write(serial, 11, LENGTH)
        system.kill()
        writing = asyncio.ensure_future(guest.write(serial, 12, LENGTH, MiB, deadline=80))
        done, _ = await asyncio.wait({writing}, timeout=2)
        assert not done, "nobody can have taken that"
        await asyncio.to_thread(system.start)
        await writing
        assert (await guest.verify(serial, 11, LENGTH)).bad_sectors == 0
        assert (await guest.verify(serial, 12, LENGTH, MiB)).bad_sectors == 0

    converse(place.user.host, place.vm_id, talk)
    assert place.user("vm", "show", "guest")["state"] == "running"
    assert on_the_storage(place, serial, 12, MiB)


def test_a_lun_is_no_second_vms_and_its_number_is_no_name(place: Place) -> None:
    user = place.user
    user("vm", "create", "rival", "--memory", "64M")
    problem = user.refused(ErrorCode.IN_USE, 4, "disk", "add", "guest", "--volume", "lun")
    assert "disk" in problem["cause"]
    user("disk", "add", "rival", "--volume", "lun")
    problem = user.refused(ErrorCode.IN_USE, 4, "vm", "start", "rival")
    assert "guest" in problem["cause"]
    user("vm", "delete", "rival", "--yes")
    report = user("pool", "scan", "san")
    assert [f["path"] for f in report["unknown"]] == [place.target.url(2)]
    assert report["missing"] == report["changed"] == []


def test_guests_of_a_cluster_share_a_lun_and_settle_who_writes(place: Place) -> None:
    user = place.user
    user("volume", "create", "quorum", str(SIZE), "--pool", "san")
    built = microguest.build(place.directory / "guest")
    boot = ["--kernel", str(built.kernel), "--initrd", str(built.initrd), "--append", built.cmdline]
    user("vm", "create", "node2", "--memory", "96M", *boot, "--start")
    node2 = user("vm", "show", "node2")["config"]["id"]
    user("disk", "add", "guest", "--volume", "quorum", "--reservations")
    problem = user.refused(ErrorCode.IN_USE, 4, "disk", "add", "node2", "--volume", "quorum")
    assert "guest" in problem["cause"], "only who settles it with the others may share it"
    user("disk", "add", "node2", "--volume", "quorum", "--reservations")

    async def lun(guest: GuestSerial) -> str:
        for _ in range(100):
            names = [disk.name for disk in await guest.disks() if disk.vendor == "IET"]
            if names:
                return names[0]
            await asyncio.sleep(0.1)
        raise AssertionError(await guest.disks())

    async def take(guest: GuestSerial) -> None:
        await guest.reserve(await lun(guest), 0xA1)
        await guest.write(await lun(guest), 41, LENGTH)

    async def fail(guest: GuestSerial) -> None:
        with pytest.raises(GuestRefused):
            await guest.write(await lun(guest), 42, LENGTH, deadline=20)
        assert (await guest.verify(await lun(guest), 41, LENGTH)).bad_sectors == 0

    async def give_up(guest: GuestSerial) -> None:
        await guest.reserve(await lun(guest), 0)

    async def write(guest: GuestSerial) -> None:
        await guest.write(await lun(guest), 43, LENGTH)
        assert (await guest.verify(await lun(guest), 43, LENGTH)).bad_sectors == 0

    converse(user.host, place.vm_id, take)
    converse(user.host, node2, fail)
    assert user("vm", "show", "node2")["state"] == "running", "the guest is told, and not stopped"
    converse(user.host, place.vm_id, give_up)
    converse(user.host, node2, write)
    user("vm", "turn-off", "node2")
    user("vm", "delete", "node2", "--yes")
    disk = next(d["id"] for d in user("vm", "show", "guest")["config"]["disks"] if d["reservations"])
    user("disk", "remove", "guest", disk)
    user("volume", "delete", "quorum", "--yes")
    assert place.target.file(2).exists(), "what is on a LUN stays"


def test_a_disk_of_a_storage_system_is_taken_away_and_given_again(place: Place) -> None:
    disk = next(d["id"] for d in place.user("vm", "show", "guest")["config"]["disks"] if d["serial"] == "EXPORT")
    assert write_and_read(place, "EXPORT", 21).bad_sectors == 0
    place.user("disk", "remove", "guest", disk)
    place.user("disk", "add", "guest", "--volume", "data", "--serial", "EXPORT")

    async def read(guest: GuestSerial) -> RangeVerdict:
        await guest.wait_disk("EXPORT")
        return await guest.verify("EXPORT", 21, LENGTH)

    assert converse(place.user.host, place.vm_id, read).bad_sectors == 0


def test_a_vm_moves_where_the_same_storage_is_known(place: Place) -> None:
    """Blocked as long as the other host has not the pools, or finds something else in them; then nothing is lost."""
    secret, client = place.directory / "secret", place.directory / "ca" / "client"
    assert write_and_read(place, "LUN", 31).bad_sectors == 0
    problem = place.user.refused(ErrorCode.BLOCKED, 4, "vm", "move", "guest", "i")
    blockers = problem["details"]["blockers"]
    assert {b["kind"] for b in blockers} == {"volume-not-shared"} and len(blockers) == 2, blockers
    assert all("pool" in b["text"] and "pool" in b["advice"] for b in blockers)
    chap = ("--chap-user", CHAP[0], "--chap-secret-file", str(secret))
    place.other("pool", "create", "san", "--iscsi", place.target.name, "--portal", place.target.portals[0], *chap)
    place.other("pool", "create", "far", "--nbd", place.server.portal, "--tls", str(client))
    place.user("vm", "move", "guest", "i")
    assert place.other("vm", "show", "guest")["state"] == "running"

    async def read(guest: GuestSerial) -> list[RangeVerdict]:
        await guest.write("EXPORT", 32, LENGTH)
        return [await guest.verify("LUN", 31, LENGTH), await guest.verify("EXPORT", 32, LENGTH)]

    assert all(v.bad_sectors == 0 for v in converse(place.other.host, place.vm_id, read))
    assert not list((place.user.host.run_dir / "vms").glob("*/pool-*"))
    place.other("vm", "move", "guest", "h")
    assert write_and_read(place, "EXPORT", 33).bad_sectors == 0


def test_a_wrong_secret_and_another_lun_are_told_clearly(place: Place, tmp_path: Path) -> None:
    user = place.user
    user("vm", "turn-off", "guest")
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-secret")
    words = ("--chap-user", CHAP[0], "--chap-secret-file", str(wrong))
    problem = user.refused(ErrorCode.HOST_LACKS, 1, "pool", "change", "san", *words)
    assert "CHAP" in problem["cause"]
    place.target.remove(1)
    place.target.add(SIZE, 1, "scsi_id=somebody-else")
    problem = user.refused(ErrorCode.BAD_IMAGE, 1, "vm", "start", "guest")
    assert "recorded" in problem["cause"], problem
    assert user("vm", "show", "guest")["state"] == "off"
    assert not list((user.host.run_dir / "vms").glob("*/pool-*"))
    shown = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert shown
    assert all(CHAP[1] not in line for line in shown)
