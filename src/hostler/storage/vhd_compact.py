"""A dynamic VHD made smaller in place: blocks of zeroes are taken out of its table, the others moved to the front.

What a guest reads is the same at every moment, whatever kills the process: a block is copied and on disk before its
entry in the table changes, and what an entry pointed at is not written again before that is on disk as well.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from array import array
from collections.abc import Iterator

from hostler.model.errors import BadImage
from hostler.storage.chains.source import ImageFile
from hostler.storage.chains.vhd import VhdLayer, bitmap_size, open_vhd
from hostler.storage.copying import Stopped
from hostler.storage.footer import SECTOR, DiskType, parse_footer
from hostler.storage.qemu_img import OnProgress

_UNUSED = 0xFFFFFFFF
_BATCH = 64
"""Blocks moved between two flushes: 128 MiB of the usual ones."""


def compact_vhd(path: str, on_progress: OnProgress, stop: threading.Event) -> None:
    """Give back what its zeroes take. Blocking; durable when it returns. BadImage; OSError, Stopped."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        layer = open_vhd(ImageFile.of(fd, path))
        if layer.kind is not DiskType.DYNAMIC:
            raise BadImage(f"image {path}", "is no dynamic VHD", "choose another one")
        _Compaction(fd, path, layer, stop).run(on_progress)
    finally:
        os.close(fd)


class _Compaction:
    def __init__(self, fd: int, path: str, layer: VhdLayer, stop: threading.Event) -> None:
        self._fd, self._path, self._layer, self._stop = fd, path, layer, stop
        self._length = bitmap_size(layer.block) + layer.block
        self._footer = os.pread(fd, SECTOR, 0)
        found = parse_footer(self._footer)
        if found is None:
            raise BadImage(f"image {path}", "its header's copy of the footer is damaged", "repair it first")
        (count,) = struct.unpack(">I", os.pread(fd, 32, found.table)[28:32])
        self._table = array("I", os.pread(fd, count * 4, layer.table))
        if sys.byteorder == "little":
            self._table.byteswap()
        self._reserved = sorted(
            [(0, SECTOR), (found.table, found.table + 1024), (layer.table, layer.table + count * 4)]
        )

    def run(self, on_progress: OnProgress) -> None:
        used = [index for index, sector in enumerate(self._table) if sector != _UNUSED]
        self._refuse_overlaps(used)
        for number, index in enumerate(used):
            self._check_stop()
            if self._is_empty(index):
                self._point(index, _UNUSED)
            on_progress(0.5 * number / len(used))
        os.fsync(self._fd)
        while self._move_some():
            self._check_stop()
        self._cut()
        on_progress(1.0)

    def _refuse_overlaps(self, used: list[int]) -> None:
        """A damaged image is left alone: moving what lies over something else would lose more."""
        blocks = [(self._table[i] * SECTOR, self._table[i] * SECTOR + self._length) for i in used]
        places = sorted([*self._reserved, *blocks])
        end = 0
        for start, stop in places:
            if start < end:
                raise BadImage(f"image {self._path}", "its blocks lie over each other", "restore it from a backup")
            end = stop

    def _is_empty(self, index: int) -> bool:
        at = self._table[index] * SECTOR + bitmap_size(self._layer.block)
        data = os.pread(self._fd, self._layer.block, at)
        return data == bytes(self._layer.block)

    def _move_some(self) -> bool:
        """Move blocks from the end into gaps before them; False when there are none."""
        gaps = self._gaps()
        last = sorted((i for i, s in enumerate(self._table) if s != _UNUSED), key=lambda i: -self._table[i])
        moves: list[tuple[int, int]] = []
        for index in last[:_BATCH]:
            gap = next(gaps, None)
            if gap is None or gap >= self._table[index] * SECTOR:
                break
            self._check_stop()
            self._write(os.pread(self._fd, self._length, self._table[index] * SECTOR), gap)
            moves.append((index, gap))
        os.fsync(self._fd)
        for index, gap in moves:
            self._point(index, gap // SECTOR)
        os.fsync(self._fd)
        return bool(moves)

    def _gaps(self) -> Iterator[int]:
        """Places for a block, from the front."""
        blocks = [(s * SECTOR, s * SECTOR + self._length) for s in self._table if s != _UNUSED]
        taken = sorted([*self._reserved, *blocks])
        position = 0
        for start, end in taken:
            while position + self._length <= start:
                yield position
                position += self._length
            position = max(position, end + -end % SECTOR)

    def _cut(self) -> None:
        ends = [s * SECTOR + self._length for s in self._table if s != _UNUSED]
        end = max([*ends, *(stop for _, stop in self._reserved)])
        end += -end % SECTOR
        if end + SECTOR < os.fstat(self._fd).st_size:
            self._write(self._footer, end)
            os.fsync(self._fd)
            os.ftruncate(self._fd, end + SECTOR)
            os.fsync(self._fd)

    def _point(self, index: int, sector: int) -> None:
        self._write(struct.pack(">I", sector), self._layer.table + index * 4)
        self._table[index] = sector

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped
