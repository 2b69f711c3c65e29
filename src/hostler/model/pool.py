"""Pools: places where volumes are.

directory: image files in a directory, local or on any mounted shared file system
library:   a directory that is only read, of installation media (ISO images)
iscsi:     LUNs of a storage system, opened by QEMU's own initiator
nbd:       exports of another machine, over TLS

A pool's secrets (a CHAP secret, the key of a certificate) are kept apart from its record: no view, event or log has
them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from hostler.model.base import Input, Record
from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.vm import AbsolutePath
from hostler.model.volume import Volume

DEFAULT_POOL = "default"
"""The pool of the host's volume directory. Every host has it; it is made by itself."""

WARN_AT = 85
"""Per cent of a pool's capacity in use from which on it is called low."""

MAX_PORTALS = 8


class PoolKind(StrEnum):
    DIRECTORY = "directory"
    LIBRARY = "library"
    ISCSI = "iscsi"
    NBD = "nbd"


class PoolState(StrEnum):
    """ready; low: above its warning threshold; full: next to nothing is left; read-only: its file system refuses
    writes, though it should not; unreachable: it does not answer, or what is there is not what was recorded."""

    READY = "ready"
    LOW = "low"
    FULL = "full"
    READ_ONLY = "read-only"
    UNREACHABLE = "unreachable"


P = PoolState
POOL_TRANSITIONS: dict[PoolState, frozenset[PoolState]] = {state: frozenset(PoolState) - {state} for state in PoolState}
"""A pool's state is seen, not decided: any may follow any."""


def _portal(text: str) -> str:
    """HOST:PORT, [IPv6]:PORT; nothing that a URL, an option list or a command line could take for something else."""
    host, colon, port = text.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-" + (":" if inner != host else "")
    if not colon or not inner or set(inner) - set(allowed):
        raise ValueError("must be HOST:PORT or [IPv6 address]:PORT")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65_535:
        raise ValueError("must end with a port from 1 to 65535")
    return text


PoolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
"""Also part of QEMU's object ids, which allow letters, digits, dots, dashes and underscores."""
Portal = Annotated[str, StringConstraints(max_length=300), AfterValidator(_portal)]
Iqn = Annotated[str, StringConstraints(max_length=223, pattern=r"^(iqn\.|eui\.|naa\.)[A-Za-z0-9.:-]+$")]
"""RFC 7143, 4.2.7: at most 223 bytes."""
Pem = Annotated[str, StringConstraints(max_length=65_536, pattern=r"-----BEGIN ")]
ExportName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[!-~]+$")]
_Path = Annotated[AbsolutePath, StringConstraints(max_length=4096)]
_Notes = Annotated[str, StringConstraints(max_length=16_384)]
_User = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[!-~]+$")]
_Secret = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[ -~]+$")]


class Pool(Record):
    """A pool as a host keeps it.

    `path`: the directory; `mount`: the mount point it was on when it was made ("" for the root file system), without
    which it is not the same place. `portals` (HOST:PORT) are ways to one storage system: the first that answers is
    taken. `target`: the iSCSI target's name; `initiator`: by which name this host logs in. `chap_user`: "" for a target
    that asks for none. `exports`: names of NBD exports, for a server that does not list them. `tls`: whether it is
    reached over TLS, `tls_hostname`: the name in the server's certificate, where it is not the host's.
    """

    name: PoolName
    kind: PoolKind
    path: str = ""
    mount: str = ""
    portals: tuple[str, ...] = ()
    target: str = ""
    initiator: str = ""
    chap_user: str = ""
    exports: tuple[str, ...] = ()
    tls: bool = False
    tls_hostname: str = ""
    warn_at: int = Field(default=WARN_AT, ge=1, le=100)
    notes: str = ""
    created: datetime | None = None

    @property
    def makes(self) -> bool:
        """Whether volumes are made and deleted in it; else they are what is there."""
        return self.kind is PoolKind.DIRECTORY

    @property
    def in_files(self) -> bool:
        """Whether its volumes are files of this host's file system."""
        return self.kind in (PoolKind.DIRECTORY, PoolKind.LIBRARY)

    @property
    def writes(self) -> bool:
        """Whether guests may write what is in it."""
        return self.kind is not PoolKind.LIBRARY

    @property
    def where(self) -> str:
        """Its place, for people."""
        if self.in_files:
            return self.path
        ways = ", ".join(self.portals)
        return f"{self.target} at {ways}" if self.target else ways


class PoolSecrets(Record):
    """What nobody but this host and its QEMUs may see. PEM texts."""

    chap_secret: str = Field(default="", repr=False)
    ca: str = Field(default="", repr=False)
    certificate: str = Field(default="", repr=False)
    key: str = Field(default="", repr=False)


class Connection(Record):
    """What one VM's QEMU needs to reach a network pool. No secret is in it, only where QEMU finds it: `secret_file` (a
    CHAP secret) and `tls_dir` (ca-cert.pem, client-cert.pem, client-key.pem). `portal`: the way that answers now."""

    pool: str
    kind: PoolKind
    portal: str
    initiator: str = ""
    user: str = ""
    secret_file: str = ""
    tls_dir: str = ""
    tls_hostname: str = ""


class Features(Record):
    """What a directory's file system can do, found by trying. `kind`: its type, as the kernel calls it."""

    kind: str = ""
    fallocate: bool = False
    reflink: bool = False
    """Copies share their blocks until one is written (FICLONE)."""
    punch_hole: bool = False
    """What a guest trims is given back."""
    direct: bool = False
    """The page cache can be passed by (O_DIRECT), which the cache mode `none` needs."""
    acl: bool = False
    """Access control lists, by which each VM's QEMU gets at its own disks."""


class Usage(Record):
    """Bytes. None where a storage system does not tell."""

    capacity: int | None = None
    free: int | None = None


class Health(Record):
    """How a pool answered. `latency`: seconds a small write took to be on the disk, or a storage system to answer."""

    state: PoolState
    text: str = ""
    latency: float | None = None
    usage: Usage = Usage()


class PoolView(Pool):
    """A pool as people see it, without its secrets.

    `allocated`: what its volumes take now; `promised`: what they take when their guests fill them. `warnings` are
    sentences. Bytes; `latency` in seconds.
    """

    state: PoolState = PoolState.READY
    text: str = ""
    latency: float | None = None
    capacity: int | None = None
    free: int | None = None
    allocated: int = 0
    promised: int = 0
    volumes: int = 0
    features: Features | None = None
    has_secret: bool = False
    warnings: tuple[str, ...] = ()
    checked: datetime | None = None


class Found(Record):
    """Something in a pool that can be a volume. `identity`: what a LUN calls itself, whichever way it is reached."""

    name: str
    path: str
    kind: SourceKind = SourceKind.VOLUME
    format: ImageFormat = ImageFormat.RAW
    size: int = 0
    allocated: int = 0
    identity: str = ""


class Leftover(Record):
    """A half-made file that nobody finishes. `age`: seconds since it was last written."""

    path: str
    size: int
    age: float


class Refused(Record):
    """Something in a pool that is no volume, and why."""

    path: str
    why: str


class ScanReport(Record):
    """What a scan found, and what it did about it. `unknown`: in the pool, in no record; `missing`: volumes on record
    whose file or LUN is gone; `changed`: volumes that are not what they were (another LUN, another size).
    `adopted` and `deleted`: what was done about `unknown` and `leftovers` (with a dry run: what would be). `truncated`:
    there is more than was looked at."""

    pool: str
    unknown: tuple[Found, ...] = ()
    missing: tuple[str, ...] = ()
    changed: tuple[Refused, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    refused: tuple[Refused, ...] = ()
    adopted: tuple[Volume, ...] = ()
    deleted: tuple[str, ...] = ()
    truncated: bool = False
    dry_run: bool = False


class StorageTarget(Record):
    """An iSCSI target that a portal tells of."""

    target: str
    portals: tuple[str, ...] = ()


class _Secretive(Input):
    """A request with secrets in it: what is wrong with it is told without repeating it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class TlsFiles(_Secretive):
    """X.509 for a client, as PEM: the authority that signed the server, our certificate, its key (not encrypted)."""

    ca: Pem = Field(repr=False)
    certificate: Pem = Field(repr=False)
    key: Pem = Field(repr=False)


class _Access(_Secretive):
    """What stands in requests about reaching a storage system."""

    portals: tuple[Portal, ...] = Field(default=(), max_length=MAX_PORTALS)
    initiator: Iqn | None = None
    chap_user: _User | None = None
    chap_secret: _Secret | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _chap(self) -> Self:
        if (self.chap_user is None) != (self.chap_secret is None):
            raise ValueError("give 'chap_user' and 'chap_secret' together")
        return self


class PoolCreate(_Access):
    """A new pool: `path` for a directory or library; `portals` and `target` for iscsi; `portals` (one) for nbd, with
    `tls`, or `insecure` for one without TLS. `unchecked`: also one that does not answer now."""

    name: PoolName
    kind: PoolKind = PoolKind.DIRECTORY
    path: _Path | None = None
    target: Iqn | None = None
    exports: tuple[ExportName, ...] = Field(default=(), max_length=256)
    tls: TlsFiles | None = None
    tls_hostname: Annotated[str, StringConstraints(max_length=253, pattern=r"^[A-Za-z0-9.-]+$")] | None = None
    insecure: bool = False
    warn_at: int = Field(default=WARN_AT, ge=1, le=100)
    notes: _Notes = ""
    unchecked: bool = False

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        files = self.kind in (PoolKind.DIRECTORY, PoolKind.LIBRARY)
        if files != (self.path is not None):
            raise ValueError("give 'path' exactly for a directory or library")
        if files == bool(self.portals):
            raise ValueError("give 'portals' exactly for iscsi and nbd")
        if (self.kind is PoolKind.ISCSI) != (self.target is not None):
            raise ValueError("give 'target' exactly for iscsi")
        if self.kind is not PoolKind.ISCSI and (self.initiator or self.chap_user):
            raise ValueError("'initiator' and CHAP are for iscsi")
        self._nbd()
        return self

    def _nbd(self) -> None:
        if self.kind is not PoolKind.NBD:
            if self.tls or self.exports or self.insecure or self.tls_hostname:
                raise ValueError("'tls', 'tls_hostname', 'insecure' and 'exports' are for nbd")
            return
        if len(self.portals) != 1:
            raise ValueError("nbd has exactly one portal")
        if (self.tls is not None) == self.insecure:
            raise ValueError("nbd needs 'tls', or 'insecure' to go without")


class PoolChange(_Access):
    """Fields left out stay as they are. An empty `chap_user` cannot be given: make the pool anew for that."""

    warn_at: int | None = Field(default=None, ge=1, le=100)
    notes: _Notes | None = None
    tls: TlsFiles | None = None


class PoolScan(Input):
    """`adopt`: make volumes of what no record knows; `delete_leftovers`: remove half-made files; `dry_run`: only say
    what these would do."""

    adopt: bool = False
    delete_leftovers: bool = False
    dry_run: bool = False


class Discover(_Access):
    """Ask iSCSI portals which targets they have."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.portals:
            raise ValueError("give at least one of 'portals'")
        return self


class Placement(Record):
    """Where a new volume would go: its path, format and pool. `free`: bytes free in the pool now (None: not told);
    `identity` for a LUN that would be taken."""

    pool: str
    path: str
    kind: SourceKind = SourceKind.VOLUME
    format: ImageFormat = ImageFormat.QCOW2
    size: int
    free: int | None = None
    identity: str = ""


def source_of(volume: Volume) -> DiskSource:
    """A volume as what is behind a disk."""
    return DiskSource(
        kind=volume.kind,
        path=volume.path,
        format=volume.format,
        size=volume.size,
        node=volume.node,
        pool="" if volume.kind is SourceKind.VOLUME else volume.pool,
        identity=volume.identity,
    )


def state_of(usage: Usage, warn_at: int) -> PoolState:
    """How a pool that answers is, by what is left. Full is what leaves less than the reserve."""
    if not usage.capacity or usage.free is None:
        return PoolState.READY
    if usage.free <= reserve(usage):
        return PoolState.FULL
    used = usage.capacity - usage.free
    return PoolState.LOW if used * 100 >= usage.capacity * warn_at else PoolState.READY


def reserve(usage: Usage) -> int:
    """Bytes that must be free before a guest that met a full pool goes on: a fiftieth, at most 256 MiB. Going on with
    less would stop it again at once."""
    return min((usage.capacity or 0) // 50, 256 * 1024**2)
