"""Exports with the real qemu-storage-daemon; the client is qemu-io, or a QEMU that migrates."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import images
import pytest

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import BadImage, HostLacks, InUse, InvalidInput, NotFound, NotPermitted, QemuFailed
from hostler.model.mark import Part, mark
from hostler.model.units import MiB
from hostler.storage.export_process import find_all, find_process
from hostler.storage.exports import Exports
from hostler.storage.qemu_img import QemuImg
from hostler.storage.qmp import QmpGone, conversation

pytestmark = pytest.mark.component

SIZE = 64 * MiB
BOTH = pytest.mark.parametrize("format", [ImageFormat.VHD, ImageFormat.VHDX])


@pytest.fixture
def here() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="hx"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def exports(here: Path) -> AsyncIterator[Exports]:
    service = Exports()
    yield service
    for run_dir in here.iterdir():
        for disk in await service.find(str(run_dir)):
            await service.stop(str(run_dir), disk)


async def make(here: Path, format: ImageFormat, **changes: Any) -> Disk:
    path = str(here / f"image.{format}")
    await QemuImg().create(path, format, SIZE)
    return Disk(id="scsi0-0", source=DiskSource(path=path, format=format, size=SIZE)).but(**changes)


def run_dir(here: Path, name: str) -> str:
    (here / name).mkdir()
    return str(here / name)


def qemu_io(socket: str, *commands: str, flags: Sequence[str] = ()) -> str:
    """Runs them one after the other; their output."""
    argv = ["qemu-io", "-f", "raw", *flags]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run(
        [*argv, f"nbd+unix:///scsi0-0?socket={socket}"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


class QemuIo:
    """A qemu-io that stays connected, with reconnect-delay, as a VM's QEMU does."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()
        return await self.answer()

    async def answer(self) -> str:
        """What it says until it prompts for the next command."""
        assert self._process.stdout is not None
        text = ""
        async with asyncio.timeout(60):
            while not text.endswith("qemu-io> "):
                piece = await self._process.stdout.read(4096)
                assert piece, f"qemu-io ended: {text}"
                text += piece.decode()
        return text


@asynccontextmanager
async def connected(socket: str) -> AsyncIterator[QemuIo]:
    node = {"driver": "nbd", "server": {"type": "unix", "path": socket}, "export": "scsi0-0", "reconnect-delay": 30}
    process = await asyncio.create_subprocess_exec(
        "stdbuf",  # it would keep its answers until its pipe's buffer is full
        "-o0",
        "qemu-io",
        f"json:{json.dumps({'driver': 'raw', 'file': node})}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        client = QemuIo(process)
        await client.answer()
        yield client
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@BOTH
async def test_what_is_written_through_the_export_is_in_the_image(
    here: Path, exports: Exports, format: ImageFormat
) -> None:
    disk = await make(here, format)
    directory = run_dir(here, "vm")
    socket = await exports.start(directory, disk)
    assert socket == exports.socket(directory, disk.id)
    assert await exports.serves(directory, disk.id) == "image"
    assert "wrote" in qemu_io(socket, "write -P 7 1M 64k", "flush")
    await exports.stop(directory, disk.id)
    assert os.listdir(directory) == []
    await exports.stop(directory, disk.id)
    again = await exports.start(directory, disk)
    assert "Pattern verification failed" not in qemu_io(again, "read -P 7 1M 64k", "read -P 0 2M 64k")


@BOTH
async def test_a_client_survives_the_swap_and_every_byte_is_where_it_belongs(
    here: Path, exports: Exports, format: ImageFormat
) -> None:
    """The whole hand-over: the source writes, closes; the target's client, connected to the placeholder before,
    finds the data; then back again."""
    disk = await make(here, format)
    source, target = run_dir(here, "a"), run_dir(here, "b")
    async with connected(await exports.start(source, disk)) as there:
        assert "wrote" in await there.run("write -P 1 0 1M")
        async with connected(await exports.start(target, disk, placeholder=True)) as here_:
            assert await exports.serves(target, disk.id) == "placeholder"
            assert "read 65536" in await here_.run("read -P 0 0 64k")
            with pytest.raises(InUse):
                await exports.open_image(target, disk)
            assert await exports.serves(target, disk.id) == "placeholder"
            assert "wrote" in await there.run("write -P 2 1M 1M")
            await exports.close_image(source, disk)
            await exports.open_image(target, disk)
            assert await exports.serves(target, disk.id) == "image"
            for command in ("read -P 1 0 1M", "read -P 2 1M 1M", "read -P 0 2M 1M"):
                assert "verification failed" not in await here_.run(command)
            assert "wrote" in await here_.run("write -P 3 2M 1M")
            await exports.close_image(target, disk)
        await exports.open_image(source, disk)
        for command in ("read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M"):
            text = await there.run(command)
            assert "verification failed" not in text
            assert "read 1048576" in text


async def test_io_during_the_swap_waits_and_is_done_afterwards(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory = run_dir(here, "vm")
    async with connected(await exports.start(directory, disk)) as client:
        await client.run("write -P 1 0 64k")
        await exports.close_image(directory, disk)
        assert await exports.serves(directory, disk.id) is None
        writing = asyncio.create_task(client.run("write -P 2 64k 64k"))
        await asyncio.sleep(0.2)  # lets it fail into its reconnecting; the outcome does not depend on it
        await exports.open_image(directory, disk)
        assert "wrote 65536" in await writing
        assert "verification failed" not in await client.run("read -P 2 64k 64k")


async def test_a_placeholder_refuses_writes_and_leaves_the_image_alone(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHD)
    before = Path(disk.source.path).read_bytes()
    socket = await exports.start(run_dir(here, "vm"), disk, placeholder=True)
    for command in ("write -P 1 0 64k", "write -z 0 64k"):
        assert "Input/output error" in qemu_io(socket, command)
    assert Path(disk.source.path).read_bytes() == before


async def test_everything_may_be_repeated(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory = run_dir(here, "vm")
    await exports.close_image(directory, disk)
    assert await exports.serves(directory, disk.id) is None
    for _ in range(2):
        await exports.start(directory, disk, placeholder=True)
    assert await exports.serves(directory, disk.id) == "placeholder"
    for _ in range(2):
        await exports.open_image(directory, disk)
        assert await exports.serves(directory, disk.id) == "image"
    for _ in range(2):
        await exports.close_image(directory, disk)
        assert await exports.serves(directory, disk.id) is None
    await asyncio.gather(*(exports.open_image(directory, disk) for _ in range(5)))
    assert await exports.serves(directory, disk.id) == "image"


async def test_two_exports_never_have_the_same_image_open(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHD)
    await exports.start(run_dir(here, "a"), disk)
    other = run_dir(here, "b")
    with pytest.raises(InUse):
        await exports.start(other, disk)
    assert os.listdir(other) == []
    assert await exports.find(other) == ()


async def test_read_only_disks_are_exported_read_only_and_can_be_shared(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHD, read_only=True)
    first = await exports.start(run_dir(here, "a"), disk)
    second = await exports.start(run_dir(here, "b"), disk)
    for socket in (first, second):
        assert "read 65536" in qemu_io(socket, "read 0 64k", flags=["-r"])
        assert "wrote" not in qemu_io(socket, "write 0 64k")


async def test_another_daemon_finds_and_uses_what_the_first_one_started(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory = run_dir(here, "vm")
    socket = await exports.start(directory, disk)
    pid = find_process(f"{directory}/x-{disk.id}.qmp")
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    another = Exports()
    assert await another.find(directory) == (disk.id,)
    assert await another.serves(directory, disk.id) == "image"
    assert await another.start(directory, disk) == socket
    assert find_process(f"{directory}/x-{disk.id}.qmp") == pid
    await another.stop(directory, disk.id)
    assert await exports.find(directory) == ()


async def test_a_killed_process_is_replaced_and_its_client_goes_on(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory = run_dir(here, "vm")
    async with connected(await exports.start(directory, disk)) as client:
        assert "wrote" in await client.run("write -P 1 0 64k")
        await client.run("flush")
        await kill(directory, disk)
        with pytest.raises(QemuFailed):
            await exports.open_image(directory, disk)
        assert await exports.find(directory) == ()
        await exports.start(directory, disk)
        assert "verification failed" not in await client.run("read -P 1 0 64k")


async def kill(directory: str, disk: Disk) -> None:
    control = f"{directory}/x-{disk.id}.qmp"
    pid = find_process(control)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while find_process(control) is not None:  # noqa: ASYNC110 - another process' end
            await asyncio.sleep(0.01)


async def test_a_stopped_process_is_ended_all_the_same(
    here: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await make(here, ImageFormat.VHD)
    directory = run_dir(here, "vm")
    await exports.start(directory, disk)
    pid = find_process(f"{directory}/x-{disk.id}.qmp")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr("hostler.storage.export_process.GRACE", 0.2)
    monkeypatch.setattr("hostler.storage.qmp.DEADLINE", 0.5)
    with pytest.raises(QmpGone):
        async with conversation(f"{directory}/x-{disk.id}.qmp"):
            pass
    await exports.stop(directory, disk.id)
    assert find_process(f"{directory}/x-{disk.id}.qmp") is None


async def test_a_file_that_claims_another_process_ends_nobody(here: Path, exports: Exports) -> None:
    """The run directory belongs to the VM's user: what stands in it must not turn the daemon against others."""
    directory = run_dir(here, "vm")
    Path(directory, "x-scsi0-0.pid").write_text(f"{os.getppid()}\n")
    server = await asyncio.start_unix_server(lambda r, w: w.close(), f"{directory}/x-scsi0-0.qmp")
    assert await exports.find(directory) == ()
    await exports.stop(directory, "scsi0-0")
    server.close()
    assert os.listdir(directory) == []


async def test_a_vhdx_left_by_a_crash_is_repaired_when_it_is_opened_for_writing(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    images.leave_log(disk.source.path)
    with pytest.raises(BadImage, match="log"):
        await exports.start(run_dir(here, "reader"), disk.but(read_only=True))
    assert os.listdir(here / "reader") == []
    socket = await exports.start(run_dir(here, "vm"), disk)
    assert "wrote" in qemu_io(socket, "write -P 1 0 64k")


async def test_a_process_whose_sockets_were_removed_is_still_ended(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory, other = run_dir(here, "vm,1"), run_dir(here, "vm,12")
    await exports.start(directory, disk)
    await exports.start(other, disk.but(id="scsi0-1", read_only=True, source=await another(here)))
    for name in os.listdir(directory):
        os.unlink(f"{directory}/{name}")
    assert await exports.find(directory) == ()
    await exports.stop_all(directory)
    assert find_all(directory) == {}
    assert await exports.find(other) == ("scsi0-1",)
    await exports.start(directory, disk)
    await exports.stop_all(directory)
    assert os.listdir(directory) == []


async def another(here: Path) -> DiskSource:
    path = str(here / "another.vhd")
    await QemuImg().create(path, ImageFormat.VHD, SIZE)
    return DiskSource(path=path, format=ImageFormat.VHD, size=SIZE)


async def test_a_link_to_another_vms_socket_leads_nowhere(here: Path, exports: Exports) -> None:
    """The VM's user may put one into its own run directory."""
    disk = await make(here, ImageFormat.VHDX)
    victim, attacker = run_dir(here, "victim"), run_dir(here, "attacker")
    await exports.start(victim, disk)
    os.symlink(f"{victim}/x-{disk.id}.qmp", f"{attacker}/x-{disk.id}.qmp")
    assert await exports.find(attacker) == ()
    with pytest.raises(QemuFailed):
        await exports.open_image(attacker, disk)
    await exports.close_image(attacker, disk)
    await exports.stop(attacker, disk.id)
    assert await exports.serves(victim, disk.id) == "image"
    with pytest.raises(QmpGone, match="another process"):
        async with conversation(f"{victim}/x-{disk.id}.qmp", os.getpid()):
            pass


async def test_an_image_of_another_size_is_not_served(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    wrong = disk.but(source=disk.source.but(size=SIZE // 2))
    directory = run_dir(here, "vm")
    await exports.start(directory, wrong, placeholder=True)
    with pytest.raises(BadImage):
        await exports.open_image(directory, wrong)
    assert await exports.serves(directory, disk.id) == "placeholder"
    with pytest.raises(BadImage):
        await exports.start(run_dir(here, "b"), wrong)
    assert os.listdir(here / "b") == []


async def test_bad_input_leaves_nothing(here: Path, exports: Exports) -> None:
    disk = await make(here, ImageFormat.VHDX)
    directory = run_dir(here, "vm")
    Path(disk.source.path).write_bytes(b"no image")
    with pytest.raises(BadImage):
        await exports.start(directory, disk)
    Path(disk.source.path).unlink()
    with pytest.raises(NotFound):
        await exports.start(directory, disk)
    with pytest.raises(InvalidInput):
        await exports.start(directory + "/" + "x" * 100, disk)
    with pytest.raises(InvalidInput):
        await exports.start(directory, disk.but(source=disk.source.but(size=0)))
    with pytest.raises(HostLacks):
        await Exports("no-such-storage-daemon").start(directory, disk)
    with pytest.raises(QemuFailed):
        await exports.start(directory + "/missing", disk)
    assert os.listdir(directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
async def test_as_root_it_runs_as_the_vms_user_and_reaches_only_its_files(here: Path, exports: Exports) -> None:
    uid = 64_123
    disk = await make(here, ImageFormat.VHD)
    here.chmod(0o711)
    directory = run_dir(here, "vm")
    os.chown(directory, uid, uid)
    with pytest.raises(NotPermitted):
        await exports.start(directory, disk, run_as=uid)
    os.chown(disk.source.path, uid, uid)
    await exports.start(directory, disk, run_as=uid)
    pid = find_process(f"{directory}/x-{disk.id}.qmp")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    assert status["Uid"].split() == status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].split() == [str(mark(directory, Part.EXPORT))]
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
