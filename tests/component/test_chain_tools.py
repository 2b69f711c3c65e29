"""Our reader of VHD and VHDX beside programs that are neither ours nor made by the same people."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chain_images
import images
import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage
from hostler.model.units import MiB
from hostler.storage.chains import plan
from hostler.storage.chains.chain import open_chain
from hostler.storage.formats import QEMU_DRIVER, recognise
from hostler.testing import hostile_images, hyperv_vhd, hyperv_vhdx

pytestmark = pytest.mark.component


def ours(path: Path) -> bytes:
    with open_chain(str(path)) as chain:
        chain.require_sound()
        return plan.read(chain.layers, 0, chain.size)


@contextmanager
def mounted(image: Path, where: Path) -> Iterator[Path]:
    """The disk as libvhdi shows it: one file for each image of the chain, the last is the topmost."""
    where.mkdir()
    subprocess.run(["vhdimount", image, where], check=True, capture_output=True, timeout=60)
    try:
        yield max(where.iterdir(), key=lambda path: path.name)
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and FUSE")
def test_a_vhdx_chain_as_libvhdi_reads_it(tmp_path: Path) -> None:
    layers = [chain_images.sectors(seed) for seed in range(3)]
    last = (hyperv_vhdx.Vhdx(chain_images.SIZE, layers[0]).write(tmp_path / "b.vhdx"), tmp_path / "b.vhdx")
    for number in (1, 2):
        path = tmp_path / f"c{number}.avhdx"
        parent = hyperv_vhdx.Parent.of(*last)
        last = (hyperv_vhdx.Vhdx(chain_images.SIZE, layers[number], parent).write(path), path)
    with mounted(last[1], tmp_path / "mount") as disk:
        assert disk.read_bytes() == ours(last[1])


def test_a_vhd_chain_as_7zip_reads_it(tmp_path: Path) -> None:
    top, disk = chain_images.vhd_chain(tmp_path)
    assert chain_images.seen_by_7zip(top, tmp_path) == disk == ours(top)


WRITES = ("write -P 1 0 64k", "write -P 2 3145728 1M", "write -P 3 9961472 4k", "write -z 3145728 512k")


@pytest.mark.parametrize("format", [ImageFormat.VHD, ImageFormat.VHD_FIXED, ImageFormat.VHDX])
def test_images_of_qemu(tmp_path: Path, format: ImageFormat) -> None:
    image, raw = tmp_path / "image", tmp_path / "raw"
    options = {ImageFormat.VHD: "force_size=on", ImageFormat.VHD_FIXED: "subformat=fixed,force_size=on"}.get(format)
    argv = ["qemu-img", "create", "-q", "-f", QEMU_DRIVER[format], *(("-o", options) if options else ())]
    subprocess.run([*argv, str(image), "10M"], check=True)
    images.qemu_io(image, format, *WRITES)
    subprocess.run(
        ["qemu-img", "convert", "-f", QEMU_DRIVER[format], "-O", "raw", str(image), str(raw)], check=True, timeout=60
    )
    assert ours(image) == raw.read_bytes()


@pytest.mark.parametrize("at", [0, hyperv_vhdx.LOG_LENGTH - 8192])
def test_a_log_as_qemu_replays_it(tmp_path: Path, at: int) -> None:
    """QEMU replays it in a copy of the file, we in memory; the content is the same then."""
    image, copy, raw = tmp_path / "image.vhdx", tmp_path / "copy.vhdx", tmp_path / "raw"
    hyperv_vhdx.Vhdx(64 * MiB, chain_images.sectors(1, 64 * MiB), block=8 * MiB).write(image)
    with image.open("r+b") as file:
        file.seek(hyperv_vhdx.TABLE_AT)
        table = file.read(4096)
        file.seek(hyperv_vhdx.TABLE_AT)
        file.write(bytes(4096))
    data_at = hyperv_vhdx.TABLE_AT + MiB
    puts = [(hyperv_vhdx.TABLE_AT, bytes(4096)), (hyperv_vhdx.TABLE_AT, table), (data_at + 8192, b"log " * 1024)]
    hyperv_vhdx.crash(image, puts, at, {data_at: 32_768})
    shutil.copy(image, copy)
    refused = subprocess.run(
        ["qemu-img", "info", "-f", "vhdx", str(image)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "log that needs to be replayed" in refused.stderr
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", "-f", "vhdx", str(copy)], check=True, timeout=60)
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", str(copy), str(raw)], check=True, timeout=60)
    before = image.read_bytes()
    assert ours(image) == raw.read_bytes()
    assert image.read_bytes() == before


def test_what_is_refused_as_a_vms_disk_says_what_to_do(tmp_path: Path) -> None:
    for make in (chain_images.vhd_chain, chain_images.vhdx_chain):
        place = tmp_path / make.__name__
        place.mkdir()
        with pytest.raises(BadImage) as refused:
            recognise(str(make(place)[0]))
        assert "hostler volume flatten" in refused.value.advice


def test_hostile_images_in_little_memory_and_time() -> None:
    """In a process with a limit on its memory, which a table read at once would break."""
    argv = [sys.executable, "-m", hostile_images.__name__, "20", "120"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert " sound, " in done.stdout


def test_many_bytes_of_one_block_are_no_many_bytes_of_memory(tmp_path: Path) -> None:
    """A 2 TiB table whose every entry names one block: it is planned piece by piece."""
    size = 4 * 1024 * 1024 * MiB // 2
    path = tmp_path / "a.vhd"
    hyperv_vhd.dynamic(path, size, {0: b"x" * 512})
    content = bytearray(path.read_bytes())
    entry = content[1536:1540]
    content[1536 : 1536 + size // (2 * MiB) * 4] = entry * (size // (2 * MiB))
    path.write_bytes(content)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (200 << 20,) * 2)\n"
        "from hostler.storage.chains.chain import open_chain\n"
        "from hostler.storage.chains import plan\n"
        "with open_chain(sys.argv[1]) as chain:\n"
        "    print(sum(1 for _ in plan.extents(chain.layers, 0, chain.size)))\n"
    )
    argv = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == str(size // (2 * MiB)), done.stderr
