"""A VM with a dynamic VHD or a VHDX moves between two real QEMUs: through exports nothing blocks it, and at the target
the image is there when the guest runs on."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.units import MiB
from hostler.storage.exports import Exports
from hostler.storage.qemu_img import QemuImg
from hostler.storage.qmp import QmpGone, QmpLines, QmpRefused, conversation

pytestmark = pytest.mark.component

SIZE = 64 * MiB
DRIVER = {ImageFormat.VHD: "vpc", ImageFormat.VHDX: "vhdx"}


@pytest.fixture
def here() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hx"))
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def qemu(directory: Path, node: dict[str, object], *more: str) -> AsyncIterator[QmpLines]:
    """A stopped VM with that node on virtio-scsi, and a conversation with it."""
    control = str(directory / "qmp")
    argv = [
        "stdbuf",
        "-oL",
        "qemu-system-x86_64",
        "-machine",
        "q35",
        "-accel",
        "tcg",
        "-m",
        "64",
        "-display",
        "none",
        "-S",
    ]
    argv += ["-nodefaults", "-no-user-config", "-qmp", f"unix:{control},server=on,wait=off"]
    argv += ["-blockdev", json.dumps(node), "-device", "virtio-scsi-pci,id=s0"]
    argv += ["-device", "scsi-hd,id=d0,bus=s0.0,drive=disk,share-rw=on", *more]
    with (directory / "out").open("w") as out:
        process = await asyncio.create_subprocess_exec(*argv, stdout=out, stderr=asyncio.subprocess.PIPE)
    try:
        async with AsyncExitStack() as stack:
            yield await stack.enter_async_context(await answering(control, process))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def answering(control: str, process: asyncio.subprocess.Process):  # type: ignore[no-untyped-def]
    async with asyncio.timeout(60):
        while process.returncode is None:
            try:
                async with conversation(control):
                    return conversation(control)
            except QmpGone:
                await asyncio.sleep(0.05)
    assert process.stderr is not None
    raise AssertionError((await process.stderr.read()).decode())


def nbd(socket: str) -> dict[str, object]:
    server = {"type": "unix", "path": socket}
    return {"driver": "nbd", "node-name": "disk", "server": server, "export": "scsi0-0", "reconnect-delay": 60}


async def io(qmp: QmpLines, directory: Path, *commands: str) -> None:
    """I/O of the VM's disk, done by QEMU itself through the device's own back end. It prints what came of it."""
    for command in commands:
        before = len((directory / "out").read_text())
        refused = await qmp.execute("human-monitor-command", command_line=f'qemu-io -d d0 "{command}"')
        text = (directory / "out").read_text()[before:]
        assert refused == ""
        assert "failed" not in text
        assert "1048576/1048576 bytes" in text


async def migrate(qmp: QmpLines, uri: str) -> str:
    await qmp.execute("migrate", uri=uri)
    async with asyncio.timeout(60):
        while True:
            status = (await qmp.execute("query-migrate")).get("status")
            if status in ("completed", "failed"):
                return str(status)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("format", sorted(DRIVER))
async def test_the_formats_block_migration_without_an_export(here: Path, format: ImageFormat) -> None:
    """The reason for all this; when a QEMU comes that can do it, exports may go."""
    path = str(here / "image")
    await QemuImg().create(path, format, SIZE)
    node = {"driver": DRIVER[format], "node-name": "disk", "file": {"driver": "file", "filename": path}}
    async with qemu(here, node) as vm:
        with pytest.raises(QmpRefused, match="does not support live migration"):
            await migrate(vm, f"unix:{here}/stream")


@pytest.mark.parametrize("format", sorted(DRIVER))
async def test_there_and_back(here: Path, format: ImageFormat) -> None:
    path = str(here / "image")
    await QemuImg().create(path, format, SIZE)
    disk = Disk(id="scsi0-0", source=DiskSource(path=path, format=format, size=SIZE))
    exports, directories = Exports(), [here / "a", here / "b", here / "c"]
    for directory in directories:
        directory.mkdir()
    try:
        await hop(exports, directories, disk)
    finally:
        for directory in directories:
            await exports.stop(str(directory), disk.id)


async def hop(exports: Exports, directories: Sequence[Path], disk: Disk) -> None:
    """Move through all directories, write in each, and read at each what the ones before wrote."""
    async with AsyncExitStack() as stack:
        first = await exports.start(str(directories[0]), disk)
        vm, at = await stack.enter_async_context(qemu(directories[0], nbd(first))), directories[0]
        written: list[str] = []
        for index, directory in enumerate(directories):
            if index > 0:
                socket = await exports.start(str(directory), disk, placeholder=True)
                uri = f"unix:{directory}/stream"
                target = await stack.enter_async_context(qemu(directory, nbd(socket), "-incoming", uri))
                assert await migrate(vm, uri) == "completed"
                await exports.close_image(str(directories[index - 1]), disk)
                await exports.open_image(str(directory), disk)
                vm, at = target, directory
            await io(vm, at, *[f"read {what}" for what in written])
            written.append(f"-P {index + 1} {index}M 1M")
            await io(vm, at, f"write {written[-1]}")
