"""Chains: images that hold changes to a parent image only, as they were found and judged."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from hostler.model.base import Record


class ImageKind(StrEnum):
    """What an image of Hyper-V is. A differencing one (.avhd, .avhdx) holds the changes to its parent."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"
    DIFFERENCING = "differencing"


class LinkState(StrEnum):
    """What was found at the place of an image's parent."""

    BASE = "base"
    """It has no parent and needs none."""
    SOUND = "sound"
    MISSING = "missing"
    """No file by any of the names it gives, in the directories that were looked in."""
    FOREIGN = "foreign"
    """There is a file by that name, but it is another image or has been written by somebody else since."""
    LOOP = "loop"
    """Its parents lead back to itself."""
    TOO_DEEP = "too-deep"
    DAMAGED = "damaged"
    """The image itself cannot be read, so nobody knows."""


class ChainImage(Record):
    """One image of a chain. `size` is what a guest sees, `allocated` what the file takes (bytes); `id` is what children
    know it by; `parent` the path where its parent was found, `parent_names` what the image itself says; `log_pending`:
    its last writer died, and it is read with its log replayed in memory. `problem` and `advice` are set unless the link
    is base or sound; `warnings` do not keep it from being read."""

    path: str
    format: str = ""
    kind: ImageKind | None = None
    size: int = Field(default=0, ge=0)
    allocated: int = Field(default=0, ge=0)
    id: str = ""
    parent: str | None = None
    parent_names: tuple[str, ...] = ()
    link: LinkState
    log_pending: bool = False
    problem: str = ""
    advice: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether this image and its link to its parent are as they must be."""
        return self.link in (LinkState.BASE, LinkState.SOUND)


class ChainReport(Record):
    """The chain of an image (`path` is a file: the images are ordered from it to its base), or every image of a
    directory (ordered by path; `parent` makes them trees). `sound`: whether each can be read down to its base."""

    path: str
    images: tuple[ChainImage, ...]
    sound: bool
