"""The virtual TPM of a VM: one swtpm process beside its QEMU.

QEMU connects to it when it starts, so its socket must be there before. We make and listen on that socket and hand it
over: nothing has to be waited for, and swtpm and QEMU start at the same time. It ends with QEMU (`--terminate`); its
state lies in the VM's state directory and travels in the migration stream.
"""

from __future__ import annotations

from hostler.model.vm import Process
from hostler.qemu import access, process
from hostler.qemu.listener import listening_socket
from hostler.qemu.paths import RunDir, StateDir

PROGRAM = "swtpm"


def start(run_dir: str, state_dir: str, uid: int | None) -> Process:
    """Start the TPM of a VM as user `uid` (None: ourselves); QEMU may connect at once. HostLacks without swtpm."""
    run, state = RunDir(run_dir), StateDir(state_dir)
    access.prepare_directory(state.tpm, uid)
    with listening_socket(run.tpm, uid) as listener:
        arguments = [
            *(PROGRAM, "socket", "--tpm2", "--terminate"),
            *("--tpmstate", f"dir={state.tpm},mode=0600"),
            *("--ctrl", f"type=unixio,fd={listener.fileno()}"),
            *_pid_option(run),
        ]
        return process.spawn(arguments, run_dir, run.tpm_log, uid, fds=[listener.fileno()])


def find(run_dir: str) -> Process | None:
    """The running TPM of a run directory, whoever started it."""
    run = RunDir(run_dir)
    return process.find_by_arguments(_pid_option(run), run_dir, run.tpm_pid)


async def stop(run_dir: str) -> None:
    """End it and wait until it is gone. Harmless when it is: it ends by itself with its QEMU."""
    found = find(run_dir)
    if found is not None:
        await process.kill(found)


def _pid_option(run: RunDir) -> tuple[str, str]:
    return "--pid", f"file={run.tpm_pid}"
