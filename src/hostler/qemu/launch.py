"""From a launch specification to a running QEMU process that waits, with its guest stopped, for its owner.

The steps, each undone when a later one fails: run and state directory of the VM's user; its own UEFI variable store;
its TPM; the QMP socket; QEMU itself. QMP can be connected to as soon as `launch` returns: the socket listens before
QEMU exists (as libvirt does it), so nobody polls for it, and a QEMU that dies early shows as a closed connection.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from contextlib import AsyncExitStack

from hostler.model.errors import HostLacks, InUse
from hostler.model.host import Accelerator, QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.vm import Process
from hostler.qemu import access, cgroup, process, swtpm
from hostler.qemu.cmdline import command_line, firmware_template
from hostler.qemu.listener import check_socket_path, listening_socket
from hostler.qemu.paths import RunDir, StateDir
from hostler.removal import remove_tree

KVM_DEVICE = "/dev/kvm"


async def launch(spec: LaunchSpec, facts: QemuFacts) -> Process:
    """Start QEMU as `spec` says, as user `spec.config.run_as` where we are root. The files of its disks must be open
    to that user already (`access.grant`). On failure, and when it is cancelled, nothing of it is left.

    InUse when a QEMU of this run directory is alive; HostLacks, InvalidInput, NotPermitted, NoSpace as they come.
    """
    run = RunDir(spec.run_dir)
    uid = spec.config.run_as if os.geteuid() == 0 else None
    command_line(spec, facts)  # everything it can refuse is refused before anything is touched
    for path in run.sockets:
        check_socket_path(path)
    _refuse_second(spec)
    async with AsyncExitStack() as undo:
        await asyncio.to_thread(prepare, spec, facts, uid)
        if spec.config.tpm:
            tpm = swtpm.start(spec.run_dir, spec.state_dir, uid)
            undo.push_async_callback(process.kill, tpm)
        with listening_socket(run.qmp, uid) as listener:
            line = command_line(spec, facts, listener.fileno())
            qemu = process.spawn(line, spec.run_dir, run.log, uid, _group(spec), [listener.fileno()])
        undo.push_async_callback(process.kill, qemu)
        # Moving a process between groups waits for the kernel (10 ms measured); QEMU takes 25 ms to answer anyway.
        await asyncio.to_thread(cgroup.join, spec.config.id, qemu.pid)
        undo.pop_all()
    return qemu


def prepare(spec: LaunchSpec, facts: QemuFacts, uid: int | None) -> None:
    """The VM's directories, cleared of what a killed QEMU left, and its variable store. Harmless when repeated."""
    run = RunDir(spec.run_dir)
    access.prepare_directory(spec.run_dir, uid)
    access.prepare_directory(spec.state_dir, uid)
    for left in (*run.sockets, run.pid, run.tpm_pid, run.log, run.tpm_log):
        remove_tree(left)
    template = firmware_template(spec.config, facts)
    if template is not None:
        copy_variable_store(template, StateDir(spec.state_dir).uefi_vars, uid)
    if uid is not None:
        access.check_reachable(spec.run_dir, uid)
        access.check_reachable(spec.state_dir, uid)


def copy_variable_store(template: str, path: str, uid: int | None) -> None:
    """The VM's own UEFI variables, made from the template the first time. The copy appears whole or not at all: a torn
    store would brick the guest."""
    if os.path.lexists(path):
        return
    new = f"{path}.new"
    remove_tree(new)
    try:
        with open(template, "rb") as source, open(new, "xb", opener=_private) as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
            if uid is not None:
                os.fchown(copy.fileno(), uid, uid)
        os.rename(new, path)
    except OSError as error:
        remove_tree(new)
        raise access.explain(path, error) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _refuse_second(spec: LaunchSpec) -> None:
    """Looking through all processes costs milliseconds, so it is left out where no QEMU has ever left a trace. (One
    that hid its traces is still found by `kill_leftovers`, which ends each VM, and stopped by the image locks.)"""
    run = RunDir(spec.run_dir)
    if not os.path.lexists(run.qmp) and not os.path.lexists(run.pid):
        return
    found = process.find(spec.run_dir)
    if found is not None:
        raise InUse(
            f"vm {spec.config.name}",
            f"a QEMU of it is running already (process {found.pid})",
            "adopt it, or turn it off first",
            holder=f"process {found.pid}",
        )


def _group(spec: LaunchSpec) -> int | None:
    """The group that may use KVM, where the device is not open to everyone."""
    if spec.accelerator is not Accelerator.KVM:
        return None
    try:
        status = os.stat(KVM_DEVICE)
    except OSError as error:
        raise HostLacks(f"vm {spec.config.name}", f"{KVM_DEVICE} is not there", "load the module kvm") from error
    return None if status.st_mode & stat.S_IWOTH else status.st_gid
