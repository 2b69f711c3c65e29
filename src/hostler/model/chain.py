"""Chains: images that hold changes to a parent image only, as they were found and judged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from hostler.model.base import Input, Record
from hostler.model.disk import ImageFormat
from hostler.model.links import ImageKind, LinkState
from hostler.model.vm import AbsolutePath


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


class ChainRequest(Input):
    """`path`: an image, or a directory of images. `search`: directories in which parents may be, beside the directory
    of each image itself; no others are looked in."""

    path: AbsolutePath
    search: tuple[AbsolutePath, ...] = Field(default=(), max_length=16)


class FlattenRequest(Input):
    """A new volume with the content of the image `source` and its parents. `path`: where its file goes; `size` at least
    the source's, in bytes; `search` as in ChainRequest."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    source: AbsolutePath
    format: ImageFormat = ImageFormat.QCOW2
    path: AbsolutePath | None = None
    size: int | None = Field(default=None, ge=512)
    search: tuple[AbsolutePath, ...] = Field(default=(), max_length=16)
