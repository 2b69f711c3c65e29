"""The files of one VM's QEMU: what is in its run directory and its state directory, under which name. Pure."""

from __future__ import annotations

from dataclasses import dataclass

UNIX_PATH_MAX = 107
"""Longest path of a unix socket, in bytes (`sun_path` has 108 with its final zero)."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """What lives as long as one QEMU: sockets, pid, output."""

    path: str

    @property
    def qmp(self) -> str:
        return f"{self.path}/qmp.sock"

    @property
    def vnc(self) -> str:
        return f"{self.path}/vnc.sock"

    @property
    def serial(self) -> str:
        return f"{self.path}/serial.sock"

    @property
    def agent(self) -> str:
        return f"{self.path}/qga.sock"

    @property
    def tpm(self) -> str:
        return f"{self.path}/tpm.sock"

    @property
    def pid(self) -> str:
        return f"{self.path}/qemu.pid"

    @property
    def log(self) -> str:
        return f"{self.path}/qemu.log"

    @property
    def tpm_pid(self) -> str:
        return f"{self.path}/swtpm.pid"

    @property
    def tpm_log(self) -> str:
        return f"{self.path}/swtpm.log"

    @property
    def sockets(self) -> tuple[str, ...]:
        """Every socket, for clearing away what a killed QEMU left."""
        return (self.qmp, self.vnc, self.serial, self.agent, self.tpm)


@dataclass(frozen=True, slots=True)
class StateDir:
    """What survives a reboot of the host."""

    path: str

    @property
    def uefi_vars(self) -> str:
        return f"{self.path}/uefi-vars.fd"

    @property
    def tpm(self) -> str:
        return f"{self.path}/tpm"
