r"""Copying a chain into a new file at the speed of the disks: one thread plans, several copy, one sees to the journal.

    plan -> layout -> moves, in batches -> queue -> threads: read and write
                                                      \-> done up to here -> flushed -> journal

What is zeroes is never written: the new file is all holes at first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hostler.model.errors import BadImage, HostlerError
from hostler.storage.chains import plan
from hostler.storage.chains.journal import Journal, identities
from hostler.storage.chains.layer import Layer
from hostler.storage.chains.layouts import Layout, Write
from hostler.storage.chains.plan import Extent
from hostler.storage.chains.source import LITERAL, ZERO, unreadable

BUFFER = 256 * 1024
"""Bytes read and written at a time by a thread: they stay in the processor's cache on the way."""
MOVE = 8 * 1024 * 1024
"""Bytes of the longest single move; also how much a batch holds at most."""
BATCH = 128
"""Moves of a batch at most: small ones would cost more in the queue than in the copying."""
THREADS = min(4, max(2, os.cpu_count() or 2))
CHECKPOINT = 5.0
"""Seconds between two entries of the journal; so much work at most is done again after a crash."""
_LIBC = ctypes.CDLL(None)
_RANGE_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of sync_file_range(2)."""
TELL = 0.1
"""Seconds between two words about progress."""

_SHARES_EXTENTS = ("btrfs", "xfs", "zfs", "ocfs2", "nfs4", "cifs")
"""File systems where copy_file_range shares the extents or copies on the server; elsewhere it is slower than reading
and writing with a buffer that stays in the processor's cache (ext4, Linux 6.18: by a third)."""


class Move(NamedTuple):
    """`length` bytes from `at` in file `source` (or `literal`) to `to` in the new file; `end`: where they end on the
    disk."""

    source: int
    at: int
    to: int
    length: int
    end: int
    literal: bytes = b""


class Changed(Exception):
    """The plan is not the one that the journal belongs to: begin anew."""


@dataclass(slots=True)
class Count:
    """Units that a layout has placed."""

    units: int = 0


def moves(extents: Iterable[Extent], layout: Layout, write: Write, count: Count) -> Iterator[Move]:
    """What is to be copied where; the layout writes its tables as they are complete."""
    unit, index, base = layout.unit, -1, 0
    for extent in extents:
        if extent.at == ZERO:
            continue
        if not unit:
            yield from _pieces(extent, extent.offset, extent.length, extent.offset)
            continue
        start = position = extent.offset
        to = expected = -1
        while position < extent.end:
            if position // unit != index:
                index = position // unit
                base = layout.place(index, write)
                count.units += 1
            here = base + position - index * unit
            if here != expected and to >= 0:
                yield from _pieces(extent, start, position - start, to)
                start = position
            if here != expected:
                to = here
            step = min(extent.end, (index + 1) * unit) - position
            expected, position = here + step, position + step
        yield from _pieces(extent, start, extent.end - start, to)


def _pieces(extent: Extent, start: int, length: int, to: int) -> Iterator[Move]:
    """A run of an extent in moves of bounded length."""
    for step in range(0, length, MOVE):
        size = min(MOVE, length - step)
        offset = start + step
        if extent.at == LITERAL:
            inside = offset - extent.offset
            yield Move(0, LITERAL, to + step, size, offset + size, extent.literal[inside : inside + size])
        else:
            yield Move(extent.source, extent.at + offset - extent.offset, to + step, size, offset + size)


@dataclass(slots=True)
class _Progress:
    """Which batches are done. Everything up to `done` on the disk is, and what is copied beyond it does not count."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    first: int = 0
    done: int = 0
    units: int = 0

    def begin(self, number: int, end: int, units: int) -> None:
        with self.lock:
            self.ends[number] = (end, units)

    def finish(self, number: int) -> None:
        with self.lock:
            self.finished.add(number)
            while self.first in self.finished:
                self.finished.remove(self.first)
                self.done, self.units = self.ends.pop(self.first)
                self.first += 1


class Copier:
    """Copies `layers` into the open file `target`, whose name (for the journal) is `part`. One use."""

    def __init__(
        self, layers: Sequence[Layer], target: int, part: str, journal: Journal, tell: Callable[[int], None]
    ) -> None:
        """`journal.done` says where to go on; `tell` gets the bytes of the disk that are done, from a thread."""
        self._layers = layers
        self._target = target
        self._part = part
        self._journal = journal
        self._tell = tell
        self._progress = _Progress(done=journal.done, units=journal.units)
        self._queue: queue.Queue[tuple[int, list[Move]] | None] = queue.Queue(THREADS * 4)
        self._failed: list[Exception] = []
        self._over = threading.Event()
        self._clones = file_system(target) in _SHARES_EXTENTS

    def run(self, layout: Layout) -> None:
        """Copy all, then write what describes it. HostlerError, OSError (ENOSPC), Changed."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        keeper = threading.Thread(target=self._keep, daemon=True)
        for thread in (*threads, keeper):
            thread.start()
        try:
            self._plan(layout)
            for _ in threads:
                self._queue.put(None)
            for thread in threads:
                thread.join()
        finally:
            self._over.set()
            self._dismiss(threads)
            keeper.join()
        self._raise()
        end = layout.finish(self._put)
        os.ftruncate(self._target, end)
        if identities(self._layers) != self._journal.sources:
            raise BadImage(
                f"image {self._layers[0].file.path}",
                "was written to while it was copied, or a parent of it was",
                "stop what uses it, and begin again",
            )
        self._tell(self._journal.size)

    def _dismiss(self, threads: Sequence[threading.Thread]) -> None:
        """After a failure: what still waits is not copied any more."""
        while any(thread.is_alive() for thread in threads):
            with suppress(queue.Empty):
                self._queue.get_nowait()
            with suppress(queue.Full):
                self._queue.put_nowait(None)
            threads[0].join(0.01)

    def _plan(self, layout: Layout) -> None:
        size, resume, count = self._layers[0].size, self._journal.done, Count()
        extents = plan.without_holes(self._layers, plan.extents(self._layers, 0, size))
        number, held, batch = 0, 0, list[Move]()
        checked = not resume
        for move in moves(extents, layout, self._put, count):
            if move.end <= resume:
                if move.end == resume:
                    checked = count.units == self._journal.units
                continue
            if not checked:
                raise Changed
            batch.append(move)
            held += move.length
            if held >= MOVE or len(batch) >= BATCH:
                self._hand_out(number, batch, count.units)
                number, held, batch = number + 1, 0, []
        if not checked:
            raise Changed
        if batch:
            self._hand_out(number, batch, count.units)

    def _hand_out(self, number: int, batch: list[Move], units: int) -> None:
        self._progress.begin(number, batch[-1].end, units)
        while True:
            self._raise()
            with suppress(queue.Full):
                self._queue.put((number, batch), timeout=1.0)
                return

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _work(self) -> None:
        buffer = memoryview(bytearray(BUFFER))
        while (taken := self._queue.get()) is not None:
            if self._failed:
                continue
            number, batch = taken
            try:
                for move in batch:
                    self._move(move, buffer)
                self._progress.finish(number)
            except (OSError, HostlerError) as error:
                self._failed.append(error)

    def _move(self, move: Move, buffer: memoryview) -> None:
        if move.at == LITERAL:
            self._put(move.to, move.literal)
            return
        file = self._layers[move.source].file
        at, to, left = move.at, move.to, move.length
        while self._clones and left:
            try:
                moved = os.copy_file_range(file.fd, self._target, left, at, to)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                break
            if not moved:
                break
            at, to, left = at + moved, to + moved, left - moved
        while left:
            piece = buffer[: min(left, BUFFER)]
            try:
                got = os.preadv(file.fd, [piece], at)
            except OSError as error:
                raise unreadable(file.path, error) from error
            if not got:
                raise BadImage(f"image {file.path}", "became shorter while it was copied", "stop what uses it")
            self._put(to, piece[:got])
            at, to, left = at + got, to + got, left - got

    def _put(self, at: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._target, rest, at)
            rest, at = rest[written:], at + written

    def _keep(self) -> None:
        """Tell how far it is, and write the journal every CHECKPOINT seconds."""
        last = time.monotonic()
        while not self._over.wait(TELL):
            _start_writing(self._target)
            with self._progress.lock:
                done, units = self._progress.done, self._progress.units
            self._tell(done)
            if time.monotonic() - last >= CHECKPOINT and done > self._journal.done:
                try:
                    os.fdatasync(self._target)
                    self._journal = replace(self._journal, done=done, units=units)
                    self._journal.write(self._part)
                except OSError as error:
                    self._failed.append(error)
                    return
                last = time.monotonic()


def _start_writing(fd: int) -> None:
    """Let the kernel begin to put on the disk what is written so far, so that the flush at the end is short."""
    _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _RANGE_WRITE)


def file_system(fd: int) -> str:
    """The name of the file system a file is on, by /proc/self/mountinfo; "" where it is not found."""
    found = os.fstat(fd).st_dev
    device = f"{os.major(found)}:{os.minor(found)}"
    try:
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields = line.split(" - ")
                if len(fields) == 2 and fields[0].split()[2] == device:
                    return fields[1].split()[0]
    except OSError:
        return ""
    return ""
