"""Help for tests with disk images: patterns, small file systems, what is left in a directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostler.model.disk import ImageFormat
from hostler.storage.formats import QEMU_DRIVER


def qemu_io(path: str | Path, format: ImageFormat, *commands: str) -> str:
    """Runs qemu-io commands on an image; their output."""
    argv = ["qemu-io", "-f", QEMU_DRIVER[format]]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run([*argv, str(path)], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


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
