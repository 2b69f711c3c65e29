"""A directory of backups, of any number of VMs.

    DIR/hostler-backups.json             says that it is one
    DIR/VM-ID/.lock                      held (flock) by whoever makes, reads or removes a backup of that VM
    DIR/VM-ID/BACKUP-ID/manifest.json    the backup: written last, so one that was broken off is none
    DIR/VM-ID/BACKUP-ID/DISK.qcow2       what the backup itself holds of a disk
    DIR/VM-ID/BACKUP-ID/DISK.sums        a SHA-256 for each block of it
    DIR/VM-ID/.making-BACKUP-ID/         one that is being made, or was broken off

Names of files are made from ids, never read from a manifest. Everything is for its owner only: it is all that the VMs
know. Blocking: use it from a thread. It may lie on a share that several hosts use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hostler.model.backup import BackedDisk, Backup
from hostler.model.errors import BadImage, Busy, HostlerError, InvalidInput, NotFound
from hostler.storage.backups.reading import Link
from hostler.storage.qemu_img import explain_os

MARKER = "hostler-backups.json"
MANIFEST = "manifest.json"
_MAKING = ".making-"
_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_VM = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
MANIFEST_MAX = 4 * 1024 * 1024
"""Bytes of a manifest; one of a VM with 256 disks has some 200 KiB."""
MOST = 100_000
"""Backups of one VM that are looked at."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A backup whose manifest cannot be read."""

    vm: str
    id: str
    cause: str


class BackupDirectory:
    """The directory at `path` (absolute)."""

    def __init__(self, path: str) -> None:
        if not path.startswith("/") or "\0" in path:
            raise InvalidInput(f"directory {path!r}", "is not an absolute path", "write it from the root: /srv/backups")
        self.path = Path(os.path.realpath(path))

    # the directory

    def prepare(self) -> None:
        """Make it a directory of backups. It is made where its parent is there; one that has something else in it is
        refused."""
        try:
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            if (self.path / MARKER).is_file():
                return
            if any(name not in ("lost+found", f"{MARKER}.new") for name in os.listdir(self.path)):
                raise InvalidInput(
                    f"directory {self.path}",
                    "is no directory of backups, and is not empty",
                    "choose an empty or a new one",
                )
            _write(self.path / MARKER, json.dumps({"format": 1}).encode())
        except OSError as error:
            raise explain_os(f"directory {self.path}", error, self.path.parent) from error

    def require(self) -> None:
        """NotFound unless it is a directory of backups."""
        if not (self.path / MARKER).is_file():
            raise NotFound(f"directory {self.path}", "is no directory of backups", "'hostler backup run' makes one")

    def vms(self) -> Sequence[str]:
        """Ids of the VMs that have backups in it."""
        self.require()
        return sorted(n for n in os.listdir(self.path) if _VM.fullmatch(n) and (self.path / n).is_dir())

    @contextmanager
    def locked(self, vm: str, shared: bool = False) -> Iterator[None]:
        """Keep others from changing (or, where not `shared`, from reading) that VM's backups. Busy when they do."""
        place = self._vm(vm)
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise explain_os(f"directory {place}", error, place) from error
        try:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(
                    f"backups of vm {vm} in {self.path}",
                    "are being made, read or removed by somebody else",
                    "wait for that",
                ) from error
            yield
        finally:
            os.close(fd)

    def free(self) -> int:
        """Bytes that its file system has left for us."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    # looking

    def backups(self, vm: str) -> tuple[list[Backup], list[Damaged]]:
        """That VM's backups, oldest first, and those that cannot be read."""
        good: list[Backup] = []
        bad: list[Damaged] = []
        place = self._vm(vm)
        names = sorted(os.listdir(place)) if place.is_dir() else []
        for name in [n for n in names if _ID.fullmatch(n)][:MOST]:
            try:
                good.append(self.read(vm, name))
            except HostlerError as error:
                bad.append(Damaged(vm, name, error.cause))
        return good, bad

    def find(self, backup_id: str) -> Backup:
        """The backup with that id (or an unambiguous beginning of it), whatever VM it is of. NotFound."""
        hits = [(vm, n) for vm in self.vms() for n in os.listdir(self.path / vm) if _ID.fullmatch(n)]
        exact = [h for h in hits if h[1] == backup_id] or [h for h in hits if h[1].startswith(backup_id)]
        if len(exact) != 1 or not backup_id:
            cause = "is not in that directory" if not exact else "is the beginning of several ids"
            raise NotFound(f"backup {backup_id}", cause, f"list them with 'hostler backup list {self.path}'")
        return self.read(*exact[0])

    def read(self, vm: str, backup_id: str) -> Backup:
        """A manifest. NotFound, BadImage."""
        subject = f"backup {backup_id}"
        try:
            with open(self._backup(vm, backup_id) / MANIFEST, "rb", opener=_nofollow) as file:
                content = file.read(MANIFEST_MAX + 1)
        except FileNotFoundError as error:
            raise NotFound(subject, "is not there, or was never finished") from error
        except OSError as error:
            raise BadImage(subject, f"its manifest cannot be read: {error.strerror}") from error
        try:
            envelope = json.loads(content)
            body = envelope["backup"]
            backup = Backup.model_validate(body)
            intact = envelope["sha256"] == _digest(body)
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            raise BadImage(subject, "its manifest is damaged", "use another backup") from error
        if not intact or (backup.vm, backup.id) != (vm, backup_id):
            raise BadImage(subject, "its manifest is damaged, or was moved here", "use another backup")
        return backup

    def link(self, backup: Backup, disk: BackedDisk) -> Link:
        """Where that disk's file is."""
        return Link(backup.id, disk, disk_file(self._backup(backup.vm, backup.id), disk.id))

    # changing

    def making(self, vm: str, backup_id: str) -> Path:
        """Where that backup is while it is made."""
        _check_id(backup_id)
        return self._vm(vm) / f"{_MAKING}{backup_id}"

    def begin(self, vm: str, backup_id: str) -> Path:
        """An empty place for that backup; what an earlier attempt left there goes."""
        place = self.making(vm, backup_id)
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700)
        except OSError as error:
            raise explain_os(f"directory {place}", error, place.parent) from error
        return place

    def abandon(self, vm: str, backup_id: str) -> None:
        """Remove one that was not finished. Harmless when there is none."""
        shutil.rmtree(self.making(vm, backup_id), ignore_errors=True)

    def commit(self, backup: Backup) -> None:
        """Its files are complete: from now on it is there. Harmless when it is."""
        place, final = self.making(backup.vm, backup.id), self._backup(backup.vm, backup.id)
        if not place.exists() and final.exists():
            return
        try:
            body = backup.to_json()
            _write(place / MANIFEST, json.dumps({"sha256": _digest(body), "backup": body}, indent=1).encode())
            os.rename(place, final)
            _sync(final.parent)
        except OSError as error:
            raise explain_os(f"backup {backup.id}", error, place) from error

    def exists(self, vm: str, backup_id: str) -> bool:
        """Whether that backup is there, whole."""
        return (self._backup(vm, backup_id) / MANIFEST).is_file()

    def remove(self, vm: str, backup_id: str) -> None:
        """Remove a backup: first what makes it one, then the rest. Harmless when it is gone."""
        place = self._backup(vm, backup_id)
        try:
            with suppress(FileNotFoundError):
                os.rename(place, self.making(vm, backup_id))
                _sync(place.parent)
            shutil.rmtree(self.making(vm, backup_id))
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain_os(f"backup {backup_id}", error, place) from error

    def sweep(self, vm: str) -> None:
        """Remove what was broken off. Only while the VM's lock is held."""
        place = self._vm(vm)
        for name in os.listdir(place) if place.is_dir() else []:
            if name.startswith(_MAKING):
                shutil.rmtree(place / name, ignore_errors=True)

    def _vm(self, vm: str) -> Path:
        if not _VM.fullmatch(vm):
            raise InvalidInput(f"vm id {vm[:80]!r}", "is not an id of a VM")
        return self.path / vm

    def _backup(self, vm: str, backup_id: str) -> Path:
        _check_id(backup_id)
        return self._vm(vm) / backup_id


def disk_file(place: Path, disk_id: str) -> Path:
    """The file of a disk in the place of a backup."""
    return place / f"{disk_id}.qcow2"


def _check_id(backup_id: str) -> None:
    if not _ID.fullmatch(backup_id):
        raise InvalidInput(f"backup {backup_id[:80]!r}", "is not an id of a backup", "see 'hostler backup list'")


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _nofollow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and on disk."""
    new = path.with_name(path.name + ".new")
    with suppress(FileNotFoundError):
        new.unlink()
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)
    os.rename(new, path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
