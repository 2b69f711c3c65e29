"""Help for tests with disk images: patterns, small file systems, what is left in a directory."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostler.model.disk import ImageFormat
from hostler.storage.formats import QEMU_DRIVER


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit: 4 KiB at most are summed here."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def leave_log(path: str | Path) -> None:
    """Make a fresh VHDX look as after a crash: with a valid log entry (one without descriptors), named by both headers
    ([MS-VHDX] 2.2.2 and 2.3.1)."""
    image = bytearray(Path(path).read_bytes())
    guid = bytes(range(1, 17))
    for header in (64 * 1024, 128 * 1024):
        image[header + 48 : header + 64] = guid
        image[header + 4 : header + 8] = bytes(4)
        image[header + 4 : header + 8] = struct.pack("<I", crc32c(bytes(image[header : header + 4096])))
        (log,) = struct.unpack_from("<Q", image, header + 72)
    entry = bytearray(4096)
    struct.pack_into("<4sIIIQII16sQQ", entry, 0, b"loge", 0, 4096, 0, 1, 0, 0, guid, len(image), len(image))
    struct.pack_into("<I", entry, 4, crc32c(bytes(entry)))
    image[log : log + 4096] = entry
    Path(path).write_bytes(bytes(image))


def qemu_io(path: str | Path, format: ImageFormat, *commands: str) -> str:
    """Runs qemu-io commands on an image; their output."""
    argv = ["qemu-io", "-f", QEMU_DRIVER[format]]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run([*argv, str(path)], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def run(*words: str | Path) -> str:
    """Runs a program that must succeed; its output."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


def verified(path: str | Path, format: ImageFormat, pattern: int, where: str) -> bool:
    """Whether the range "OFFSET LENGTH" holds that byte."""
    text = qemu_io(path, format, f"read -P {pattern} {where}")
    return "bytes at offset" in text and "failed" not in text


def names(directory: Path) -> list[str]:
    """Everything in a directory, hidden files too."""
    return sorted(os.listdir(directory))


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A file system of that size (root only)."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
