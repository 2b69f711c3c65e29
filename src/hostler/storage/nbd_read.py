"""Reading an image through `qemu-nbd`: what only QEMU can read, such as compressed clusters of a qcow2.

The NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md), as far as a reader of one export needs it: the fixed
newstyle handshake with NBD_OPT_EXPORT_NAME, then read requests and their simple replies, one after the other.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage, TimedOut
from hostler.storage import programs
from hostler.storage.qemu_img import COPY_BOUNDS, QemuImg, explain, source_options

START = 30.0
"""Seconds until it answers; it has opened the image by then."""
ANSWER = 120.0
"""Seconds for one read; a disk may retry a bad sector for half a minute."""
_POLL = 0.005
_MAGIC, _OPTION = b"NBDMAGIC", b"IHAVEOPT"
_EXPORT_NAME, _NO_ZEROES = 1, 2
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698


class NbdImage:
    """A connection to a qemu-nbd that has one image open, read only."""

    def __init__(self, path: str, connection: socket.socket) -> None:
        self._path = path
        self._connection = connection

    @staticmethod
    @asynccontextmanager
    async def of(path: str, format: ImageFormat, size: int, opener: QemuImg) -> AsyncIterator[NbdImage]:
        """One while the block runs. BadImage when QEMU does not open the image, or not all of it; InUse, HostLacks."""
        with tempfile.TemporaryDirectory(prefix="hostler-nbd-") as directory, opener.admit({path: False}) as as_user:
            if as_user is not None:
                os.chown(directory, as_user.uid, as_user.uid)
            at = f"{directory}/nbd"
            argv = ["qemu-nbd", "-r", "-k", at, "-e", "1", *source_options(path, format)]
            async with programs.running(argv, COPY_BOUNDS, as_user) as process:
                connection = await _connect(path, at, process)
                with connection:
                    image = NbdImage(path, connection)
                    found = await asyncio.to_thread(image._greet)
                    if found < size:
                        raise BadImage(f"image {path}", f"QEMU sees {found} bytes of {size} in it", "check the file")
                    yield image

    def read(self, offset: int, length: int) -> bytes:
        """Blocking. BadImage when the image cannot be read there."""
        if length == 0:
            return b""
        try:
            self._connection.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, 0, 0, offset, length))
            magic, error, _ = _REPLY.unpack(self._receive(_REPLY.size))
            if magic != _REPLY_MAGIC or error:
                raise self._failed(f"error {error}")
            return self._receive(length)
        except OSError as broken:
            raise self._failed(broken.strerror or "no answer") from broken

    def _greet(self) -> int:
        """The handshake; the size of the export in bytes."""
        try:
            greeting = self._receive(18)
            if greeting[:16] != _MAGIC + _OPTION:
                raise self._failed("no NBD server")
            self._connection.sendall(struct.pack(">I", _NO_ZEROES | 1) + _OPTION + struct.pack(">II", _EXPORT_NAME, 0))
            size: int = struct.unpack(">QH", self._receive(10))[0]
            return size
        except OSError as broken:
            raise self._failed(broken.strerror or "no answer") from broken

    def _receive(self, length: int) -> bytes:
        found = bytearray(length)
        view = memoryview(found)
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise self._failed("QEMU closed the connection")
            view = view[count:]
        return bytes(found)

    def _failed(self, why: str) -> BadImage:
        return BadImage(f"image {self._path}", f"QEMU cannot read it: {why}", "check it: hostler volume validate")


async def _connect(path: str, at: str, process: asyncio.subprocess.Process) -> socket.socket:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.returncode is not None:
            _, err = await process.communicate()
            outcome = programs.Outcome(process.returncode, "", err.decode("utf-8", "replace"))
            raise explain(f"image {path}", outcome, Path(path).parent, looking=True)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER)
        with suppress(OSError):
            connection.connect(at)
            return connection
        connection.close()
        await asyncio.sleep(_POLL)
    raise TimedOut(f"image {path}", f"qemu-nbd did not answer within {START:.0f} s", "look at the disk it is on")
