"""Pools of files: a directory in which volumes are made, and a library of installation media, which is only read."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostler.model.disk import ImageFormat
from hostler.model.errors import HostlerError, InvalidInput, NotFound, NotPermitted, TimedOut
from hostler.model.pool import (
    Connection,
    Features,
    Found,
    Health,
    Leftover,
    Pool,
    PoolKind,
    PoolState,
    Refused,
    Usage,
    state_of,
)
from hostler.model.volume import Volume
from hostler.storage.files import open_regular
from hostler.storage.formats import SUFFIX, recognise
from hostler.storage.pools import filesystem
from hostler.storage.pools.contract import DEADLINE, MAX_SCAN, SCAN_DEADLINE, Contents
from hostler.storage.pools.lane import Lane
from hostler.storage.qemu_img import PART

ABANDONED = 3600.0
"""Seconds without a write after which a half-made file counts as left behind: on a shared file system another host may
be making it."""

_RAW_NAMES = {".raw", ".img", ".iso"}
"""Endings of names by which a file without a known header is believed to be raw. Everything else is refused: it may as
well be a text, or a damaged image."""
_ISO_MARK = (32_769, b"CD001")
"""ECMA-119, 6.2.1 and 8.1.2: the standard identifier of the first volume descriptor, in sector 16 of 2048 bytes."""
_SLOW = 1.0


class DirectoryPool:
    """A directory of image files, or a library of media."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lane = Lane(f"pool {pool.name}")

    @property
    def pool(self) -> Pool:
        """Its record."""
        return self._pool

    async def check(self) -> Health:
        """Look, write a little where it may be written, and tell how long that took."""
        try:
            return await self._lane.run(self._look, DEADLINE)
        except TimedOut as error:
            return Health(state=PoolState.UNREACHABLE, text=error.cause)

    async def usage(self) -> Usage:
        """Of its file system."""
        return await self._lane.run(lambda: filesystem.usage(self._pool.path), DEADLINE)

    async def features(self) -> Features | None:
        """Of its file system; what needs writing cannot be tried in a library."""
        return await self._lane.run(self._features, DEADLINE)

    async def scan(self, known: frozenset[str]) -> Contents:
        """Every file in it, not below it: image, no image, or half made."""
        return await self._lane.run(lambda: self._scan(known), SCAN_DEADLINE)

    def place(self, name: str, format: ImageFormat) -> str:
        """NAME with the ending of its format."""
        if not self._pool.makes:
            raise InvalidInput(
                f"pool {self._pool.name}",
                "is a library, in which nothing is made",
                "copy the ISO image into its directory yourself, or choose another pool",
            )
        return os.path.join(self._pool.path, name + SUFFIX[format])

    async def find(self, path: str) -> Found:
        """The file at `path`."""
        return await self._lane.run(lambda: self._found(path, Path(path).name), DEADLINE)

    async def present(self, volumes: Sequence[Volume]) -> dict[str, Found]:
        """Those whose file is there."""
        return await self._lane.run(lambda: self._present(volumes), SCAN_DEADLINE)

    async def allocated(self, volumes: Sequence[Volume]) -> int:
        """By the blocks of their files."""
        return sum(f.allocated for f in (await self._lane.run(lambda: _there(volumes), DEADLINE)).values())

    async def remove_leftover(self, leftover: Leftover) -> None:
        """Unlink it, unless somebody has gone on writing it."""
        await self._lane.run(lambda: _remove_leftover(leftover.path), DEADLINE)

    async def connection(self) -> Connection | None:
        """Files need none."""
        return None

    # in the lane

    def _look(self) -> Health:
        pool = self._pool
        try:
            self._require_mounted()
            usage = filesystem.usage(pool.path)
            if not os.access(pool.path, os.R_OK | os.X_OK):
                return Health(state=PoolState.UNREACHABLE, text=f"{pool.path} may not be read by this daemon")
            if pool.kind is PoolKind.LIBRARY:
                os.listdir(pool.path)
                return Health(state=PoolState.READY, usage=usage)
            if filesystem.is_read_only(pool.path):
                return Health(state=PoolState.READ_ONLY, text="its file system is mounted read-only", usage=usage)
            latency = filesystem.write_latency(pool.path)
        except NotFound as error:
            return Health(state=PoolState.UNREACHABLE, text=error.cause)
        except OSError as error:
            return self._failed(error)
        text = f"slow: a small write took {latency:.1f} s" if latency > _SLOW else ""
        return Health(state=state_of(usage, pool.warn_at), text=text, latency=latency, usage=usage)

    def _failed(self, error: OSError) -> Health:
        path = self._pool.path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Health(state=PoolState.FULL, text="nothing more can be written", usage=filesystem.usage(path))
        if error.errno == errno.EROFS:
            return Health(state=PoolState.READ_ONLY, text="its file system refuses writes")
        if error.errno in (errno.EACCES, errno.EPERM):
            return Health(state=PoolState.READ_ONLY, text=f"this daemon may not write in {path}")
        return Health(state=PoolState.UNREACHABLE, text=f"{path}: {error.strerror}")

    def _require_mounted(self) -> None:
        """An unmounted share leaves an empty directory behind: volumes made there would be lost sight of later."""
        mount, path = self._pool.mount, self._pool.path
        if mount and not os.path.ismount(mount):
            raise NotFound(f"pool {self._pool.name}", f"nothing is mounted at {mount}", f"run: mount {mount}")
        if not os.path.isdir(path):
            raise NotFound(f"pool {self._pool.name}", f"the directory {path} does not exist", "make it, or mount it")

    def _present(self, volumes: Sequence[Volume]) -> dict[str, Found]:
        self._require_mounted()  # else every volume would look as if it were gone
        return _there(volumes)

    def _features(self) -> Features:
        if self._pool.kind is PoolKind.LIBRARY:
            return Features(kind=filesystem.filesystem_type(self._pool.path))
        try:
            return filesystem.features(self._pool.path)
        except OSError:
            return Features(kind=filesystem.filesystem_type(self._pool.path))

    def _scan(self, known: frozenset[str]) -> Contents:
        self._require_mounted()
        found: list[Found] = []
        refused: list[Refused] = []
        leftovers: list[Leftover] = []
        truncated = False
        for count, (path, status) in enumerate(self._files()):
            if count >= MAX_SCAN:
                truncated = True
                break
            name = os.path.basename(path)
            if path in known:
                continue
            if name.endswith(PART):
                # Temporary names are `.DIGEST.RANDOM.hostler-part`; those of a volume being made are known.
                leftovers += (
                    [] if f"{os.path.dirname(path)}/.{name.split('.')[1]}." in known else _leftover(path, status)
                )
            elif name.startswith("."):
                continue
            else:
                try:
                    found.append(self._found(path, name))
                except HostlerError as error:
                    refused.append(Refused(path=path, why=error.cause))
        return Contents(found, refused, leftovers, truncated)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Regular files, not what links lead to: a link into the pool may lead anywhere."""
        real = os.path.realpath(self._pool.path)
        with os.scandir(real) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield entry.path, status

    def _found(self, path: str, name: str) -> Found:
        if self._pool.kind is PoolKind.LIBRARY:
            return _medium(path, name)
        shape = recognise(path)
        stem, ending = os.path.splitext(name)
        if shape.format is ImageFormat.RAW and ending.lower() not in _RAW_NAMES:
            raise InvalidInput(f"file {path}", "has no header of a known image format", "register it as raw if it is")
        return Found(name=stem, path=path, format=shape.format, size=shape.size, allocated=shape.allocated)


def _there(volumes: Sequence[Volume]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for volume in volumes:
        try:
            status = os.stat(volume.path)
        except OSError:
            continue
        found[volume.path] = Found(
            name=volume.name, path=volume.path, size=volume.size, allocated=status.st_blocks * 512
        )
    return found


def _medium(path: str, name: str) -> Found:
    """An ISO image, by its mark (also where it is a hybrid that a USB stick could boot from)."""
    fd = open_regular(path)
    try:
        at, mark = _ISO_MARK
        if os.pread(fd, len(mark), at) != mark:
            raise InvalidInput(f"file {path}", "is no ISO 9660 image", "keep other images in a directory pool")
        status = os.fstat(fd)
    except OSError as error:
        raise InvalidInput(f"file {path}", f"cannot be read: {error.strerror}", "look at its disk") from error
    finally:
        os.close(fd)
    return Found(name=name, path=path, size=status.st_size, allocated=status.st_blocks * 512)


def _remove_leftover(path: str) -> None:
    try:
        if _leftover(path, os.lstat(path)):
            os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise NotPermitted(f"file {path}", f"cannot be removed: {error.strerror}", "remove it by hand") from error


def _leftover(path: str, status: os.stat_result) -> list[Leftover]:
    age = time.time() - status.st_mtime
    return [Leftover(path=path, size=status.st_blocks * 512, age=age)] if age >= ABANDONED else []
