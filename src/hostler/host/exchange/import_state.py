"""UEFI variables and TPM state that come with a folder of our own: into the state directory of the new VM."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from hostler.foreign.own import STATE_FILES
from hostler.model.errors import BadImage, HostlerError
from hostler.model.host import QemuFacts
from hostler.model.vm import Firmware, VmConfig
from hostler.qemu import access
from hostler.qemu.cmdline import firmware_template

LARGEST = 64 * 1024**2
"""Bytes of such a file; real ones have less than 1 MiB."""
UEFI_VARS = "uefi-vars.fd"


def state_files(config: VmConfig, digests: Mapping[str, str], directory: str, qemu: QemuFacts) -> dict[str, str]:
    """By name the path of each such file that the manifest names and the VM can use. A variable store of another size
    than this host's firmware wants is none."""
    found = {}
    for name in STATE_FILES:
        path = os.path.join(directory, name)
        wanted = config.firmware is Firmware.UEFI if name == UEFI_VARS else config.tpm
        if name in digests and wanted and (name != UEFI_VARS or _size(path) == _size(firmware_template(config, qemu))):
            found[name] = path
    return found


def _size(path: str | None) -> int | None:
    try:
        return None if path is None else os.stat(path).st_size
    except OSError:
        return None


def place_state(files: Mapping[str, str], state_dir: str, uid: int | None) -> None:
    """Put them where the VM's QEMU and TPM find them; harmless when repeated. BadImage for what is no plain file."""
    if not files:
        return
    access.prepare_directory(state_dir, uid)
    for name, path in files.items():
        target = os.path.join(state_dir, STATE_FILES[name])
        if os.path.dirname(target) != state_dir:
            access.prepare_directory(os.path.dirname(target), uid)
        content = _read(path)
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
                if uid is not None:
                    os.fchown(fd, uid, uid)
        except OSError as error:
            raise access.explain(target, error) from error


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _bad(path, error.strerror or "cannot be opened") from error
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise _bad(path, "is no plain file of a sensible size")
        return file.read(LARGEST)


def _bad(path: str, cause: str) -> HostlerError:
    return BadImage(f"file {path}", cause, "export the VM again")
