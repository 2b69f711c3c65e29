"""What this host really offers: facts, probe, access control lists on its file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hostler.model.errors import HostLacks, NotFound, QemuFailed, TimedOut
from hostler.model.host import Accelerator
from hostler.qemu import accelerator, access, facts

pytestmark = pytest.mark.component

ROOT = os.geteuid() == 0
UID = 1_900_000_123
needs_root = pytest.mark.skipif(not ROOT, reason="becoming another user needs root")


async def test_facts_of_the_real_qemu() -> None:
    found = await facts.discover()
    assert os.path.isabs(found.binary)
    assert found.version.count(".") == 2
    assert found.machines and all(name.startswith("pc-q35-") for name in found.machines)
    assert found.default_cpu in found.cpu_models
    assert {"multifd", "xbzrle", "return-path"} <= set(found.migration_capabilities)
    assert found.tpm is (shutil.which("swtpm") is not None)
    for path in (found.firmware_code, found.firmware_vars, found.firmware_secure_code, found.firmware_secure_vars):
        assert path is None or os.path.isfile(path)


async def test_facts_are_asked_once_for_each_binary(tmp_path: Path) -> None:
    """A counting stand-in in front of the real QEMU: asked again only after a change or damage."""
    binary, count = tmp_path / "qemu", tmp_path / "count"
    real = shutil.which("qemu-system-x86_64")
    binary.write_text(f'#!/bin/sh\necho x >> {count}\nexec {real} "$@"\n')
    binary.chmod(0o755)
    cache = tmp_path / "cache"

    async def ask() -> int:
        found = await facts.discover(str(binary), cache_dir=str(cache))
        assert found.machines
        return count.read_text().count("x")

    assert [await ask(), await ask()] == [1, 1]
    os.utime(binary, (1, 1))
    assert [await ask(), await ask()] == [2, 2]
    for path in cache.iterdir():
        path.write_text('{"query-version"')
    assert [await ask(), await ask()] == [3, 3]
    assert [path.suffix for path in cache.iterdir()] == [".json", ".json"]


async def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert (await facts.discover(cache_dir=str(tmp_path / "file" / "cache"))).machines


async def test_a_qemu_that_hangs_is_killed_in_time(tmp_path: Path) -> None:
    binary, pid = tmp_path / "qemu", tmp_path / "pid"
    binary.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    binary.chmod(0o755)
    with pytest.raises(TimedOut, match="did not answer"):
        await facts.discover(str(binary), deadline=1)
    assert not os.path.exists(f"/proc/{pid.read_text().strip()}")


@pytest.mark.parametrize("program", ["false", "true", "cat"])
async def test_something_else_than_qemu_is_no_qemu(program: str) -> None:
    with pytest.raises(QemuFailed, match="gave no answer"):
        await facts.discover(program)


async def test_the_probe_runs_where_code_can_run() -> None:
    """Under TCG, which always works: the probe's own code is right."""
    assert await accelerator.probe(Accelerator.TCG, deadline=60) is None


async def test_a_probe_that_gets_nowhere_is_stopped_and_says_so(tmp_path: Path) -> None:
    binary, pid = tmp_path / "qemu", tmp_path / "pid"
    binary.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    binary.chmod(0o755)
    reason = await accelerator.probe(Accelerator.KVM, str(binary), deadline=1)
    assert reason is not None and "hung or crawled" in reason
    assert not os.path.exists(f"/proc/{pid.read_text().strip()}")


async def test_kvm_without_hardware_behind_it_is_not_chosen() -> None:
    """Whatever this machine is: KVM only with the flag *and* a probe that ran; never an error, always a reason."""
    flags = next(
        (line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), []
    )
    choice = await accelerator.choose(flags, deadline=20)
    assert choice.reason
    hardware = bool({"vmx", "svm"} & set(flags))
    assert choice.kind is Accelerator.TCG or hardware
    if not hardware:
        assert "neither vmx nor svm" in choice.reason


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm to try")
async def test_a_probe_under_this_machines_kvm_ends_in_time() -> None:
    """Either it ran, or there is a reason; where the processor cannot virtualize it must not look like success."""
    flags = Path("/proc/cpuinfo").read_text().split()
    reason = await accelerator.probe(Accelerator.KVM, deadline=2)
    if not {"vmx", "svm"} & set(flags):
        assert reason is not None


def as_user(uid: int, *command: str) -> int:
    """Exit status of a command run as that user."""
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    done = subprocess.run([*become, *command], capture_output=True, timeout=60, check=False)
    return done.returncode


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/") and str(directory).startswith("/tmp/"):
            directory.chmod(0o711)
    path = tmp_path / "disk.img"
    path.write_bytes(b"x")
    path.chmod(0o600)
    return path


@needs_root
def test_a_grant_opens_exactly_one_file_to_exactly_one_user(file: Path) -> None:
    reads = ("test", "-r", str(file))
    writes = ("test", "-w", str(file))
    assert as_user(UID, *reads) == 1
    access.check_reachable(str(file), UID)
    access.grant(str(file), UID, write=False)
    assert [as_user(UID, *reads), as_user(UID, *writes), as_user(UID + 1, *reads)] == [0, 1, 1]
    access.grant(str(file), UID, write=True)
    assert [as_user(UID, *reads), as_user(UID, *writes), as_user(UID + 1, *reads)] == [0, 0, 1]
    access.grant(str(file), UID + 1, write=False)
    access.revoke(str(file), UID)
    assert [as_user(UID, *reads), as_user(UID + 1, *reads)] == [1, 0]
    access.revoke(str(file), UID + 1)
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listxattr(file) == []


@needs_root
def test_our_lists_are_what_getfacl_reads_and_setfacl_writes(file: Path) -> None:
    subprocess.run(["setfacl", "-m", "u:33:rw,g:44:r,m::r", str(file)], check=True, timeout=60)
    access.grant(str(file), UID, write=True)
    shown = subprocess.run(["getfacl", "-cnpE", str(file)], check=True, timeout=60, capture_output=True, text=True)
    assert set(shown.stdout.split()) == {
        "user::rw-",
        "user:33:r--",
        f"user:{UID}:rw-",
        "group::---",
        "group:44:r--",
        "mask::rw-",
        "other::---",
    }


@needs_root
def test_a_block_device_node_takes_a_grant(tmp_path: Path) -> None:
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, os.makedev(7, 250))
    access.grant(str(node), UID, write=True)
    assert [e for e in access.decode(os.getxattr(node, "system.posix_acl_access")) if e.id == UID]
    access.revoke(str(node), UID)
    assert os.listxattr(node) == []


def test_granting_to_the_owner_and_revoking_nothing_change_nothing(file: Path) -> None:
    access.grant(str(file), os.geteuid(), write=True)
    access.revoke(str(file), UID)
    access.revoke(str(file.with_name("gone")), UID)
    assert os.listxattr(file) == []
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_missing_file_is_named(file: Path) -> None:
    for call in (lambda path: access.grant(path, UID, write=True), lambda path: access.check_reachable(path, UID)):
        with pytest.raises(NotFound, match="gone"):
            call(str(file.with_name("gone")))


def test_a_file_system_without_lists_is_named_with_the_way_out() -> None:
    with pytest.raises(HostLacks) as caught:
        access.grant("/proc/self/mem", UID + 1, write=True)
    assert "ACL" in caught.value.advice


def test_the_closed_directory_on_the_way_is_named_also_behind_a_link(file: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    inside = closed / "disk.img"
    inside.touch()
    link = tmp_path / "link.img"
    link.symlink_to(inside)
    for path in (inside, link):
        with pytest.raises(HostLacks) as caught:
            access.check_reachable(str(path), UID)
        assert f"chmod o+x {closed}" in caught.value.advice
    closed.chmod(0o711)
    for path in (inside, link):
        access.check_reachable(str(path), UID)


def test_prepared_directories_are_private_and_a_planted_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    access.prepare_directory(str(target), None)
    access.prepare_directory(str(target), None)
    assert target.stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((NotFound, HostLacks)):
        access.prepare_directory(str(tmp_path / "link"), None)
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o755
