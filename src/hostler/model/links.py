"""The words for what images are to each other; without pydantic, for the processes that must start in no time."""

from __future__ import annotations

from enum import StrEnum


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
