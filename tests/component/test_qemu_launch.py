"""Real QEMU takes every kind of command line, as a user who may do nothing else, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from hostler.model.disk import Disk, ImageFormat
from hostler.model.errors import HostLacks, InUse, InvalidInput
from hostler.model.host import QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.mark import Part, mark
from hostler.model.nic import Network
from hostler.model.units import MiB
from hostler.model.vm import Firmware, Process
from hostler.qemu import access, cgroup, facts, launch, process, swtpm
from hostler.qemu.blockdev import export_name
from hostler.qemu.paths import RunDir, StateDir
from hostler.testing.raw_qmp import RawQmp
from hostler.testing.vm_variants import VARIANTS, config, volume

pytestmark = pytest.mark.component

ROOT = os.geteuid() == 0
UID = access.user_for("component tests", set()) if ROOT else None
GONE = 60.0
needs_root = pytest.mark.skipif(not ROOT, reason="changing users, taps and loop devices need root")

QEMU_IMG = {
    ImageFormat.RAW: ("raw",),
    ImageFormat.QCOW2: ("qcow2",),
    ImageFormat.VHD: ("vpc", "-o", "subformat=dynamic,force_size=on"),
    ImageFormat.VHD_FIXED: ("vpc", "-o", "subformat=fixed,force_size=on"),
    ImageFormat.VHDX: ("vhdx",),
}


@pytest.fixture
def room() -> Iterator[Path]:
    """A short directory (socket paths are short) that VMs' users can pass."""
    path = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> QemuFacts:
    return asyncio.run(facts.discover(cache_dir=str(tmp_path_factory.mktemp("cache"))))


@asynccontextmanager
async def running(spec: LaunchSpec, host: QemuFacts) -> AsyncIterator[Process]:
    qemu = await launch.launch(spec, host)
    try:
        yield qemu
    finally:
        await process.kill(qemu, GONE)
        await swtpm.stop(spec.run_dir)
        cgroup.remove(spec.config.id)


def place(spec: LaunchSpec, room: Path) -> LaunchSpec:
    """The specification with its files where this test may make them."""
    run_as = {"run_as": UID}
    return spec.but(run_dir=str(room / "run"), state_dir=str(room / "state"), config=spec.config.but(**run_as))


def image(room: Path, disk: Disk, uid: int | None = UID) -> Disk:
    """The disk with a real, empty image of its format behind it, open to the VM's user."""
    path = room / Path(disk.source.path).name
    driver, *options = QEMU_IMG[disk.source.format]
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", driver, *options, str(path), str(disk.source.size)], check=True, timeout=60
    )
    if uid is not None:
        access.grant(str(path), uid, disk.writes)
    return disk.but(source=disk.source.but(path=str(path)))


def sparse(room: Path, disk: Disk) -> Disk:
    """As `image`, for many raw disks: no program is started."""
    path = room / Path(disk.source.path).name
    with path.open("wb") as file:
        file.truncate(disk.source.size)
    if UID is not None:
        access.grant(str(path), UID, disk.writes)
    return disk.but(source=disk.source.but(path=str(path)))


async def accepts(spec: LaunchSpec, host: QemuFacts) -> None:
    """QEMU starts with it, says so, has no complaint, and quits when asked."""
    async with running(spec, host) as qemu:
        async with RawQmp(RunDir(spec.run_dir).qmp) as qmp:
            status = await qmp.ask("query-status")
            assert isinstance(status, dict)
            assert status["status"] == ("inmigrate" if spec.incoming else "prelaunch")
            assert process.find(spec.run_dir) == qemu
            await qmp.ask("quit")
        async with asyncio.timeout(GONE):
            await process.wait_gone(qemu)
    complaints = [line for line in process.last_output(spec.run_dir).splitlines() if "has no peer" not in line]
    assert complaints == []


PLAIN = ["bios", "uefi", "secure-boot", "tpm", "nics-24", "no-controllers", "incoming"]


@pytest.mark.parametrize("name", PLAIN)
async def test_qemu_accepts_the_golden_line(name: str, room: Path, host: QemuFacts) -> None:
    await accepts(place(VARIANTS[name], room), host)


async def test_qemu_accepts_255_processors(room: Path, host: QemuFacts) -> None:
    """With less memory than the golden line has: this machine need not have 2 TiB."""
    spec = place(VARIANTS["large"], room)
    await accepts(spec.but(config=spec.config.but(memory=256 * MiB)), host)


async def test_qemu_accepts_a_kernel(room: Path, host: QemuFacts) -> None:
    kernels = [path for path in glob.glob("/boot/vmlinuz-*") if os.access(path, os.R_OK)]
    if not kernels:
        pytest.skip("no readable kernel in /boot")
    spec = place(VARIANTS["kernel"], room)
    (room / "initrd.img").write_bytes(b"070701" + bytes(512))
    (room / "initrd.img").chmod(0o644)
    assert spec.config.kernel is not None
    kernel = spec.config.kernel.but(kernel=kernels[0], initrd=str(room / "initrd.img"))
    await accepts(spec.but(config=spec.config.but(kernel=kernel)), host)


async def test_qemu_accepts_256_disks(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["disks-4x64"], room)
    disks = tuple(sparse(room, disk) for disk in spec.config.disks)
    await accepts(spec.but(config=spec.config.but(disks=disks)), host)


@asynccontextmanager
async def served(disk: Disk, socket: str) -> AsyncIterator[None]:
    """The disk as an NBD export of a storage daemon, as the storage package serves dynamic VHD and VHDX."""
    path, name = disk.source.path, export_name(disk)
    daemon = await asyncio.create_subprocess_exec(
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=f,filename={path}"),
        *("--blockdev", "driver=vhdx,node-name=i,file=f"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", f"type=nbd,id=e,node-name=i,name={name},writable=on"),
        *("--chardev", "stdio,id=c", "--monitor", "chardev=c"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert daemon.stdout is not None
        async with asyncio.timeout(GONE):
            await daemon.stdout.readline()  # its greeting: everything before is set up
        os.chmod(socket, 0o666)
        yield
    finally:
        daemon.kill()
        await daemon.communicate()


async def test_qemu_accepts_every_format(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["formats"], room)
    disks = tuple(image(room, disk) for disk in spec.config.disks)
    spec = spec.but(config=spec.config.but(disks=disks), exports={"served": str(room / "nbd.sock")})
    one = spec.config.disk("served")
    assert one is not None
    async with served(one, str(room / "nbd.sock")):
        async with running(spec, host), RawQmp(RunDir(spec.run_dir).qmp) as qmp:
            nodes = await qmp.ask("query-named-block-nodes", flat=True)
            assert isinstance(nodes, list)
            sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes if isinstance(node, dict)}
            wanted = {disk.id: disk.source.size for disk in disks}
            assert {name: sizes[name] for name in wanted} == wanted
        assert process.last_output(spec.run_dir) == ""


@pytest.fixture
def loop_device(room: Path) -> Iterator[str]:
    """A block device of the host, open to the VM's user."""
    (room / "backing").write_bytes(bytes(16 * MiB))
    command = ["losetup", "--find", "--show", str(room / "backing")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    assert UID is not None
    access.grant(device, UID, write=True)
    yield device
    access.revoke(device, UID)
    subprocess.run(["losetup", "--detach", device], check=True, timeout=60)


@needs_root
async def test_qemu_accepts_a_passed_through_device(room: Path, host: QemuFacts, loop_device: str) -> None:
    spec = place(VARIANTS["pass-through"], room)
    disk = spec.config.disks[0]
    disk = disk.but(source=disk.source.but(path=loop_device))
    await accepts(spec.but(config=spec.config.but(disks=(disk,))), host)


@pytest.fixture
def taps() -> Iterator[dict[str, str]]:
    """The taps of the variant "nics", made for the VM's user: one queue, and several."""
    names = {nic.id: f"hq{nic.id[-1]}x{os.getpid()}" for nic in VARIANTS["nics"].config.nics if nic.bridge}
    try:
        for nic in VARIANTS["nics"].config.nics:
            if nic.id in names:
                command = ["ip", "tuntap", "add", names[nic.id], "mode", "tap", "user", str(UID), "vnet_hdr"]
                command += ["multi_queue"] if nic.queues > 1 else []
                made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
                if made.returncode:
                    pytest.skip(f"no tap interfaces: {made.stderr.strip()}")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "link", "delete", name], capture_output=True, timeout=60, check=False)


@needs_root
async def test_qemu_accepts_taps_made_for_its_user(room: Path, host: QemuFacts, taps: dict[str, str]) -> None:
    await accepts(place(VARIANTS["nics"], room).but(taps=taps), host)


async def test_an_unplugged_adapter_and_a_user_network_need_no_right(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["nics"], room)
    nics = tuple(nic for nic in spec.config.nics if nic.network is not Network.BRIDGE)
    await accepts(spec.but(config=spec.config.but(nics=nics)), host)


@needs_root
async def test_qemu_has_no_right_but_its_own_files(room: Path, host: QemuFacts) -> None:
    """Another user, no capability, no new privileges, system calls filtered; a file it was not given stays closed."""
    spec = place(VARIANTS["bios"], room)
    async with running(spec, host) as qemu, RawQmp(RunDir(spec.run_dir).qmp) as qmp:
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{qemu.pid}/status").read_text().splitlines())
        assert set(fields["Uid"].split()) == set(fields["Gid"].split()) == {str(UID)}
        assert set(fields["Groups"].split()) - {str(UID)} == {str(mark(spec.run_dir, Part.MACHINE))}
        assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        assert os.getsid(qemu.pid) == qemu.pid
        assert os.readlink(f"/proc/{qemu.pid}/cwd") == "/"

        mine = sparse(room, Disk(id="mine", source=volume(name="mine.img")))
        theirs = room / "theirs.img"
        theirs.write_bytes(bytes(MiB))
        theirs.chmod(0o600)
        await qmp.ask("blockdev-add", driver="file", node_name="mine", filename=mine.source.path)
        with pytest.raises(RuntimeError, match="Permission denied"):
            await qmp.ask("blockdev-add", driver="file", node_name="theirs", filename=str(theirs))

        assert UID is not None
        await qmp.ask("blockdev-del", node_name="mine")
        access.revoke(mine.source.path, UID)
        with pytest.raises(RuntimeError, match="Permission denied"):
            await qmp.ask("blockdev-add", driver="file", node_name="mine", filename=mine.source.path)


async def test_files_of_a_vm_are_closed_to_others(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["uefi"], room)
    async with running(spec, host), RawQmp(RunDir(spec.run_dir).qmp) as qmp:
        await qmp.ask("query-status")
        for directory in (room / "run", room / "state"):
            assert directory.stat().st_mode & 0o777 == 0o700
            assert UID is None or directory.stat().st_uid == UID
            assert [path.name for path in directory.iterdir() if path.stat().st_mode & 0o077 and path.is_file()] == []


async def test_a_qemu_that_cannot_start_says_why_in_its_log(room: Path, host: QemuFacts) -> None:
    disk = Disk(id="gone", source=volume(name="gone.img"))
    spec = place(VARIANTS["bios"], room)
    spec = spec.but(config=spec.config.but(disks=(disk.but(source=disk.source.but(path=str(room / "gone.img"))),)))
    qemu = await launch.launch(spec, host)
    async with asyncio.timeout(GONE):
        await process.wait_gone(qemu)
    assert "gone.img" in process.last_output(spec.run_dir)
    assert "No such file" in process.last_output(spec.run_dir)
    with pytest.raises(OSError):  # refused or reset, whichever comes first; but never a wait
        async with RawQmp(RunDir(spec.run_dir).qmp):
            pass
    cgroup.remove(spec.config.id)


async def test_the_same_vm_is_not_started_twice(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["bios"], room)
    async with running(spec, host) as qemu:
        with pytest.raises(InUse) as caught:
            await launch.launch(spec, host)
        assert caught.value.details["holder"] == f"process {qemu.pid}"
        assert process.is_alive(qemu)


async def test_a_failed_launch_leaves_no_process(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["tpm"], room)
    with pytest.raises(HostLacks, match="not installed"):
        await launch.launch(spec, host.but(binary="/nonexistent/qemu"))
    assert swtpm.find(spec.run_dir) is None
    assert process.find(spec.run_dir) is None
    assert not os.path.exists(RunDir(spec.run_dir).qmp)


@pytest.mark.parametrize("name", ["bios", "tpm"])
async def test_a_cancelled_launch_leaves_no_process(
    name: str, room: Path, host: QemuFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled in its last step, when QEMU runs already."""
    spec = place(VARIANTS[name], room)
    there, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def join(vm_id: str, pid: int) -> None:
        loop.call_soon_threadsafe(there.set)
        go_on.wait(GONE)

    monkeypatch.setattr(cgroup, "join", join)
    task = asyncio.create_task(launch.launch(spec, host))
    async with asyncio.timeout(GONE):
        await there.wait()
    assert process.find(spec.run_dir) is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert process.find(spec.run_dir) is None
    assert swtpm.find(spec.run_dir) is None


async def test_a_run_directory_too_long_for_sockets_is_refused_untouched(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["bios"], room).but(run_dir=str(room / ("r" * 100)))
    with pytest.raises(InvalidInput, match="107"):
        await launch.launch(spec, host)
    assert list(room.iterdir()) == []


@needs_root
async def test_a_state_directory_the_user_cannot_reach_is_named(room: Path, host: QemuFacts) -> None:
    (room / "private").mkdir(mode=0o700)
    spec = place(VARIANTS["bios"], room).but(state_dir=str(room / "private" / "state"))
    with pytest.raises(HostLacks) as caught:
        await launch.launch(spec, host)
    assert f"{room}/private" in caught.value.advice
    assert process.find(spec.run_dir) is None


async def test_the_tpm_lives_and_ends_with_its_qemu(room: Path, host: QemuFacts) -> None:
    spec = place(VARIANTS["tpm"], room)
    async with running(spec, host), RawQmp(RunDir(spec.run_dir).qmp) as qmp:
        found = await qmp.ask("query-tpm")
        assert isinstance(found, list) and len(found) == 1
        tpm = swtpm.find(spec.run_dir)
        assert tpm is not None
        assert UID is None or os.stat(f"/proc/{tpm.pid}").st_uid == UID
        await qmp.ask("quit")
        async with asyncio.timeout(GONE):
            await process.wait_gone(tpm)
    assert swtpm.find(spec.run_dir) is None


async def test_uefi_firmware_runs_and_keeps_its_variables(room: Path, host: QemuFacts) -> None:
    """OVMF, with nothing to boot, tells so on the serial line; by then it has written its boot entries."""
    spec = place(VARIANTS["uefi"], room)
    store = Path(StateDir(spec.state_dir).uefi_vars)
    async with running(spec, host), RawQmp(RunDir(spec.run_dir).qmp) as qmp:
        fresh = store.read_bytes()
        reader, writer = await asyncio.open_unix_connection(RunDir(spec.run_dir).serial)
        await qmp.ask("cont")
        await reader.readuntil(b"BdsDxe")
        writer.close()
    changed = store.read_bytes()
    assert len(changed) == len(fresh)
    assert changed != fresh

    async with running(spec, host), RawQmp(RunDir(spec.run_dir).qmp) as qmp:
        await qmp.ask("query-status")
        assert store.read_bytes() == changed


def test_a_variable_store_is_never_made_over_or_half(room: Path, host: QemuFacts) -> None:
    path = str(room / "vars.fd")
    (room / "vars.fd.new").write_bytes(b"half of an earlier try")
    assert host.firmware_vars is not None
    launch.copy_variable_store(host.firmware_vars, path, UID)
    assert Path(path).read_bytes() == Path(host.firmware_vars).read_bytes()
    Path(path).write_bytes(b"mine")
    launch.copy_variable_store(host.firmware_vars, path, UID)
    assert Path(path).read_bytes() == b"mine"
    assert [entry.name for entry in room.iterdir()] == ["vars.fd"]
    with pytest.raises(Exception, match="does not exist"):
        launch.copy_variable_store(str(room / "no-template"), str(room / "other.fd"), UID)
    assert [entry.name for entry in room.iterdir()] == ["vars.fd"]


async def test_a_saved_machine_is_taken_by_the_same_line_elsewhere(room: Path, host: QemuFacts) -> None:
    """The migration stream of one QEMU fits another started from the same configuration in other directories: sandbox,
    iothreads, TPM and variable store included."""
    vm = config(firmware=Firmware.UEFI, tpm=True, vcpus=2, run_as=UID, scsi_controllers=2)
    first = VARIANTS["bios"].but(config=vm, run_dir=str(room / "a"), state_dir=str(room / "sa"))
    second = first.but(run_dir=str(room / "b"), state_dir=str(room / "sb"), incoming=True)
    address = f"unix:{room}/b/stream.sock"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(first, host))
        await stack.enter_async_context(running(second, host))
        source = await stack.enter_async_context(RawQmp(RunDir(first.run_dir).qmp))
        target = await stack.enter_async_context(RawQmp(RunDir(second.run_dir).qmp))
        for side in (source, target):
            await side.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await source.ask("cont")
        await target.ask("migrate-incoming", uri=address)
        await source.ask("migrate", uri=address)
        await source.event("MIGRATION", status="completed")
        await target.event("MIGRATION", status="completed")
        assert await status(target) == "paused"
        assert process.last_output(second.run_dir) == ""


async def status(qmp: RawQmp) -> object:
    answer = await qmp.ask("query-status")
    return answer["status"] if isinstance(answer, dict) else None
