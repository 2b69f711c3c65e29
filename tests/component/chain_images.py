"""Chains for tests, and what tools we did not write see in an image."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from hostler.model.disk import ImageFormat
from hostler.model.units import MiB
from hostler.storage.formats import QEMU_DRIVER
from hostler.testing import hyperv_vhd, hyperv_vhdx

SIZE = 21 * MiB


def sectors(seed: int, size: int = SIZE, runs: int = 60) -> dict[int, bytes]:
    """Runs of sectors with content of their own."""
    rng = random.Random(seed)
    last = size // 512
    starts = [rng.randrange(last) for _ in range(runs)] + [last - 1]
    chosen = {s for start in starts for s in range(start, min(last, start + rng.randrange(1, 64)))}
    return {sector: rng.randbytes(512) for sector in chosen}


def disk_of(size: int, *layers: dict[int, bytes]) -> bytes:
    """What a guest sees of layers over each other."""
    disk = bytearray(size)
    for layer in layers:
        for sector, data in layer.items():
            disk[sector * 512 : sector * 512 + 512] = data
    return bytes(disk)


def vhd_chain(place: Path, size: int = SIZE) -> tuple[Path, bytes]:
    """Three images; the topmost, and the disk."""
    layers = [sectors(seed, size) for seed in range(3)]
    last = (hyperv_vhd.dynamic(place / "base.vhd", size, layers[0]), place / "base.vhd")
    for number in (1, 2):
        path = place / f"c{number}.avhd"
        last = (hyperv_vhd.differencing(path, size, layers[number], last), path)
    return last[1], disk_of(size, *layers)


def vhdx_chain(place: Path, size: int = SIZE) -> tuple[Path, bytes]:
    """Three images, the topmost with a log that is still to be replayed: its block table is in the log only."""
    layers = [sectors(seed, size) for seed in range(3)]
    last = (hyperv_vhdx.Vhdx(size, layers[0]).write(place / "base.vhdx"), place / "base.vhdx")
    for number in (1, 2):
        path = place / f"c{number}.avhdx"
        last = (hyperv_vhdx.Vhdx(size, layers[number], hyperv_vhdx.Parent.of(*last)).write(path), path)
    with last[1].open("r+b") as file:
        file.seek(hyperv_vhdx.TABLE_AT)
        table = file.read(4096)
        file.seek(hyperv_vhdx.TABLE_AT)
        file.write(bytes(4096))
    hyperv_vhdx.crash(last[1], [(hyperv_vhdx.TABLE_AT, table)])
    return last[1], disk_of(size, *layers)


def check_by_qemu(path: str, format: ImageFormat, disk: bytes, place: Path) -> None:
    """qemu-img finds no fault in the image, and exactly this disk."""
    raw = place / "expected.raw"
    raw.write_bytes(disk)
    driver = QEMU_DRIVER[format]
    argv = ["qemu-img", "compare", "-f", driver, "-F", "raw", path, str(raw)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = subprocess.run(
        ["qemu-img", "check", "-f", driver, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0 or "does not support checks" in checked.stderr, checked.stdout + checked.stderr


def seen_by_7zip(path: str | Path, place: Path) -> bytes:
    """The disk that 7-Zip finds in an image, and its parents (VHD, VHDX without parents, qcow2)."""
    target = place / "unpacked"
    argv = ["7z", "x", "-y", f"-o{target}", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert "Everything is Ok" in done.stdout, done.stdout
    (found,) = target.iterdir()
    content = found.read_bytes()
    found.unlink()
    return content
