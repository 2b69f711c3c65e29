"""What state a VM is in, judged from what its QEMU says. Pure; the actor's reconciler acts on it.

It takes no wish as input, only what is: the record and the witness (QEMU's run state, or that there is no QEMU). It may
run at any time when no operation holds the VM.
"""

from __future__ import annotations

from dataclasses import dataclass

from hostler.model.machine import RunStatus
from hostler.model.vm import CriticalReason, VmRecord, VmState


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state a VM is in, with a reason where it is not what its owner asked for."""

    state: VmState
    reason: CriticalReason | None = None
    text: str = ""


def verdict_running(status: RunStatus, io_trouble: dict[str, str]) -> Verdict:
    """The state of a VM whose QEMU lives. `io_trouble` maps disk ids to QEMU's io-status where it is not ok."""
    if status is RunStatus.RUNNING:
        return Verdict(VmState.RUNNING)
    if status is RunStatus.IO_ERROR:
        disks = ", ".join(sorted(io_trouble)) or "a disk"
        if "nospace" in io_trouble.values():
            return Verdict(
                VmState.CRITICAL,
                CriticalReason.NO_SPACE,
                f"no space left for {disks}; the guest stands still, and goes on by itself when there is room",
            )
        return Verdict(VmState.CRITICAL, CriticalReason.IO_ERROR, f"I/O on {disks} failed; the guest is stopped")
    if status is RunStatus.GUEST_PANICKED:
        return Verdict(VmState.CRITICAL, CriticalReason.GUEST_PANICKED, "the guest's kernel panicked")
    if status is RunStatus.INTERNAL_ERROR:
        return Verdict(VmState.CRITICAL, CriticalReason.INCONSISTENT, "QEMU reports an internal error of the machine")
    if status is RunStatus.SHUTDOWN:
        return Verdict(VmState.STOPPING)
    return Verdict(VmState.PAUSED)


def verdict_gone(record: VmRecord, expected: bool, output: str) -> Verdict:
    """The state of a VM whose QEMU is gone. `expected`: it said goodbye (a SHUTDOWN event, or we asked it to end). One
    whose saved state has not been run on is as it was saved."""
    if record.state in (VmState.OFF, VmState.SAVED):
        return Verdict(record.state)
    if record.saved is not None:
        return Verdict(VmState.SAVED)
    if expected:
        return Verdict(VmState.OFF)
    said = f"; its last words: {output.strip()[-1000:]}" if output.strip() else ""
    return Verdict(VmState.OFF, CriticalReason.QEMU_DIED, f"its QEMU ended unexpectedly{said}")
