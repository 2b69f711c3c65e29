"""The smallest things that boot: a sector that says a line on the serial port again and again, on a disk or a CD."""

from __future__ import annotations

import struct

ISO_SECTOR = 2048


def boot_sector(line: bytes) -> bytes:
    """512 bytes of real-mode code. BIOS loads them to 0x7C00, from a disk as from a CD; the line is said at each tick
    of the timer (18 a second), since whoever listens may come late."""
    code = bytes.fromhex(
        "31c0 8ed8 fc fb"  #  00  xor ax,ax; mov ds,ax; cld; sti
        "baf803"  #           06  mov dx,0x3f8    the first serial port
        "be177c"  #           09  mov si,0x7c17   the line, behind this code
        "ac 84c0 7403"  #     0c  lodsb; test al,al; jz 14
        "ee ebf8"  #          11  out dx,al; jmp 0c
        "f4 ebef"  #          14  hlt             until the next interrupt; jmp 06
    )
    assert len(code) == 0x17
    assert len(code) + len(line) + 1 <= 510
    return (code + line + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def boot_cd(line: bytes) -> bytes:
    """A CD image with nothing on it but an El Torito boot record without emulation (El Torito 1.0, 1995)."""
    header = struct.Struct("<BBH24sHBB")
    words = struct.unpack("<16H", header.pack(1, 0, 0, b"", 0, 0x55, 0xAA))
    validation = header.pack(1, 0, 0, b"", -sum(words) & 0xFFFF, 0x55, 0xAA)  # its words must add up to 0
    entry = struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 20).ljust(32, b"\0")
    sectors = {
        16: b"\x01CD001\x01",  # primary volume descriptor
        17: (b"\0CD001\x01EL TORITO SPECIFICATION").ljust(71, b"\0") + struct.pack("<I", 19),
        18: b"\xffCD001\x01",  # terminator
        19: validation + entry,
        20: boot_sector(line),
    }
    return b"".join(sectors.get(i, b"").ljust(ISO_SECTOR, b"\0") for i in range(32))
