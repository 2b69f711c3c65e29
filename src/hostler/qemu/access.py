"""What a VM's own user may touch: its directories, and the files and devices of its disks. Nothing else.

Each VM's QEMU runs under a user of its own (a number, without an entry in passwd). Disks stay the property of whoever
owns them; the VM's user gets a POSIX access control entry for as long as the VM needs it. The entries are written as
the `system.posix_acl_access` extended attribute directly: starting setfacl would cost more than starting QEMU's disk.

    attribute (all little endian): u32 version = 2, then for each entry u16 tag, u16 permissions, u32 user or group id
    (linux/posix_acl_xattr.h; tags in linux/posix_acl.h)

The mask caps what named users and groups get. Granting must raise it, and must not give others more by that: entries
it capped before are cut to what they really had.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hostler.model.errors import HostLacks, HostlerError, LimitExceeded, NoSpace, NotFound, NotPermitted

UID_BASE: Final = 1_900_000_000
UID_SPAN: Final = 1_000_000
"""Users of VMs: above everything systemd's UIDS-GIDS page gives away (containers end at 1,879,048,191), below 2**31."""

READ: Final = 4
WRITE: Final = 2
SEARCH: Final = 1

_ATTRIBUTE: Final = "system.posix_acl_access"
_VERSION: Final = 2
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_NO_ID: Final = 0xFFFFFFFF


_ONE_AT_A_TIME: Final = threading.Lock()
"""A list is read, changed and written: two at once would lose one's change."""


class Tag(IntEnum):
    OWNER = 0x01
    USER = 0x02
    OWNING_GROUP = 0x04
    GROUP = 0x08
    MASK = 0x10
    OTHER = 0x20


CAPPED: Final = frozenset({Tag.USER, Tag.OWNING_GROUP, Tag.GROUP})


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One line of an access control list. `id` is meant for USER and GROUP only."""

    tag: Tag
    id: int
    permissions: int


Acl = tuple[Entry, ...]


def is_vm_user(uid: int) -> bool:
    """Whether a user id is one of those that VMs get. No other may be given to a QEMU: 0 is root, 1000 a person."""
    return UID_BASE <= uid < UID_BASE + UID_SPAN


def user_for(vm_id: str, taken: Set[int], base: int = UID_BASE, span: int = UID_SPAN) -> int:
    """A user id for a VM that is not in `taken`: by its name's checksum, so that it is most likely free on every host
    the VM moves to, else the next free one. LimitExceeded when the whole range is taken."""
    first = zlib.crc32(vm_id.encode()) % span
    for step in range(min(span, len(taken) + 1)):
        uid = base + (first + step) % span
        if uid not in taken:
            return uid
    raise LimitExceeded(
        f"vm {vm_id}",
        f"all {span} user ids from {base} on are taken",
        "give Hostler a larger range of user ids",
        limit="vm_users",
        value=span + 1,
        maximum=span,
    )


def prepare_directory(path: str, uid: int | None) -> None:
    """Make a directory only its VM's user (and root) can enter; harmless when it is there. `uid` None: ourselves."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise explain(path, error) from error
    try:
        if uid is not None and os.fstat(fd).st_uid != uid:
            os.fchown(fd, uid, uid)
        os.fchmod(fd, 0o700)
    except OSError as error:
        raise explain(path, error) from error
    finally:
        os.close(fd)


def grant(path: str, uid: int, write: bool) -> None:
    """Let `uid` read (and write) one file or block device, whatever else its list says. Harmless when repeated; a later
    grant replaces an earlier one. The owner needs no entry and gets none.

    HostLacks where the file system keeps no access control lists or is read-only (and the file's mode does not let the
    user in anyway), NotFound, NotPermitted where the file is not ours.
    """
    wanted = READ | (WRITE if write else 0)
    try:
        with _ONE_AT_A_TIME:
            _grant(path, uid, wanted)
    except OSError as error:
        raise explain(path, error) from error


def _grant(path: str, uid: int, wanted: int) -> None:
    status = os.stat(path)
    if status.st_uid == uid:
        return
    acl = _read(path, status)
    try:
        _write(path, with_user(acl, uid, wanted))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EROFS) or wanted & ~permissions_of(acl, status, uid):
            raise


def revoke(path: str, uid: int) -> None:
    """Take a grant back. Harmless when there is none, or when the file is gone."""
    try:
        with _ONE_AT_A_TIME:
            before = _read(path, os.stat(path))
            after = without_user(before, uid)
            if after != before:
                _write(path, after)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise explain(path, error) from error


def check_reachable(path: str, uid: int) -> None:
    """HostLacks, naming the directory, when `uid` may not search one of the directories on the way to `path` (as
    written, and behind symbolic links). NotFound when `path` is not there."""
    real = os.path.realpath(path)
    if not os.path.exists(real):
        raise NotFound(f"file {path}", "does not exist", "check the path")
    for directory in dict.fromkeys([*_parents(path), *_parents(real)]):
        status = os.stat(directory)
        if not permissions_of(_read(directory, status), status, uid) & SEARCH:
            raise HostLacks(
                f"file {path}",
                f"the VM's user {uid} may not pass the directory {directory}",
                f"run: chmod o+x {directory} (it lets others pass, not list), or keep the file elsewhere",
            )


def permissions_of(acl: Acl, status: os.stat_result, uid: int) -> int:
    """What the list gives a user whose only group has the same number (acl(5), "access check algorithm")."""
    by_tag = {entry.tag: entry.permissions for entry in acl}
    mask = by_tag.get(Tag.MASK, 7)
    if uid == status.st_uid:
        return by_tag[Tag.OWNER]
    named = [e.permissions & mask for e in acl if e.tag is Tag.USER and e.id == uid]
    if named:
        return named[0]
    groups = [e.permissions & mask for e in acl if e.tag is Tag.GROUP and e.id == uid]
    if uid == status.st_gid:
        groups.append(by_tag[Tag.OWNING_GROUP] & mask)
    # One of several matching groups must give all that is asked; the union is what any of them gives.
    return _union(groups) if groups else by_tag[Tag.OTHER]


def with_user(acl: Acl, uid: int, permissions: int) -> Acl:
    """The list with exactly these permissions for `uid`; nobody else gains or loses anything."""
    kept = without_user(acl, uid)
    mask = next((e.permissions for e in kept if e.tag is Tag.MASK), None)
    if mask is None:
        mask = _union(e.permissions for e in kept if e.tag in CAPPED)
    entries = [
        Entry(e.tag, e.id, e.permissions & mask) if e.tag in CAPPED and permissions & ~mask else e
        for e in kept
        if e.tag is not Tag.MASK
    ]
    return tuple(sorted([*entries, Entry(Tag.USER, uid, permissions), Entry(Tag.MASK, _NO_ID, mask | permissions)]))


def without_user(acl: Acl, uid: int) -> Acl:
    """The list without `uid`. When no named entry is left, the list becomes a plain mode again."""
    left = tuple(e for e in acl if not (e.tag is Tag.USER and e.id == uid))
    if left == acl or any(e.tag in (Tag.USER, Tag.GROUP) for e in left):
        return left
    mask = next((e.permissions for e in left if e.tag is Tag.MASK), 7)
    return tuple(
        Entry(e.tag, e.id, e.permissions & mask) if e.tag is Tag.OWNING_GROUP else e
        for e in left
        if e.tag is not Tag.MASK
    )


def decode(data: bytes) -> Acl:
    """The attribute as entries. ValueError for another version or a torn one."""
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _VERSION:
        raise ValueError("unknown version of an access control list")
    try:
        return tuple(Entry(Tag(tag), id, bits) for tag, bits, id in _ENTRY.iter_unpack(data[_HEADER.size :]))
    except struct.error as error:
        raise ValueError("torn access control list") from error


def encode(acl: Acl) -> bytes:
    """Entries as the attribute."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(e.tag, e.permissions, e.id) for e in acl)


def from_mode(mode: int) -> Acl:
    """The list a plain mode stands for."""
    return (
        Entry(Tag.OWNER, _NO_ID, mode >> 6 & 7),
        Entry(Tag.OWNING_GROUP, _NO_ID, mode >> 3 & 7),
        Entry(Tag.OTHER, _NO_ID, mode & 7),
    )


def _union(permissions: Iterable[int]) -> int:
    result = 0
    for bits in permissions:
        result |= bits
    return result


def _parents(path: str) -> list[str]:
    """Every directory above `path`, from the root down."""
    parents: list[str] = []
    directory = os.path.dirname(os.path.abspath(path))
    while directory not in parents:
        parents.append(directory)
        directory = os.path.dirname(directory)
    return parents[::-1]


def _read(path: str, status: os.stat_result) -> Acl:
    try:
        return decode(os.getxattr(path, _ATTRIBUTE))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return from_mode(stat.S_IMODE(status.st_mode))
        raise


def _write(path: str, acl: Acl) -> None:
    """The kernel turns a list of the three plain entries into a mode and keeps no attribute."""
    os.setxattr(path, _ATTRIBUTE, encode(acl))


def explain(path: str, error: OSError) -> HostlerError:
    """A refusal of the system about a file of a VM, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"file {path}", "its file system is full", "free some space there")
    if error.errno == errno.EOPNOTSUPP:
        return HostLacks(
            f"file {path}",
            "its file system keeps no access control lists, so the VM's user cannot be let in",
            "mount it with ACLs, keep the file elsewhere, or make it readable for the VM's user yourself",
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"file {path}", "does not exist", "check the path")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(f"file {path}", "its permissions are not ours to change", "run the daemon as root")
    return HostLacks(f"file {path}", f"cannot be prepared: {error.strerror}", "look at its file system")
