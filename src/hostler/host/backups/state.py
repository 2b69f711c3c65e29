"""What belongs to a VM beside its disks and goes into its backups: the variables of its UEFI firmware.

The directory they are in belongs to the VM's user, who may be hostile: no link in it is followed, and no more is read
than such variables can have.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from hostler.model.errors import BadImage
from hostler.qemu import access
from hostler.qemu.paths import StateDir

MOST = 64 * 1024 * 1024
"""Bytes; OVMF's variables have 528 KiB."""
NAME = "uefi-vars.fd"


def keep_state(state_dir: Path, place: Path) -> str:
    """Copy the variables, if there are any, beside the files of a backup; their SHA-256, "" without. Blocking; OSError
    as the backup's disk gives it."""
    try:
        fd = os.open(StateDir(str(state_dir)).uefi_vars, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST:
            return ""
        content = file.read(MOST)
    _write(place / NAME, content)
    return hashlib.sha256(content).hexdigest()


def bring_state(place: Path, digest: str, state_dir: Path, uid: int | None) -> None:
    """Give a VM that is off the variables of a backup, if that has any. BadImage when they are damaged. Blocking."""
    if not digest:
        return
    with open(place / NAME, "rb", opener=_nofollow) as file:
        content = file.read(MOST + 1)
    if hashlib.sha256(content).hexdigest() != digest:
        raise BadImage(f"file {place / NAME}", "is not what was written", "use another backup", damaged=True)
    access.prepare_directory(str(state_dir), uid)
    target = Path(StateDir(str(state_dir)).uefi_vars)
    new = target.with_name(f".{target.name}.new")
    _write(new, content)
    if uid is not None:
        os.chown(new, uid, -1, follow_symlinks=False)
    os.rename(new, target)


def _nofollow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _write(path: Path, content: bytes) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
