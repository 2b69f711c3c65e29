"""Block devices of the host, with a loop device standing in for a disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import InUse, InvalidInput, NotFound
from hostler.model.units import MiB
from hostler.storage.devices import inspect_device

pytestmark = pytest.mark.component


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/dev/no-such-disk", NotFound),
        ("/etc/passwd", InvalidInput),
        ("/tmp", InvalidInput),
        ("/dev/zero", InvalidInput),
    ],
)
async def test_what_is_no_block_device(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await inspect_device(path)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(4 * MiB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "disk")], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device to be had: {made.stderr}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@contextmanager
def mounted(device: str, where: Path) -> Iterator[None]:
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    where.mkdir()
    subprocess.run(["mount", device, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a loop device and mounts it")
async def test_size_and_use_by_the_host(loop: str, tmp_path: Path) -> None:
    expected = DiskSource(kind=SourceKind.DEVICE, path=loop, format=ImageFormat.RAW, size=4 * MiB)
    assert await inspect_device(loop) == expected
    with mounted(loop, tmp_path / "mount"), pytest.raises(InUse, match="host itself"):
        await inspect_device(loop)
    assert await inspect_device(loop) == expected
