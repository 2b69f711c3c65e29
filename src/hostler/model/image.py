"""What is known of an image beside its being a volume: what is inside of it, whether it is sound, who uses it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from hostler.model.base import Record
from hostler.model.volume import Volume


class UserKind(StrEnum):
    VM = "vm"
    VOLUME = "volume"
    CHECKPOINT = "checkpoint"
    JOB = "job"


class Dependent(Record):
    """Something that would break, or lose data, without a volume. `how` is a sentence's end: "is disk disk0 of it"."""

    kind: UserKind
    id: str
    name: str
    how: str


class VolumeView(Volume):
    """A volume and everybody who depends on it."""

    users: tuple[Dependent, ...] = ()


class AllocationMap(Record):
    """Where an image keeps its content. Bytes of the virtual disk: `data` is written, `zeroes` reads as zeroes without
    being stored; `extents` runs of data that are one piece on the virtual disk and in the file; `fragments` those that
    lie elsewhere in the file than right behind the run before. `complete` False: there are more than were counted."""

    data: int = Field(default=0, ge=0)
    zeroes: int = Field(default=0, ge=0)
    extents: int = Field(default=0, ge=0)
    fragments: int = Field(default=0, ge=0)
    complete: bool = True


class ImageSnapshot(Record):
    """A snapshot inside a qcow2, made by another program. `memory`: bytes of saved memory."""

    id: str
    name: str
    memory: int = 0
    created: datetime | None = None


class ImageBitmap(Record):
    """A persistent dirty bitmap of a qcow2. `granularity` in bytes."""

    name: str
    granularity: int
    flags: tuple[str, ...] = ()


class ImageDetails(Volume):
    """An image looked into. `file_size` is the length of the file, `block_size` the unit in which it grows (bytes);
    `subformat` what the format has several of ("dynamic", "fixed", "version 3"); `identifier` its unique id. `dirty`: a
    writer did not close it, `log_pending`: and its log (VHDX) has to be replayed. `geometry`: cylinders, heads,
    sectors of a VHD. What a format has not is None or empty. `warnings`: what its owner should know."""

    file_size: int = 0
    subformat: str = ""
    block_size: int | None = None
    sector_size: int | None = None
    identifier: str = ""
    creator: str = ""
    image_created: datetime | None = None
    geometry: tuple[int, int, int] | None = None
    dirty: bool = False
    log_pending: bool = False
    corrupt: bool = False
    lazy_refcounts: bool = False
    compression: str = ""
    snapshots: tuple[ImageSnapshot, ...] = ()
    bitmaps: tuple[ImageBitmap, ...] = ()
    map: AllocationMap | None = None
    """None where it was not asked for or cannot be told."""
    warnings: tuple[str, ...] = ()
    known: bool = False
    """Whether it is a volume of this host."""


class Soundness(StrEnum):
    """sound: nothing wrong. leaks: space is lost, no data. repairable: `--repair` can help. damaged: it cannot."""

    SOUND = "sound"
    LEAKS = "leaks"
    REPAIRABLE = "repairable"
    DAMAGED = "damaged"


class Verdict(Record):
    """What a check of an image found. `errors` and `leaks` are counts of clusters or blocks; `repaired` how many of
    both a repair has put right; `findings` sentences for people; `checked_by` who looked."""

    path: str
    verdict: Soundness
    errors: int = 0
    leaks: int = 0
    repaired: int = 0
    findings: tuple[str, ...] = ()
    checked_by: tuple[str, ...] = ()


class Checksum(Record):
    """SHA-256 (hex) of all that a guest could read: `size` bytes, the same for every format with the same content.
    `data` bytes of them were read, the rest is zeroes that no format stores."""

    path: str
    size: int
    sha256: str
    data: int = 0


class Preallocation(StrEnum):
    """Space taken when a volume is made. off: none. metadata: the tables of a qcow2. full: all of it."""

    OFF = "off"
    METADATA = "metadata"
    FULL = "full"
