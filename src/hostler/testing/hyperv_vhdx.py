"""VHDX images with parents and with logs, written from [MS-VHDX]: no program on Linux makes them.

Written apart from `hostler.storage`, which reads them, so that one mistake is not made twice.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KiB, MiB = 1024, 1024 * 1024
SECTOR = 512
LOG_AT, LOG_LENGTH = MiB, MiB
METADATA_AT, TABLE_AT = 2 * MiB, 3 * MiB
"""The table has one MiB; data begins after it."""

_GUIDS = {
    "bat": "2DC27766-F623-4200-9D64-115E9BFD4A08",
    "metadata": "8B7CA206-4790-4B9A-B8FE-575F050F886E",
    "parameters": "CAA16737-FA36-4D43-B3B6-33F0AA44E76B",
    "size": "2FA54224-CD1B-4876-B211-5DBED83BF4B8",
    "disk": "BECA12AB-B2E6-4523-93EF-C309E000C746",
    "logical": "8141BF1D-A96F-4709-BA47-F233A8FAAB5F",
    "physical": "CDA348C7-445D-4471-9CC9-E9885251C556",
    "locator": "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C",
    "locator type": "B04AEFB7-D19E-4A81-B789-25B8E9445913",
}


def guid(name: str) -> bytes:
    """A well-known GUID as it stands in the file."""
    return uuid.UUID(_GUIDS[name]).bytes_le


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC by a table made here."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _row(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 * (value & 1))
    return value


_TABLE = [_row(value) for value in range(256)]


@dataclass(frozen=True, slots=True)
class Parent:
    """What a differencing VHDX writes about its parent: `id` is the parent's data write GUID."""

    id: uuid.UUID
    values: Mapping[str, str]

    @staticmethod
    def of(id: uuid.UUID, file: Path) -> Parent:
        r"""As Hyper-V: `.\NAME`, and a path on drive C."""
        return Parent(id, {"relative_path": f".\\{file.name}", "absolute_win32_path": f"C:\\VMs\\{file.name}"})


@dataclass(slots=True)
class Vhdx:
    """An image to be written. `sectors`: number to 512 bytes. With a parent, blocks with any are partly present, those
    in `full` wholly; without one every block that has a sector is wholly there. `zeroed`: blocks in state "zero"."""

    size: int
    sectors: Mapping[int, bytes]
    parent: Parent | None = None
    block: int = MiB
    full: Sequence[int] = ()
    zeroed: Sequence[int] = ()
    data_id: uuid.UUID = field(default_factory=uuid.uuid4)

    def write(self, path: Path) -> uuid.UUID:
        """Write it closed cleanly, sparse; returns its data write GUID, which children know it by."""
        chunk = (1 << 23) * SECTOR // self.block
        blocks = -(-self.size // self.block)
        per_block = self.block // SECTOR
        table = [0] * (blocks + (-(-blocks // chunk) if self.parent else (blocks - 1) // chunk))
        if self.parent:
            table = [0] * (-(-blocks // chunk) * (chunk + 1))
        at = TABLE_AT + MiB
        with path.open("wb") as file:
            for number in self.zeroed:
                table[number + number // chunk] = 2
            for number in sorted({sector // per_block for sector in self.sectors}):
                partly = self.parent is not None and number not in self.full
                table[number + number // chunk] = (7 if partly else 6) | at
                for sector, data in self.sectors.items():
                    if sector // per_block == number:
                        file.seek(at + (sector - number * per_block) * SECTOR)
                        file.write(data)
                at += self.block
                if partly and not table[number // chunk * (chunk + 1) + chunk]:
                    table[number // chunk * (chunk + 1) + chunk] = 6 | at
                    file.seek(at)
                    file.write(self._bitmap(number // chunk * chunk * per_block))
                    at += MiB
            file.truncate(at)
            file.seek(TABLE_AT)
            file.write(struct.pack(f"<{len(table)}Q", *table))
            file.seek(METADATA_AT)
            file.write(self._metadata())
            file.seek(0)
            file.write(self._front(bytes(16)))
        return self.data_id

    def _bitmap(self, first: int) -> bytes:
        """Of the chunk whose first sector is `first`; the lowest bit of a byte is its first sector."""
        bitmap = bytearray(MiB)
        for sector in self.sectors:
            if 0 <= sector - first < MiB * 8:
                bitmap[(sector - first) // 8] |= 1 << (sector - first) % 8
        return bytes(bitmap)

    def _front(self, log_id: bytes) -> bytes:
        """The first 320 KiB: identifier, headers, region tables."""
        front = bytearray(320 * KiB)
        front[:8] = b"vhdxfile"
        creator = "Hostler's tests".encode("utf-16-le")
        front[8 : 8 + len(creator)] = creator
        for number, at in enumerate((64 * KiB, 128 * KiB)):
            front[at : at + 4 * KiB] = header(self.data_id, number + 1, log_id)
        regions = bytearray(64 * KiB)
        struct.pack_into("<4sIII", regions, 0, b"regi", 0, 2, 0)
        struct.pack_into("<16sQII", regions, 16, guid("bat"), TABLE_AT, MiB, 1)
        struct.pack_into("<16sQII", regions, 48, guid("metadata"), METADATA_AT, MiB, 1)
        struct.pack_into("<I", regions, 4, crc32c(bytes(regions)))
        front[192 * KiB : 256 * KiB] = front[256 * KiB : 320 * KiB] = regions
        return bytes(front)

    def _metadata(self) -> bytes:
        items = [
            ("parameters", struct.pack("<II", self.block, 2 if self.parent else 0), 4),
            ("size", struct.pack("<Q", self.size), 6),
            ("disk", uuid.uuid4().bytes_le, 6),
            ("logical", struct.pack("<I", SECTOR), 6),
            ("physical", struct.pack("<I", 4096), 6),
        ]
        if self.parent:
            items.append(("locator", locator(self.parent), 4))
        table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        content = b""
        for name, data, flags in items:
            table += struct.pack("<16sIIII", guid(name), 64 * KiB + len(content), len(data), flags, 0)
            content += data
        return table.ljust(64 * KiB, b"\0") + content


def locator(parent: Parent) -> bytes:
    """The parent locator item ([MS-VHDX] 2.6.2.6)."""
    values = {"parent_linkage": f"{{{parent.id}}}", **parent.values}
    at = 20 + 12 * len(values)
    entries, texts = b"", b""
    for key, value in values.items():
        name, text = key.encode("utf-16-le"), value.encode("utf-16-le")
        entries += struct.pack("<IIHH", at + len(texts), at + len(texts) + len(name), len(name), len(text))
        texts += name + text
    return guid("locator type") + struct.pack("<HH", 0, len(values)) + entries + texts


def header(data_id: uuid.UUID, sequence: int, log_id: bytes) -> bytes:
    """4 KiB with its checksum."""
    ids = uuid.uuid4().bytes_le + data_id.bytes_le + log_id
    block = struct.pack("<4sIQ", b"head", 0, sequence) + ids + struct.pack("<HHIQ", 0, 1, LOG_LENGTH, LOG_AT)
    block = block.ljust(4 * KiB, b"\0")
    return block[:4] + struct.pack("<I", crc32c(block)) + block[8:]


def log_entry(
    log_id: bytes, sequence: int, tail: int, file_size: int, data: Mapping[int, bytes], zeroes: Mapping[int, int]
) -> bytes:
    """An entry that puts 4 KiB pages (`data`: place to content) and zeroes (place to length)."""
    descriptors, sectors = b"", b""
    for place, length in zeroes.items():
        descriptors += struct.pack("<4s4xQQQ", b"zero", length, place, sequence)
    for place, page in data.items():
        descriptors += struct.pack("<4s4s8sQQ", b"desc", page[4092:], page[:8], place, sequence)
        sectors += (
            struct.pack("<4sI", b"data", sequence >> 32) + page[8:4092] + struct.pack("<I", sequence & 0xFFFFFFFF)
        )
    room = -(-(64 + len(descriptors)) // 4096) * 4096
    length = room + len(sectors)
    head = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, length, tail, sequence, len(data) + len(zeroes), 0, log_id, file_size, file_size
    )
    entry = (head + descriptors).ljust(room, b"\0") + sectors
    return entry[:4] + struct.pack("<I", crc32c(entry)) + entry[8:]


def crash(path: Path, puts: Sequence[tuple[int, bytes]], at: int = 0, zeroes: Mapping[int, int] | None = None) -> None:
    """Make it look as after a crash: the pages of `puts` (place, new 4 KiB) are in the log only, one entry each, the
    first at `at` bytes into the log, and the headers name the log. The entries may wrap around the log's end."""
    log_id = uuid.uuid4().bytes_le
    size = path.stat().st_size
    with path.open("r+b") as file:
        place, tail = at, at
        for number, (where, page) in enumerate(puts):
            entry = log_entry(log_id, 7 + number, tail, size, {where: page}, (zeroes or {}) if number == 0 else {})
            for index in range(0, len(entry), 4096):
                file.seek(LOG_AT + (place + index) % LOG_LENGTH)
                file.write(entry[index : index + 4096])
            place = (place + len(entry)) % LOG_LENGTH
        for start in (64 * KiB, 128 * KiB):
            file.seek(start)
            old = file.read(4 * KiB)
            (sequence,) = struct.unpack_from("<Q", old, 8)
            file.seek(start)
            file.write(header(uuid.UUID(bytes_le=old[32:48]), sequence, log_id))
