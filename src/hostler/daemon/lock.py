"""One daemon per run directory: held by the kernel for the life of the process, so that no death leaves it behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hostler.model.errors import HostlerError, InternalError, InUse, NotPermitted


class RunLock:
    """The lock on a run directory, which it makes. A second daemon there would take the first one's VMs for leftovers.

    InUse while another daemon holds it; NotPermitted, InternalError when the directory cannot be used.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = -1
        try:
            run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            # Close-on-exec: a QEMU started from here must not hold the lock on.
            self._file = os.open(run_dir / "hostlerd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise _explain(run_dir, error) from error

    def release(self) -> None:
        """Let the next daemon in. Harmless when released."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _explain(run_dir: Path, error: OSError) -> HostlerError:
    subject = f"run directory {run_dir}"
    if isinstance(error, BlockingIOError):
        return InUse(subject, "another hostlerd runs there", "stop that one, or choose another --run-dir")
    if isinstance(error, PermissionError):
        return NotPermitted(subject, "cannot be written by this user", "choose another --run-dir, or run as root")
    return InternalError(subject, f"cannot be used: {error.strerror}", "choose another --run-dir")
