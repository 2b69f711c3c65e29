"""Hyper-V's binary configuration file (`.vmcx`, 2016 and later): the keys of the XML in a store of tables.

Microsoft has not documented it. What is known publicly, and used here, all little-endian:

    0x0000, 0x1000  two headers; the one with the higher sequence number holds. Signature 0x01282014, checksum,
                    sequence number (16 bits), version (0x400), 8 bytes, alignment, offset and size of the log.
    0x2000          object table: signature 0x01110001, number of entries; each: type (1: another object table,
                    2: key table, 3: file object, 6: log), checksum, offset, size, whether it is in use.
    key table       signature 2, index, sequence number (all 16 bits), checksum; then entries: type and flags, size,
                    table and offset of the parent (table 0: the root), checksum, insertion number, where the data
                    begins; then the name in UTF-8 with a zero byte, then the data. Of two tables with the same index
                    the one with the higher sequence number holds.
    data            3: signed, 4: unsigned, 5: double, 6: text in UTF-16 after its length in bytes, 7: bytes likewise,
                    8: boolean in 32 bits, 9: a section. With the flag 1 the data is size and offset of a file object.

Checksums are not verified, since their algorithm is not known; every offset and length is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hostler.foreign.errors import bad_description
from hostler.foreign.sections import Section, Value

SIGNATURE = 0x01282014
MAX_SIZE = 64 * 1024**2
"""Bytes. Real ones have 50 to 500 KiB."""
MAX_TABLES = 4096
MAX_ENTRIES = 400_000
MAX_DEPTH = 64

_HEADER = struct.Struct("<IIHIQIQQI")
_OBJECT_TABLE = struct.Struct("<II")
_OBJECT = struct.Struct("<BIQIB")
_KEY_TABLE = struct.Struct("<HHHI")
_KEY = struct.Struct("<HIHIIIB")
_LOG = struct.Struct("<III")

_HEADERS_AT = (0x0000, 0x1000)
_OBJECTS_AT = 0x2000
_IS_OBJECT_TABLE, _IS_KEY_TABLE = 1, 2
_FREE, _INT, _UINT, _DOUBLE, _TEXT, _BYTES, _BOOL, _NODE = 1, 3, 4, 5, 6, 7, 8, 9
_IN_FILE_OBJECT = 0x0100


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of a key table. `at` and `parent` are pairs of table index and offset inside the table."""

    at: tuple[int, int]
    parent: tuple[int, int]
    kind: int
    order: int
    name: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Vmcx:
    """What was read. `log_pending`: changes are noted that were not yet written into the tables."""

    root: Section
    log_pending: bool


def is_vmcx(data: bytes) -> bool:
    """Whether this is the beginning of such a file."""
    return any(data[at : at + 4] == struct.pack("<I", SIGNATURE) for at in _HEADERS_AT)


def read_vmcx(data: bytes, path: str) -> Vmcx:
    """The sections of a configuration. InvalidInput when it cannot be read."""
    if len(data) > MAX_SIZE:
        raise bad_description(path, f"has {len(data)} bytes; more than {MAX_SIZE} are not read")
    try:
        return _Reader(data, path).read()
    except (struct.error, UnicodeDecodeError) as error:
        raise bad_description(path, f"is damaged: {error}") from error


class _Reader:
    def __init__(self, data: bytes, path: str) -> None:
        self._data, self._path = data, path
        self._budget = 4 * len(data) + 1024**2
        """Bytes that may be taken out of the file: a hostile one may name one large piece a thousand times."""

    def read(self) -> Vmcx:
        """Everything, from the header on."""
        header = self._header()
        version, log_at, log_size = header[3], header[6], header[7]
        if version != 0x400:
            raise bad_description(
                self._path,
                f"has version {version:#x} of Hyper-V's binary format; only 0x400 is known",
                "import its disks alone, or the VM exported by another version of Hyper-V",
            )
        tables = self._key_tables()
        entries = [entry for index, (_, table) in sorted(tables.items()) for entry in self._entries(index, table)]
        if not entries:
            raise bad_description(self._path, "has no keys")
        return Vmcx(self._tree(entries), self._pending(log_at, log_size))

    def _header(self) -> tuple[int, ...]:
        found = [
            _HEADER.unpack_from(self._data, at)
            for at in _HEADERS_AT
            if len(self._data) >= at + _HEADER.size and self._data[at : at + 4] == struct.pack("<I", SIGNATURE)
        ]
        if not found:
            raise bad_description(self._path, "is no binary configuration of Hyper-V (.vmcx)")
        return max(found, key=lambda header: header[2])

    def _key_tables(self) -> dict[int, tuple[int, bytes]]:
        """By index: sequence number and content of the newest."""
        found: dict[int, tuple[int, bytes]] = {}
        seen = {_OBJECTS_AT}
        waiting = [_OBJECTS_AT]
        while waiting:
            for kind, offset, size in self._objects(waiting.pop()):
                if kind == _IS_OBJECT_TABLE and offset not in seen and len(seen) < MAX_TABLES:
                    seen.add(offset)
                    waiting.append(offset)
                elif kind == _IS_KEY_TABLE:
                    self._note_table(found, offset, size)
        return found

    def _note_table(self, found: dict[int, tuple[int, bytes]], offset: int, size: int) -> None:
        content = self._piece(offset, size)
        signature, index, sequence, _ = _KEY_TABLE.unpack_from(content)
        if signature != 2:
            raise bad_description(self._path, "is damaged: a key table has no signature")
        if index not in found or found[index][0] < sequence:
            found[index] = (sequence, content)
        if len(found) > MAX_TABLES:
            raise bad_description(self._path, "has more tables than any real one")

    def _objects(self, at: int) -> list[tuple[int, int, int]]:
        """Kind, offset and size of what is in use."""
        signature, count = _OBJECT_TABLE.unpack_from(self._data, at)
        if signature != 0x01110001:
            raise bad_description(self._path, "is damaged: its object table has no signature")
        if count > MAX_TABLES:
            raise bad_description(self._path, "has more objects than any real one")
        rows = self._piece(at + _OBJECT_TABLE.size, count * _OBJECT.size)
        return [(kind, offset, size) for kind, _, offset, size, used in _OBJECT.iter_unpack(rows) if used]

    def _entries(self, index: int, table: bytes) -> list[_Entry]:
        found: list[_Entry] = []
        at = _KEY_TABLE.size
        while at + _KEY.size <= len(table) and len(found) < MAX_ENTRIES:
            kind, size, parent_table, parent_at, _, order, data_at = _KEY.unpack_from(table, at)
            if size == 0:
                break
            if size < _KEY.size or at + size > len(table):
                raise bad_description(self._path, "is damaged: an entry is longer than its table")
            if kind & 0xFF != _FREE:
                body = table[at + _KEY.size : at + size]
                name = body[: max(0, data_at - 1)].decode("utf-8")
                value = None if kind & 0xFF == _NODE else self._value(kind, body[data_at:])
                found.append(_Entry((index, at), (parent_table, parent_at), kind & 0xFF, order, name, value))
            at += size
        return found

    def _value(self, kind: int, data: bytes) -> Value | None:
        what = kind & 0xFF
        if what in (_TEXT, _BYTES):
            content = self._content(kind, data)
            return content.decode("utf-16-le").rstrip("\0") if what == _TEXT else content
        if what == _BOOL:
            return bool(struct.unpack_from("<I", data)[0])
        number = {_INT: "<q", _UINT: "<Q", _DOUBLE: "<d"}.get(what)
        if number is None:
            return None
        found: Value = struct.unpack_from(number, data)[0]
        return found

    def _content(self, kind: int, data: bytes) -> bytes:
        if kind & _IN_FILE_OBJECT:
            size, offset = struct.unpack_from("<IQ", data)
            return self._piece(offset, size)
        (length,) = struct.unpack_from("<I", data)
        if length > len(data) - 4:
            raise bad_description(self._path, "is damaged: a value is longer than its entry")
        return data[4 : 4 + length]

    def _piece(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            raise bad_description(self._path, "is cut off: its tables point behind its end")
        self._budget -= size
        if self._budget < 0:
            raise bad_description(self._path, "is damaged: its tables overlap")
        return self._data[offset : offset + size]

    def _tree(self, entries: list[_Entry]) -> Section:
        """Sections from parents that are named by place; what hangs on itself is never reached from the root."""
        below: dict[tuple[int, int], list[_Entry]] = {}
        for entry in entries:
            below.setdefault(entry.parent if entry.parent[0] else (0, 0), []).append(entry)
        root = Section()
        waiting = [(root, (0, 0), 0)]
        while waiting:
            section, place, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise bad_description(self._path, "has deeper sections than any real one")
            for entry in sorted(below.pop(place, []), key=lambda e: e.order):
                if entry.kind == _NODE:
                    waiting.append((section.add_section(entry.name), entry.at, depth + 1))
                elif entry.value is not None:
                    section.add_value(entry.name, entry.value)
        return root.section("configuration")

    def _pending(self, at: int, size: int) -> bool:
        if size == 0 or at + _LOG.size > len(self._data):
            return False
        signature, _, count = _LOG.unpack_from(self._data, at)
        return bool(signature == 0x01110003 and count)
