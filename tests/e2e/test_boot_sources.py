"""What a VM can start from, and how it ends: disk images of several formats, a CD, a kernel, UEFI, a TPM; shut-down by
the guest agent, by the power button, and of a guest that does not listen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from bootable import boot_cd, boot_sector
from userview import User, converse

from hostler.model.errors import ErrorCode
from hostler.testing import hyperv_vhd, microguest
from hostler.testing.guestclient import GuestSerial
from hostler.testing.lab import Lab

pytestmark = pytest.mark.e2e

T = TypeVar("T")
LINE = b"HERE I AM\r\n"
NEED_UEFI = pytest.mark.skipif(not os.path.exists("/usr/share/OVMF/OVMF_CODE_4M.fd"), reason="OVMF is not installed")
HAVE_TPM = shutil.which("swtpm") is not None


@pytest.fixture(scope="module")
def user(short_dir: Path) -> Iterator[User]:
    with Lab(short_dir, isolated=False) as lab:
        yield User(lab.add_host("a"))


@pytest.fixture(scope="module")
def images(short_dir: Path) -> Path:
    """A directory with a bootable disk, a bootable CD, and the micro guest's kernel."""
    folder = short_dir / "images"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(boot_sector(LINE).ljust(1024**2, b"\0"))
    (folder / "cd.iso").write_bytes(boot_cd(LINE))
    microguest.build(folder)
    return folder


@pytest.fixture
def name(user: User, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a VM that ends with the test, with all it had."""
    yield "vm"
    user.run("vm", "turn-off", "vm")
    user("vm", "delete", "vm", "--yes")
    assert user.host.processes() == []


def kernel_options(images: Path, more: str = "") -> list[str]:
    found = microguest.build(images)
    return ["--kernel", str(found.kernel), "--initrd", str(found.initrd), "--append", f"{found.cmdline} {more}".strip()]


def ask(user: User, name: str, question: Callable[[GuestSerial], Awaitable[T]]) -> T:
    """One conversation with a micro guest."""
    return converse(user.host, user("vm", "show", name)["config"]["id"], question)


def says(user: User, name: str, line: bytes) -> None:
    with user.on_terminal("vm", "console", name) as terminal:
        terminal.read_until(line)


def test_boots_from_a_checkpoint_of_hyper_v(user: User, name: str, images: Path) -> None:
    """As it is, on an overlay, without anything having been copied."""
    place = images / "web"
    place.mkdir()
    parent, top = place / "web.vhd", place / "web_4C2F.avhd"
    id = hyperv_vhd.dynamic(parent, 1024**2, {0: bytes(512)})
    hyperv_vhd.differencing(top, 1024**2, {0: boot_sector(LINE)}, (id, parent))
    user("vm", "create", name, "--memory", "64M")
    user("disk", "add", name, "--volume", str(top), "--overlay")
    user("vm", "start", name)
    says(user, name, LINE)
    user("disk", "flatten", name, "disk0")
    shutil.rmtree(place)
    user("vm", "turn-off", name)
    user("vm", "start", name)
    says(user, name, LINE)


@pytest.mark.parametrize(
    ("format", "bus"), [("raw", "ide"), ("qcow2", "scsi"), ("vhd-fixed", "ide"), ("vhd", "scsi"), ("vhdx", "ide")]
)
def test_boots_from_a_disk(user: User, name: str, images: Path, format: str, bus: str) -> None:
    path = images / f"{format}-{bus}"
    source = str(images / "disk.raw")
    user(
        *("volume", "import", "system", source, "--source-format", "raw"),
        *("--format", format, "--path", str(path)),
    )
    user("vm", "create", name, "--memory", "64M", "--disk", f"system,bus={bus}", "--start")
    says(user, name, LINE.strip())
    user("vm", "turn-off", name)
    user("vm", "delete", name, "--disks", "--yes")
    assert not path.exists()
    user("vm", "create", name)


def test_boots_from_a_cd_before_an_empty_disk(user: User, name: str, images: Path) -> None:
    user("vm", "create", name, "--memory", "64M", "--new-disk", "8M", "--cdrom", str(images / "cd.iso"), "--start")
    says(user, name, LINE.strip())
    disks = user("vm", "show", name)["config"]["disks"]
    assert [(d["id"], d["media"]) for d in disks] == [("disk0", "disk"), ("disk1", "cdrom")]
    assert (images / "cd.iso").read_bytes() == boot_cd(LINE)


@NEED_UEFI
def test_boots_a_kernel_by_uefi_with_a_tpm(user: User, name: str, images: Path) -> None:
    tpm = ["--tpm"] if HAVE_TPM else []
    user("vm", "create", name, "--memory", "192M", "--uefi", *tpm, *kernel_options(images), "--start")

    async def look(guest: GuestSerial) -> str:
        return await guest.look("/sys/firmware/efi/fw_platform_size")

    assert ask(user, name, look) == "64"
    if not tpm:
        return

    async def tpm_version(guest: GuestSerial) -> str:
        return await guest.look("/sys/class/tpm/tpm0/tpm_version_major")

    assert ask(user, name, tpm_version) == "2"
    user("vm", "save", name)
    assert user.host.processes() == []
    user("vm", "restore", name)
    assert ask(user, name, tpm_version) == "2"


@pytest.mark.parametrize(("parameter", "by"), [("", b"guest agent"), ("hl.no-agent", b"button")])
def test_a_guest_is_asked_to_shut_down(user: User, name: str, images: Path, parameter: str, by: bytes) -> None:
    user("vm", "create", name, "--memory", "128M", *kernel_options(images, parameter), "--start")
    with user.on_terminal("vm", "console", name) as terminal:
        terminal.read_until(b'"boot":', ask=b"\nq1 ping\n")
        user("vm", "shutdown", name, "--timeout", "60")
        terminal.read_until(b"HOSTLER-GUEST POWEROFF " + by)
        terminal.read_until(b"the vm has ended")
        assert terminal.process.wait(30) == 0
    assert user("vm", "show", name)["state"] == "off"


def test_a_deaf_guest_is_left_running_or_turned_off_as_was_said(user: User, name: str, images: Path) -> None:
    user("vm", "create", name, "--memory", "128M", *kernel_options(images, "hl.deaf"), "--start")

    async def boot(guest: GuestSerial) -> str:
        return (await guest.ping()).boot

    born = ask(user, name, boot)
    problem = user.refused(ErrorCode.GUEST_REFUSED, 4, "vm", "shutdown", name, "--timeout", "1")
    assert "1 s" in problem["cause"] and "--then turn-off" in problem["advice"]
    assert user("vm", "show", name)["state"] == "running"
    assert ask(user, name, boot) == born
    user("vm", "shutdown", name, "--timeout", "1", "--then", "turn-off")
    assert user("vm", "show", name)["state"] == "off"
    assert user.host.processes() == []


def test_a_guest_that_shuts_itself_down_is_off(user: User, name: str, images: Path) -> None:
    user("vm", "create", name, "--memory", "128M", *kernel_options(images), "--start")

    async def end(guest: GuestSerial) -> None:
        await guest.poweroff()

    ask(user, name, end)
    user.until_state(name, "off")
    assert user("vm", "show", name)["reason"] is None
    assert user.host.processes() == []
