"""Machines that come from Hyper-V and boot, go out and come back with what their guest wrote; a daemon that is killed
in the middle of an import, a disk that is full."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bootable import boot_sector
from userview import User, converse, traces

from hostler.model.errors import ErrorCode
from hostler.model.units import MiB
from hostler.testing import hyperv_export as made
from hostler.testing import hyperv_vhd, microguest
from hostler.testing.guestclient import GuestSerial
from hostler.testing.hyperv_export import Adapter, Drive, Machine
from hostler.testing.lab import Lab
from hostler.testing.patterns import pattern

pytestmark = pytest.mark.e2e

LINE = b"HERE I AM\r\n"
SEED = 20091022
"""The day on which Windows Server 2008 R2 came out."""


@pytest.fixture(scope="module")
def user(short_dir: Path) -> Iterator[User]:
    with Lab(short_dir, isolated=False) as lab:
        yield User(lab.add_host("a"))


@pytest.fixture
def place(short_dir: Path, request: pytest.FixtureRequest) -> Path:
    """A directory that the users of VMs may enter."""
    made = short_dir / request.node.name[:40]
    made.mkdir()
    return made


@pytest.fixture
def clean(user: User) -> Iterator[None]:
    """Whatever a test made is gone after it."""
    yield
    for vm in user("vm", "list"):
        user.run("vm", "turn-off", vm["config"]["name"])
        user("vm", "delete", vm["config"]["name"], "--disks", "--yes")
    for volume in user("volume", "list"):
        user("volume", "delete", volume["name"], "--keep-file", "--yes")
    assert user.host.processes() == []


def export_of_2008(folder: Path, system: bytes) -> Path:
    """A VM of generation 1: its system on IDE in a base and one differencing image on top (a snapshot was taken), its
    description an .exp. Both images are needed to boot: the sector that BIOS loads was written after the snapshot."""
    for name in ("Virtual Machines", "Virtual Hard Disks", "Snapshots"):
        (folder / name).mkdir(parents=True)
    (folder / "config.xml").write_bytes(made.xml(Machine(name="about the export")))
    base = folder / "Virtual Hard Disks" / "boot.vhd"
    id = hyperv_vhd.dynamic(base, 4 * MiB, {0: b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa", 100: b"base" * 128})
    top = folder / "Snapshots" / "boot_0A1B.avhd"
    names = {b"W2ku": "C:\\Export\\Virtual Hard Disks\\boot.vhd"}
    hyperv_vhd.differencing(top, 4 * MiB, {0: system}, (id, base), names=names)
    exp = made.exp("server 2008", {(0, 0): "C:\\Export\\Snapshots\\boot_0A1B.avhd"}, mac="00155D0A0B0C")
    (folder / "Virtual Machines" / f"{made.VM_ID.upper()}.exp").write_bytes(exp)
    return folder


@pytest.mark.usefixtures("clean")
def test_an_export_of_2008_boots(user: User, place: Path) -> None:
    folder = export_of_2008(place / "export", boot_sector(LINE))
    report = user("import", "inspect", str(folder))
    assert report["machine"]["kind"] == "hyper-v-exp"
    assert [(d["fate"], len(d["chain"])) for d in report["disks"]] == [("flatten", 1)]
    said = user.run("import", "inspect", str(folder)).stdout
    assert "GUEST NEEDS" in said and "server 2008" in said and "00:15:5d:0a:0b:0c" in said
    user("import", "run", str(folder), "--network", "LAN=user", "--name", "r2")
    vm = user("vm", "show", "r2")
    assert [(n["mac"], n["network"]) for n in vm["config"]["nics"]] == [("00:15:5d:0a:0b:0c", "user")]
    user("vm", "start", "r2")
    with user.on_terminal("vm", "console", "r2") as terminal:
        terminal.read_until(LINE.strip())
    again = user.refused(ErrorCode.BLOCKED, 4, "import", "run", str(folder), "--name", "r2")
    assert len(again["details"]["blockers"]) == 2  # its name and its MAC address


@pytest.mark.usefixtures("clean")
def test_what_a_guest_wrote_goes_out_and_comes_back(user: User, place: Path) -> None:
    guest = microguest.build(place)
    boot = ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--append", guest.cmdline]
    user("vm", "create", "writer", "--memory", "128M", *boot, "--new-disk", "24M,format=vhdx,serial=DATA", "--start")

    async def write(serial: GuestSerial) -> None:
        disk = await serial.wait_disk("DATA")
        await serial.write(disk.name, SEED, 4 * MiB, MiB)

    converse(user.host, user("vm", "show", "writer")["config"]["id"], write)
    problem = user.refused(ErrorCode.WRONG_STATE, 4, "export", "writer", str(place))
    assert "must be off" in problem["cause"]
    user("vm", "shutdown", "writer", "--timeout", "60")
    user("export", "writer", str(place), "--ova")
    user("export", "writer", str(place))
    user("vm", "delete", "writer", "--disks", "--yes")

    user("import", "run", str(place / "writer"), "--keep-id")
    user("vm", "delete", "writer", "--yes")
    user("import", "run", str(place / "writer.ova"), "--format", "raw", "--name", "reader")
    disk = user("vm", "show", "reader")["config"]["disks"][0]["source"]
    with open(disk["path"], "rb") as file:
        file.seek(MiB)
        assert file.read(4 * MiB) == pattern(SEED, 4 * MiB, MiB)
    user("vm", "delete", "reader", "--disks", "--yes")

    user("import", "run", str(place / "writer"), "--in-place", "--name", "reader")
    config: dict[str, Any] = user("vm", "show", "reader")["config"]
    assert config["disks"][0]["source"]["path"] == str(place / "writer" / "disk0.vhdx")
    user("vm", "set", "reader", *boot)
    user("vm", "start", "reader")

    async def verify(serial: GuestSerial) -> int:
        found = await serial.wait_disk("DATA")
        return (await serial.verify(found.name, SEED, 4 * MiB, MiB)).bad_sectors

    assert converse(user.host, config["id"], verify) == 0


def large(folder: Path, size: int) -> Path:
    """A configuration beside a raw-like fixed VHD whose copying takes a moment."""
    folder.mkdir()
    hyperv_vhd.fixed(folder / "a.vhd", os.urandom(size))
    machine = Machine(name="large", ide={(0, 0): Drive("D:\\a.vhd")}, nics=(Adapter("00-15-5D-00-00-99"),))
    (folder / "a.xml").write_bytes(made.xml(machine))
    return folder


def begun(user: User, folder: Path) -> tuple[str, psutil.Process]:
    """An import that is copying right now: the id of its job, and its qemu-img, standing still. The job is let go only
    when the command that began it has ended, so that the copy is not over before anybody looks."""
    user.host.failpoints.arm("vm.import/volumes")
    job = user("import", "run", str(folder), "--no-wait")
    user.host.failpoints.wait_reached("vm.import/volumes")
    assert user.host.daemon is not None
    threads = list(Path(f"/proc/{user.host.daemon.pid}/task").iterdir())
    user.host.failpoints.clear()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for pid in [int(pid) for thread in threads for pid in children_of(thread)]:
            with suppress(OSError, psutil.Error):
                if Path(f"/proc/{pid}/comm").read_text() != "qemu-img\n":  # not yet what it is wrapped in
                    continue
                if b"\0convert\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    process = psutil.Process(pid)
                    process.suspend()
                    return str(job["id"]), process
    raise AssertionError("nothing was copied")


def children_of(thread: Path) -> list[str]:
    with suppress(OSError):
        return (thread / "children").read_text().split()
    return []


@pytest.mark.usefixtures("clean")
def test_a_daemon_that_is_killed_while_it_copies(user: User, place: Path) -> None:
    folder = large(place / "large", 192 * MiB)
    before = traces(user.host, place)
    job, copying = begun(user, folder)
    volumes = user.host.state_dir / "volumes"
    assert list(volumes.iterdir()) != []
    user.host.kill()
    psutil.wait_procs([copying], timeout=10)
    assert not copying.is_running()
    user.host.start()
    ended = user("job", "show", job)
    assert (ended["state"], ended["error"]["code"]) == ("failed", "interrupted")
    assert traces(user.host, place) == before
    job, copying = begun(user, folder)
    user("job", "cancel", job)
    user.run("job", "watch", job)
    assert user("job", "show", job)["state"] == "cancelled"
    assert traces(user.host, place) == before
    user("import", "run", str(folder))
    assert [vm["config"]["name"] for vm in user("vm", "list")] == ["large"]


@contextmanager
def small(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
@pytest.mark.usefixtures("clean")
def test_a_full_disk_is_said_before_and_during(user: User, short_dir: Path, place: Path) -> None:
    folder = large(place / "large", 24 * MiB)
    with small(short_dir / "small", 16 * MiB) as target:
        before = traces(user.host, target)
        problem = user.refused(ErrorCode.BLOCKED, 4, "import", "run", str(folder), "--directory", str(target))
        assert "free" in problem["cause"]
        # a sparse image says that it is small, and its copy turns out not to be
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "a.ovf").write_text(OVF)
        (folder / "raw").write_bytes(b"\0" * 64 * MiB)
        with open(folder / "raw", "r+b") as file:
            for at in range(0, 64 * MiB, 4096):  # compresses well, and fills what it is copied to
                file.seek(at)
                file.write(bytes([1 + at // 4096 % 255]) * 4096)
        pack = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
        subprocess.run([*pack, str(folder / "raw"), str(folder / "a.vmdk")], check=True)
        assert (folder / "a.vmdk").stat().st_size < 8 * MiB
        user.refused(ErrorCode.NO_SPACE, 1, "import", "run", str(folder / "a.ovf"), "--directory", str(target))
        assert traces(user.host, target) == before


OVF = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
 <References><File ovf:id="f1" ovf:href="a.vmdk"/></References>
 <DiskSection><Info/><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="67108864"/></DiskSection>
 <VirtualSystem ovf:id="web"><Info/><Name>web</Name><VirtualHardwareSection><Info/>
  <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d1</rasd:HostResource>
   <rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType></Item>
 </VirtualHardwareSection></VirtualSystem>
</Envelope>"""
