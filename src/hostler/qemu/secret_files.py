"""Files with secrets that one QEMU reads: they never stand in an argument or in a log, and nobody else can read them.

Where the daemon is root, the run directory belongs to the user of that one QEMU, who may be hostile (a guest that broke
out): everything is made relative to an open directory that is ours, and no link is followed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hostler.removal import FEW, remove_tree


def write(run_dir: str, prefix: str, files: Mapping[str, bytes], uid: int) -> str:
    """Write these files (mode 0400) for a QEMU that runs as `uid`, into a new directory that begins with `prefix`;
    returns the directory. Former ones of that prefix go away."""
    remove(run_dir, prefix)
    directory = f"{run_dir}/{prefix}{os.urandom(8).hex()}"
    os.mkdir(directory, 0o700)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            raise PermissionError(f"{directory} was replaced while it was made")
        for name, content in files.items():
            _write(folder, name, content, uid)
        if uid != os.geteuid():
            os.fchown(folder, uid, -1)
    finally:
        os.close(folder)
    return directory


def remove(run_dir: str, prefix: str) -> None:
    """Remove every directory of that prefix; harmless when there is none."""
    for path in Path(run_dir).glob(f"{prefix}*"):
        remove_tree(path, FEW)


def _write(folder: int, name: str, content: bytes, uid: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o400, dir_fd=folder)
    try:
        os.write(file, content)
        if uid != os.geteuid():
            os.fchown(file, uid, -1)
    finally:
        os.close(file)
