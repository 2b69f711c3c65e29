"""Which accelerator VMs get on this host, and why.

`/dev/kvm` that can be opened proves nothing. On a virtual machine whose hypervisor gives no nested virtualization there
may still be a KVM (the PVM one is an example) that starts VMs, runs their firmware, and then interprets every
instruction of a stock kernel: its guests look hung. So KVM is chosen only when the processor says it can virtualize
*and* a probe VM really ran under it, at the speed of a processor.

The probe is 64 KiB of firmware that goes where guests live (64-bit mode with paging), counts down from 2**25 and writes
a number to QEMU's isa-debug-exit device, which ends QEMU with a status made of it. Measured on such a machine: under
TCG 0.2 s with QEMU's start, under the interpreting KVM 38 s; a processor takes 0.02 s.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import tempfile
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from hostler.model.host import Accelerator, AcceleratorChoice

PROBE_DEADLINE: Final = 5.0
"""Seconds a probe may take: a hundred times what it takes under a working KVM."""

VIRTUALIZATION_FLAGS: Final = frozenset({"vmx", "svm"})
"""Intel's and AMD's names in /proc/cpuinfo."""

KVM_DEVICE: Final = "/dev/kvm"

_EXIT_PORT: Final = 0xF4
_EXIT_VALUE: Final = 0x2A
_EXIT_STATUS: Final = (_EXIT_VALUE << 1) | 1
"""isa-debug-exit ends QEMU with (value << 1) | 1 (hw/misc/debugexit.c)."""

_FIRMWARE_SIZE: Final = 64 * 1024
_RESET_VECTOR: Final = _FIRMWARE_SIZE - 16
"""The firmware ends at 4 GiB; a processor starts 16 bytes below (Intel SDM 3A, 10.1.4)."""

_HEX_BYTE: Final = re.compile(r"^[0-9a-f]{2}$")
_ROUNDS: Final = 2**25

# The code, byte by byte. It runs at 0xf0000, where a PC shows the last 64 KiB of its firmware again, within reach of
# the probe's page tables; the global descriptor table lies behind it at offset 0x90, its pseudo-descriptor at 0xb0.
_REAL_MODE: Final = """
    fa                          cli
    2e 66 0f 01 16 b0 00        lgdt cs:[0xb0]
    0f 20 c0                    mov eax, cr0
    0c 01                       or al, 1                    protected mode
    0f 22 c0                    mov cr0, eax
    66 ea 18 00 0f 00 08 00     jmp 0x08:0xf0018
"""
_PROTECTED_MODE: Final = """
    66 b8 10 00                 mov ax, 0x10
    8e d8                       mov ds, ax
    8e c0                       mov es, ax
    bf 00 10 00 00              mov edi, 0x1000             clear three pages for the tables
    b9 00 0c 00 00              mov ecx, 0xc00
    31 c0                       xor eax, eax
    f3 ab                       rep stosd
    c7 05 00 10 00 00 03 20 00 00   mov [0x1000], 0x2003    level 4: present, writable
    c7 05 00 20 00 00 03 30 00 00   mov [0x2000], 0x3003    level 3
    c7 05 00 30 00 00 83 00 00 00   mov [0x3000], 0x83      level 2: the first 2 MiB in one page
    b8 00 10 00 00              mov eax, 0x1000
    0f 22 d8                    mov cr3, eax
    0f 20 e0                    mov eax, cr4
    0c 20                       or al, 0x20                 physical address extension
    0f 22 e0                    mov cr4, eax
    b9 80 00 00 c0              mov ecx, 0xc0000080         EFER
    0f 32                       rdmsr
    80 cc 01                    or ah, 1                    long mode
    0f 30                       wrmsr
    0f 20 c0                    mov eax, cr0
    0d 00 00 00 80              or eax, 0x80000000          paging
    0f 22 c0                    mov cr0, eax
    ea 7a 00 0f 00 18 00        jmp 0x18:0xf007a
"""
_LONG_MODE: Final = f"""
    b9 {_ROUNDS.to_bytes(4, "little").hex(" ")}     mov ecx, rounds
    ff c9                       dec ecx
    75 fc                       jnz back
    b0 {_EXIT_VALUE:02x}        mov al, value
    e6 {_EXIT_PORT:02x}         out port, al
    f4                          hlt
    eb fd                       jmp back
"""
_DESCRIPTORS: Final = """
    00 00 00 00 00 00 00 00     null
    ff ff 00 00 00 9b cf 00     0x08: 32-bit code
    ff ff 00 00 00 93 cf 00     0x10: data
    ff ff 00 00 00 9b af 00     0x18: 64-bit code
    1f 00 90 00 0f 00           limit, and address 0xf0090
"""
_AT_RESET: Final = """
    e9 0d 00                    jmp to the first byte of the firmware
"""


async def choose(
    flags: Collection[str],
    forced: Accelerator | None = None,
    binary: str = "qemu-system-x86_64",
    device: str = KVM_DEVICE,
    deadline: float = PROBE_DEADLINE,
) -> AcceleratorChoice:
    """The accelerator for this host. `flags`: the processor's flags of /proc/cpuinfo; `forced`: the operator's word,
    taken without a probe. Never fails: what goes wrong is a reason for TCG. At most `deadline` seconds."""
    if forced is not None:
        return AcceleratorChoice(kind=forced, reason="the operator chose it", forced=True)
    reason = _missing(flags, device) or await probe(Accelerator.KVM, binary, deadline)
    if reason is None:
        return AcceleratorChoice(kind=Accelerator.KVM, reason="a probe VM ran under KVM")
    return AcceleratorChoice(kind=Accelerator.TCG, reason=reason)


async def probe(
    accelerator: Accelerator, binary: str = "qemu-system-x86_64", deadline: float = PROBE_DEADLINE
) -> str | None:
    """None when a VM really executed code under `accelerator`, else why not, as a sentence. Leaves nothing behind."""
    name = str(accelerator).upper()
    with tempfile.NamedTemporaryFile(prefix="hostler-probe-") as firmware:
        firmware.write(probe_firmware())
        firmware.flush()
        try:
            status = await _run([binary, *_probe_arguments(accelerator, firmware.name)], deadline)
        except TimeoutError:
            return f"a probe VM under {name} hung or crawled, and was stopped after {deadline:g} s"
        except OSError as error:
            return f"{binary} cannot be started: {error.strerror}"
    return None if status == _EXIT_STATUS else f"a probe VM under {name} ended with status {status} instead of running"


def probe_firmware() -> bytes:
    """The 64 KiB the probe VM boots from."""
    code = _bytes(_REAL_MODE) + _bytes(_PROTECTED_MODE) + _bytes(_LONG_MODE)
    start = code.ljust(0x90, b"\0") + _bytes(_DESCRIPTORS)
    return start.ljust(_RESET_VECTOR, b"\0") + _bytes(_AT_RESET).ljust(16, b"\0")


def _bytes(listing: str) -> bytes:
    """The machine code of a listing: on each line, the pairs of hexadecimal digits before the first other word."""
    found = bytearray()
    for line in listing.splitlines():
        for word in itertools.takewhile(_HEX_BYTE.match, line.split()):
            found.append(int(word, 16))
    return bytes(found)


def _missing(flags: Collection[str], device: str) -> str | None:
    """What KVM lacks before anything is tried."""
    if not VIRTUALIZATION_FLAGS & set(flags):
        present = f"{device} is there, but" if os.path.exists(device) else f"there is no {device}, and"
        return f"{present} the processor has neither vmx nor svm, so KVM cannot run guests"
    if not os.path.exists(device):
        return f"there is no {device}: the module kvm is not loaded, or virtualization is off in the firmware"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    return None


def _probe_arguments(accelerator: Accelerator, firmware: str) -> list[str]:
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "16"),
        *("-machine", f"q35,accel={accelerator}", "-bios", firmware),
        *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"),
    ]


async def _run(command: list[str], deadline: float) -> int:
    """Exit status of a command; TimeoutError after `deadline` seconds, when it has been killed."""
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(deadline):
            return await child.wait()
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
