"""Where a host keeps things on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hostler.model.errors import InvalidInput

LONGEST_SOCKET = len("/vms/00000000-0000-0000-0000-000000000000/e-00000000000000000000000000000000.sock")
SOCKET_PATH_MAX = 107
"""sizeof(sun_path) - 1 on Linux, unix(7)."""


@dataclass(frozen=True, slots=True)
class Paths:
    """`state_dir` survives a reboot; `run_dir` holds sockets and need not."""

    state_dir: Path
    run_dir: Path

    def __post_init__(self) -> None:
        spare = SOCKET_PATH_MAX - LONGEST_SOCKET - len(str(self.run_dir).encode())
        if spare < 0:
            raise InvalidInput(
                f"run directory {self.run_dir}",
                f"is {-spare} bytes too long for the unix sockets below it",
                "choose a shorter --run-dir, such as /run/hostler",
            )

    def vm_run(self, vm_id: str) -> Path:
        """Sockets, pid file and log of one VM's QEMU."""
        return self.run_dir / "vms" / _one_name(vm_id)

    def vm_state(self, vm_id: str) -> Path:
        """UEFI variables, TPM state and saved state of one VM."""
        return self.state_dir / "vms" / _one_name(vm_id)

    def saved_state(self, vm_id: str) -> Path:
        """The file a saved VM's memory is in."""
        return self.vm_state(vm_id) / "saved.state"

    @property
    def volumes(self) -> Path:
        """Where volumes go that were given no path."""
        return self.state_dir / "volumes"


def _one_name(vm_id: str) -> str:
    """A VM's id as one name in a directory. Ids come from other hosts, too, and directories of VMs are made, chowned
    and removed by root: an id that leads elsewhere ends here."""
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", vm_id):
        raise InvalidInput(f"vm id {vm_id[:80]!r}", "is not an id of a VM", "ids are made by Hostler, never by hand")
    return vm_id
