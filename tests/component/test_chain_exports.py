"""Chains served over NBD by the real process, read by QEMU's and libnbd's clients; found and ended by other daemons."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import chain_images
import pytest

from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import BadImage, InUse
from hostler.storage.chains.nbd_handshake import MAX_READ
from hostler.storage.export_process import find_process
from hostler.storage.exports import Exports
from hostler.testing.inprocess import short_directory

pytestmark = pytest.mark.component

ROOT = os.geteuid() == 0
USER = 61_234


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with short_directory() as directory:
        directory.chmod(0o711)
        made = directory / "r"
        made.mkdir(mode=0o700)
        if ROOT:
            os.chown(made, USER, USER)
        yield made


@pytest.fixture
def export(tmp_path: Path) -> Path:
    place = tmp_path / "export"
    place.mkdir(mode=0o700)
    return place


def disk_over(top: Path, size: int) -> Disk:
    return Disk(id="d0", source=DiskSource(kind=SourceKind.CHAIN, path=str(top), size=size), read_only=True)


def uri(sock: str) -> str:
    return f"nbd+unix:///d0?socket={sock}"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("make", [chain_images.vhd_chain, chain_images.vhdx_chain])
async def test_qemu_reads_it_and_nobody_writes_it(tmp_path: Path, export: Path, run_dir: Path, make: object) -> None:
    assert callable(make)
    top, disk = make(export)
    before = {path: path.read_bytes() for path in export.iterdir()}
    exports = Exports()
    sock = await exports.start(str(run_dir), disk_over(top, len(disk)), USER)
    try:
        raw = tmp_path / "raw"
        raw.write_bytes(disk)
        compared = run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(sock), str(raw))
        assert compared.returncode == 0, compared.stdout + compared.stderr
        mapped = run("qemu-img", "map", "--output=json", uri(sock))
        extents = json.loads(mapped.stdout)
        assert sum(one["length"] for one in extents) == len(disk)
        assert top.suffix == ".avhd" or {one["zero"] for one in extents} == {True, False}
        written = run("qemu-io", "-f", "raw", "-c", "write 0 4k", uri(sock))
        assert written.returncode != 0
    finally:
        await exports.stop(str(run_dir), "d0")
    assert {path: path.read_bytes() for path in export.iterdir()} == before
    assert list(run_dir.iterdir()) == []


async def test_libnbd_understands_it(export: Path, run_dir: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    exports = Exports()
    sock = await exports.start(str(run_dir), disk_over(top, len(disk)), USER)
    try:
        said = run("nbdinfo", "--json", uri(sock))
        (found,) = json.loads(said.stdout)["exports"]
        assert (found["export-size"], found["is_read_only"], found["contexts"]) == (
            len(disk),
            True,
            ["base:allocation"],
        )
        assert json.loads(said.stdout)["structured"] is True
        listed = run("nbdinfo", "--list", f"nbd+unix://?socket={sock}")
        assert 'export="d0"' in listed.stdout
        refused = run("nbdinfo", f"nbd+unix:///other?socket={sock}")
        assert refused.returncode != 0
    finally:
        await exports.stop(str(run_dir), "d0")


async def test_another_daemon_finds_it_and_it_is_the_vms_user(export: Path, run_dir: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    one = disk_over(top, len(disk))
    await Exports().start(str(run_dir), one, USER)
    later = Exports()
    try:
        pid = find_process(f"{run_dir}/x-d0.qmp")
        assert pid is not None
        if ROOT:
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}" in status
            assert "CapPrm:\t0000000000000000" in status
            assert "NoNewPrivs:\t1" in status
        assert os.getsid(pid) != os.getsid(0)
        assert await later.find(str(run_dir)) == ("d0",)
        assert await later.serves(str(run_dir), "d0") == "image"
        await later.start(str(run_dir), one, USER)
        await later.close_image(str(run_dir), one)
        await later.open_image(str(run_dir), one)
        await later.reopen(str(run_dir), one)
        assert find_process(f"{run_dir}/x-d0.qmp") == pid
    finally:
        await later.stop_all(str(run_dir))
    assert find_process(f"{run_dir}/x-d0.qmp") is None
    assert list(run_dir.iterdir()) == []


async def test_what_cannot_be_served_leaves_nothing(export: Path, run_dir: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    with pytest.raises(BadImage, match="configuration says"):
        await Exports().start(str(run_dir), disk_over(top, len(disk) + 512), USER)
    (export / "base.vhd").rename(export / "x.vhd")
    with pytest.raises(BadImage, match=r"base\.vhd"):
        await Exports().start(str(run_dir), disk_over(top, len(disk)), USER)
    assert list(run_dir.iterdir()) == []
    (export / "x.vhd").rename(export / "base.vhd")
    sock = await Exports().start(str(run_dir), disk_over(top, len(disk)), USER)
    try:
        # While it is served, no QEMU writes a file of the chain.
        writer = run("qemu-io", "-f", "vpc", "-c", "write 0 512", str(export / "base.vhd"))
        assert "lock" in writer.stderr
        assert Path(sock).exists()
    finally:
        await Exports().stop(str(run_dir), "d0")
    with (export / "base.vhd").open("rb") as held:
        import fcntl  # noqa: PLC0415

        fcntl.lockf(held, fcntl.LOCK_SH, 1, 101)
        with pytest.raises(InUse):
            await Exports().start(str(run_dir), disk_over(top, len(disk)), USER)


# hostile clients


def exactly(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        assert more, "the server has gone"
        data += more
    return data


def connected(sock: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(sock)
    assert exactly(client, 18).startswith(b"NBDMAGICIHAVEOPT")
    client.sendall(struct.pack(">I", 3))
    return client


def option(client: socket.socket, number: int, data: bytes, length: int | None = None) -> None:
    client.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data)


def request(kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length) + data


async def test_nonsense_ends_a_connection_and_nothing_else(export: Path, run_dir: Path) -> None:
    top, disk = chain_images.vhd_chain(export)
    sock = await Exports().start(str(run_dir), disk_over(top, len(disk)), USER)
    try:
        for number, data, length in ((7, b"", 2**31), (1, b"other", None), (10, b"\xff" * 8, None)):
            with connected(sock) as client:
                option(client, number, data, length)
                assert client.recv(1) == b""
        with connected(sock) as client:
            option(client, 7, struct.pack(">I", 2**32 - 1) + b"xx")
            assert struct.unpack(">QIII", exactly(client, 20))[2] == 2**31 + 3
        with connected(sock) as client, suppress(ConnectionResetError):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(1) == b""
        with connected(sock) as client:
            option(client, 1, b"d0")
            assert struct.unpack(">Q", exactly(client, 10)[:8]) == (len(disk),)
            asked = [
                request(0, len(disk), 512), request(0, 0, 0), request(0, 2**64 - 512, 1024),
                request(0, 0, MAX_READ + 1), request(1, 0, 4, b"data"), request(7, 0, 512), request(99, 0, 1),
            ]  # fmt: skip
            for one, error in zip(asked, (22, 22, 22, 22, 1, 22, 22), strict=True):
                client.sendall(one)
                assert struct.unpack(">IIQ", exactly(client, 16)) == (0x67446698, error, 7)
            client.sendall(request(0, 512, 1536))
            assert exactly(client, 16 + 1536)[16:] == disk[512:2048]
            client.sendall(bytes(28))
            assert client.recv(1) == b""
        with connected(sock) as client:
            option(client, 1, b"d0")
            exactly(client, 10)
            client.sendall(request(0, 0, 512))
            assert exactly(client, 528)[16:] == disk[:512]
    finally:
        await Exports().stop(str(run_dir), "d0")
