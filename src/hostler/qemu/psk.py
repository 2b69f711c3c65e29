"""The pre-shared key of one move, as the file QEMU reads it from; it never stands in an argument or in a log.

QEMU's `tls-creds-psk` wants a directory with `keys.psk`. The sending side reads it when the object is made, the
receiving side (GnuTLS) at each handshake: so the one is removed at once, the other when the stream has arrived.

Where the daemon is root, the run directory belongs to the user of that one QEMU, who may be hostile (a guest that broke
out): everything is made relative to an open directory that is ours, and no link is followed.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

USERNAME = "hostler"
"""Who the key belongs to; both sides must say the same, and each move has a key of its own."""

_PREFIX = "psk-"
_FILE = "keys.psk"


def write_key(run_dir: str, secret: str, uid: int) -> str:
    """Write the key (hex) for a QEMU that runs as `uid`; returns the directory to name to QEMU. Former ones go away."""
    remove_keys(run_dir)
    directory = f"{run_dir}/{_PREFIX}{os.urandom(8).hex()}"
    os.mkdir(directory, 0o700)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            raise PermissionError(f"{directory} was replaced while it was made")
        _write(folder, f"{USERNAME}:{secret}\n".encode(), uid)
        if uid != os.geteuid():
            os.fchown(folder, uid, -1)
    finally:
        os.close(folder)
    return directory


def remove_keys(run_dir: str) -> None:
    """Remove every key of that QEMU; harmless when there is none."""
    for path in Path(run_dir).glob(f"{_PREFIX}*"):
        if path.is_symlink():
            with suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: int, content: bytes, uid: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(_FILE, flags, 0o400, dir_fd=folder)
    try:
        os.write(file, content)
        if uid != os.geteuid():
            os.fchown(file, uid, -1)
    finally:
        os.close(file)
