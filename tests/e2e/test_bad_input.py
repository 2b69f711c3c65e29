"""What people get wrong and what machines run out of: each a clear error with its code and exit code, and nothing left
behind: no file, no record, no claim, no process."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from userview import User, traces

from hostler.cli.main import main
from hostler.model.errors import ErrorCode as E
from hostler.testing.lab import Lab

pytestmark = pytest.mark.e2e

NEED_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
Refused = Callable[..., dict[str, object]]


@pytest.fixture(scope="module")
def lab(short_dir: Path) -> Iterator[Lab]:
    with Lab(short_dir, isolated=False) as made:
        made.add_host("a")
        yield made


@pytest.fixture(scope="module")
def user(lab: Lab) -> User:
    """On a host with a VM "known" that is off, with an adapter, and a VM "busy" that runs."""
    user = User(lab.hosts[0])
    user("vm", "create", "known", "--memory", "64M", "--nic", "user,mac=52:54:00:00:00:01")
    user("volume", "create", "taken", "1M")
    user("vm", "create", "busy", "--memory", "64M", "--disk", "taken", "--start")
    return user


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def damaged(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.fixture(scope="module")
def files(short_dir: Path) -> Path:
    """Files that are no good disk images, each in its own way."""
    folder = short_dir / "bad"
    folder.mkdir()
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    (folder / "empty").touch()
    (folder / "text").write_text("this is no disk image\n" * 100)
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    for name, options in {
        "l1.qcow2": ["-f", "qcow2"],
        "cut.qcow2": ["-f", "qcow2"],
        "header.vhdx": ["-f", "vhdx"],
        "cut.vhdx": ["-f", "vhdx"],
        "footer.vhd": ["-f", "vpc", "-o", "force_size=on"],
        "table.vhd": ["-f", "vpc", "-o", "force_size=on"],
        "fixed.vhd": ["-f", "vpc", "-o", "force_size=on,subformat=fixed"],
    }.items():
        qemu_img("create", *options, folder / name, "8M")
    damaged(folder / "l1.qcow2", 40, struct.pack(">Q", 2**60))  # the offset of its first table
    os.truncate(folder / "cut.qcow2", 70)
    damaged(folder / "header.vhdx", 64 * 1024, bytes(4096))
    damaged(folder / "header.vhdx", 128 * 1024, bytes(4096))
    os.truncate(folder / "cut.vhdx", 200 * 1024)
    damaged(folder / "footer.vhd", 64, b"\xff\xff\xff\xff")  # the checksum of the footer's copy at its start
    damaged(folder / "table.vhd", 512, b"notsparse")
    damaged(folder / "fixed.vhd", 8 * 1024**2 + 64, b"\xff\xff\xff\xff")
    qemu_img("create", "-f", "raw", folder / "base", "8M")
    qemu_img("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", folder / "backing.qcow2", "8M")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder}/data", folder / "data.qcow2", "8M")
    return folder


@pytest.fixture
def refused(user: User, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must fail in exactly this way, explain itself, and leave nothing."""
    monkeypatch.setenv("HOSTLER_HOST", user.host.socket)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(code: E, exit_code: int, *words: str) -> dict[str, object]:
        before = traces(user.host, files)
        capsys.readouterr()
        got = main([*words, "--json"])
        said = capsys.readouterr()
        assert got == exit_code, (words, got, said, user.host.tail(1500))
        problem: dict[str, object] = json.loads(said.err)
        assert problem["code"] == code, (words, problem)
        explained(problem)
        assert traces(user.host, files) == before
        return problem

    return run


def explained(problem: dict[str, object]) -> None:
    """It says what it is about, why, and (nearly always) what to do, in words for people."""
    object, cause = str(problem["object"]), str(problem["cause"])
    assert object and cause and not cause.endswith("."), problem
    for machine_talk in ("Errno", "Traceback", "Error(", "NoneType", "pydantic", "type=", "validation error"):
        assert machine_talk not in cause, problem


NAMES = [
    "",
    " ",
    "a/b",
    "../etc",
    " lead",
    "trail ",
    "two\nlines",
    "x" * 101,
    "..",
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names(refused: Refused, name: str) -> None:
    refused(E.INVALID_INPUT, 2, "vm", "create", name)
    refused(E.INVALID_INPUT, 2, "volume", "create", name, "1M")
    refused(E.INVALID_INPUT, 2, "vm", "rename", "known", name)


def test_names_that_are_taken(refused: Refused) -> None:
    refused(E.ALREADY_EXISTS, 4, "vm", "create", "known")
    refused(E.ALREADY_EXISTS, 4, "vm", "rename", "known", "busy")
    refused(E.ALREADY_EXISTS, 4, "volume", "create", "taken", "1M")


@pytest.mark.parametrize("size", ["0", "-5", "10X", "1.5", "513", "", "1e9", "0x10", "999999999999999999T"])
def test_sizes(refused: Refused, size: str) -> None:
    refused(E.INVALID_INPUT, 2, "volume", "create", "odd", size)
    refused(E.INVALID_INPUT, 2, "vm", "create", "odd", f"--memory={size}")


def test_above_a_limit(refused: Refused) -> None:
    for words in (
        ("volume", "create", "big", "100T"),
        ("volume", "create", "big", "2041G", "--format", "vhd"),
        ("vm", "create", "big", "--vcpus", "256"),
        ("vm", "create", "big", "--memory", "33T"),
        ("vm", "create", "big", *["--nic", "user"] * 25),
        ("vm", "set", "known", "--vcpus", "256"),
    ):
        problem = refused(E.LIMIT_EXCEEDED, 4, *words)
        assert "profile hostler" in str(problem["cause"])


def test_too_many_disks(refused: Refused, files: Path) -> None:
    disk = f"{files}/base,format=raw,read-only=yes"
    refused(E.LIMIT_EXCEEDED, 4, "vm", "create", "big", *["--disk", f"{disk},bus=ide"] * 5)
    refused(E.LIMIT_EXCEEDED, 4, "vm", "create", "big", *["--disk", disk] * 65)
    refused(E.INVALID_INPUT, 2, "vm", "create", "big", "--disk", f"{disk},controller=2")
    refused(E.INVALID_INPUT, 2, "vm", "create", "big", "--disk", f"{disk},unit=64")
    refused(E.IN_USE, 4, "vm", "create", "big", *["--disk", f"{disk},unit=7"] * 2)


@pytest.mark.parametrize(
    "words",
    [
        ("volume", "create", "x", "1M", "--format", "vmdk"),
        ("volume", "create", "x", "1M", "--path", ""),
        ("vm", "create", "x", "--no-such-option"),
        ("vm", "create", "x", "--disk", "taken,colour=red"),
        ("vm", "create", "x", "--nic", "bridge:"),
        ("vm", "create", "x", "--nic", "user,mac=01:00:5e:00:00:01"),
        ("vm", "create", "x", "--nic", "user,mac=hello"),
        ("vm", "create", "x", "--nic", "user,queues=0"),
        ("vm", "create", "x", "--secure-boot", "--kernel", "/boot/x", "--memory", "1"),
        ("disk", "add", "known"),
        ("disk", "add", "known", "--volume", "taken", "--device", "/dev/null"),
        ("disk", "add", "known", "--device", "/dev/null"),
        ("disk", "add", "known", "--volume", "taken", "--serial", "a b"),
        ("disk", "add", "busy", "--new", "1M", "--bus", "ide"),
        ("vm", "shutdown", "known", "--timeout", "0"),
        ("vm", "move", "known", "b", "--downtime-limit", "0"),
    ],
    ids=" ".join,
)
def test_options(refused: Refused, words: tuple[str, ...]) -> None:
    refused(E.INVALID_INPUT, 2, *words)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("vm", "show", "knwon"), "known"),
        (("vm", "start", "bsy"), "busy"),
        (("volume", "show", "takn"), "taken"),
        (("volume", "delete", "takn", "--yes"), "taken"),
        (("disk", "add", "known", "--volume", "takn"), "taken"),
        (("disk", "remove", "busy", "disk7"), "disk0"),
        (("nic", "remove", "known", "nic7"), "nic0"),
        (("job", "show", "00000000"), ""),
        (("vm", "move", "busy", "elsewhere"), ""),
        (("disk", "add", "known", "--device", "/dev/no-such-device"), ""),
        (("volume", "create", "x", "1M", "--path", "/no/such/directory/x"), ""),
        (("volume", "import", "x", "/no/such/file"), ""),
        (("vm", "create", "x", "--cdrom", "/no/such/file.iso"), ""),
        (("vm", "create", "x", "--kernel", "/no/such/kernel"), "/no/such/kernel"),
        (("vm", "create", "x", "--kernel", "/etc/passwd", "--initrd", "/no/such/initrd"), "/no/such/initrd"),
        (("vm", "set", "known", "--kernel", "/no/such/kernel"), "/no/such/kernel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_exist(refused: Refused, words: tuple[str, ...], near: str) -> None:
    problem = refused(E.NOT_FOUND, 3, *words)
    assert near in f"{problem['object']} {problem['cause']} {problem['advice']}"


BAD = {
    "l1.qcow2": E.BAD_IMAGE,
    "cut.qcow2": E.BAD_IMAGE,
    "header.vhdx": E.BAD_IMAGE,
    "cut.vhdx": E.BAD_IMAGE,
    "footer.vhd": E.BAD_IMAGE,
    "table.vhd": E.BAD_IMAGE,
    "fixed.vhd": E.BAD_IMAGE,
    "backing.qcow2": E.BAD_IMAGE,
    "data.qcow2": E.BAD_IMAGE,
    "directory": E.INVALID_INPUT,
    "fifo": E.INVALID_INPUT,
    "socket": E.INVALID_INPUT,
    "empty": E.INVALID_INPUT,
    "text": E.INVALID_INPUT,
    "dangling": E.NOT_FOUND,
    "loop": E.INVALID_INPUT,
    "/dev/null": E.INVALID_INPUT,
}
EXIT = {E.BAD_IMAGE: 1, E.INVALID_INPUT: 2, E.NOT_FOUND: 3}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_good_images(refused: Refused, files: Path, name: str) -> None:
    path, code = str(files / name), BAD[name]
    for words in (
        ("volume", "register", "x", path),
        ("volume", "import", "x", path),
        ("disk", "add", "known", "--volume", path),
        ("disk", "add", "busy", "--volume", path),
        ("vm", "create", "x", "--disk", path),
    ):
        refused(code, EXIT[code], *words)


def test_a_backing_file_is_named_and_never_opened(refused: Refused, files: Path) -> None:
    problem = refused(E.BAD_IMAGE, 1, "volume", "register", "x", str(files / "backing.qcow2"))
    assert "/etc/passwd" in str(problem["cause"])


def test_an_existing_file_is_never_overwritten(refused: Refused, files: Path) -> None:
    before = (files / "text").read_bytes()
    refused(E.ALREADY_EXISTS, 4, "volume", "create", "x", "1M", "--path", str(files / "text"))
    refused(E.ALREADY_EXISTS, 4, "volume", "import", "x", str(files / "base"), "--source-format", "raw",
            "--path", str(files / "text"))  # fmt: skip
    assert (files / "text").read_bytes() == before


def test_in_use(refused: Refused) -> None:
    refused(E.IN_USE, 4, "volume", "delete", "taken", "--yes")
    refused(E.IN_USE, 4, "vm", "create", "x", "--nic", "user,mac=52:54:00:00:00:01")
    refused(E.IN_USE, 4, "vm", "create", "x", *["--nic", "user,mac=52:54:00:00:00:02"] * 2)
    refused(E.IN_USE, 4, "disk", "add", "busy", "--volume", "taken")


@NEED_ROOT
def test_an_unknown_bridge(refused: Refused) -> None:
    problem = refused(E.HOST_LACKS, 1, "vm", "create", "x", "--nic", "bridge:nosuchbridge")
    assert "nosuchbridge" in f"{problem['object']} {problem['cause']}"
    refused(E.HOST_LACKS, 1, "nic", "add", "known", "bridge:nosuchbridge")


def test_a_file_that_went_away_since(user: User, files: Path) -> None:
    """Refused at the start, by name; the VM stays off and can be started once it is back."""
    image = files / "fickle"
    user("volume", "create", "fickle", "1M", "--path", str(image))
    user("vm", "create", "fickle", "--memory", "64M", "--disk", "fickle")
    image.rename(files / "away")
    before = traces(user.host)
    problem = user.refused(E.NOT_FOUND, 3, "vm", "start", "fickle")
    assert str(image) in problem["object"]
    assert traces(user.host) == before
    assert user("volume", "show", "fickle")["state"] == "missing"
    (files / "away").rename(image)
    user("vm", "start", "fickle")
    user("vm", "turn-off", "fickle")
    user("vm", "delete", "fickle", "--disks", "--yes")
    assert not image.exists()


def test_a_file_that_was_exchanged_since(user: User, files: Path) -> None:
    """What was a good image when the VM was made and refers to another file at its start is not opened."""
    image = files / "exchanged"
    user("volume", "create", "exchanged", "8M", "--path", str(image))
    user("vm", "create", "exchanged", "--memory", "64M", "--disk", "exchanged")
    image.write_bytes((files / "backing.qcow2").read_bytes())
    before = traces(user.host)
    user.refused(E.BAD_IMAGE, 1, "vm", "start", "exchanged")
    assert traces(user.host) == before
    user("vm", "delete", "exchanged", "--yes")
    user("volume", "delete", "exchanged", "--yes")
