"""An image with all its parents: opened, each link judged.

    image --names, id--> parent --names, id--> ... --> base

A link is sound when the parent was found and is the very image that the child was made from: its id is the one that the
child keeps. That a VHD parent's file has another time than the child noted is a warning only, as copies often have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from hostler.model.errors import BadImage
from hostler.model.links import LinkState
from hostler.storage.chains.layer import Layer, ParentLink
from hostler.storage.chains.locate import candidates, open_within
from hostler.storage.chains.source import ImageFile
from hostler.storage.chains.vhd import open_vhd
from hostler.storage.chains.vhdx import is_vhdx, open_vhdx
from hostler.storage.files import open_regular

MAX_DEPTH = 64
"""Images of the longest chain that is read. Hyper-V allows 50 checkpoints (2008 R2)."""
STAMP_SLACK = 2
"""Seconds by which a file's time may differ from the one noted: FAT counts in twos."""


@dataclass(frozen=True, slots=True)
class Link:
    """What became of one image's search for its parent. `problem` is a sentence unless the state is base or sound."""

    state: LinkState
    problem: str = ""
    advice: str = ""
    warnings: tuple[str, ...] = ()


BASE = Link(LinkState.BASE)


@dataclass(slots=True)
class Chain:
    """Open images from the child to the base as far as they were found, and the link of each. Close it."""

    layers: list[Layer] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that a guest sees."""
        return self.layers[0].size

    def require_sound(self) -> None:
        """BadImage with the first link that is not sound."""
        for layer, link in zip(self.layers, self.links, strict=True):
            if link.state not in (LinkState.BASE, LinkState.SOUND):
                raise BadImage(f"image {layer.file.path}", link.problem, link.advice, link=link.state.value)

    def close(self) -> None:
        """Close every file."""
        for layer in self.layers:
            os.close(layer.file.fd)
        self.layers.clear()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_layer(file: ImageFile) -> Layer:
    """Read what a file is. BadImage when it is neither VHD nor VHDX, or a damaged one."""
    return open_vhdx(file) if is_vhdx(file.fd) else open_vhd(file)


def open_image(path: str) -> Layer:
    """Open one image; the caller closes its file. BadImage, NotFound, NotPermitted, InvalidInput."""
    fd = open_regular(path)
    try:
        return open_layer(ImageFile.of(fd, os.readlink(f"/proc/self/fd/{fd}")))
    except BaseException:
        os.close(fd)
        raise


def open_chain(path: str, search: Sequence[str] = (), depth: int = MAX_DEPTH) -> Chain:
    """Open an image and what it builds on. Parents are looked for in the image's own directory and below `search`
    (absolute), nowhere else. A link that is not sound ends the chain; `Chain.require_sound` makes an error of it.
    Raises what `open_image` does, for the image itself. Blocking: call it in a thread."""
    chain = Chain([open_image(path)])
    try:
        places = [os.path.realpath(place) for place in search]
        while True:
            child = chain.layers[-1]
            if child.link is None:
                chain.links.append(BASE)
                return chain
            parent, link = _parent(chain, child, child.link, places, depth)
            chain.links.append(link)
            if parent is None:
                return chain
            chain.layers.append(parent)
    except BaseException:
        chain.close()
        raise


def _parent(
    chain: Chain, child: Layer, link: ParentLink, search: Sequence[str], depth: int
) -> tuple[Layer | None, Link]:
    if len(chain.layers) >= depth:
        text = f"has more than {depth} images below each other"
        return None, Link(LinkState.TOO_DEEP, text, "merge some of them where it comes from")
    found, others = find_parent(child, link, search)
    if found is None:
        return None, others
    if any(os.path.samestat(os.fstat(one.file.fd), os.fstat(found.file.fd)) for one in chain.layers):
        os.close(found.file.fd)
        text = f"builds on {found.file.path}, which builds on it"
        return None, Link(LinkState.LOOP, text, "restore the images from a backup")
    return found, Link(LinkState.SOUND, warnings=warnings_of(child, link, found))


def find_parent(child: Layer, link: ParentLink, search: Sequence[str]) -> tuple[Layer | None, Link]:
    """The open parent of an image, or why there is none. Of several files by its names the right one is taken."""
    directory = os.path.dirname(child.file.path)
    wrong: Link | None = None
    for path in candidates(link.names, directory, search):
        file = open_within(path, [directory, *search])
        if file is None:
            continue
        try:
            found = open_layer(file)
        except BadImage as error:
            os.close(file.fd)
            wrong = wrong or Link(LinkState.DAMAGED, f"its parent {file.path} {error.cause}", error.advice)
            continue
        if found.id in link.ids and (found.format == "vhdx") == (child.format == "vhdx"):
            return found, BASE
        os.close(file.fd)
        wrong = wrong or _foreign(file.path, found, link)
    return None, wrong or _missing(link, directory, search)


def _foreign(path: str, found: Layer, link: ParentLink) -> Link:
    wanted = " or ".join(str(id) for id in link.ids) or "nothing"
    text = f"builds on {wanted}, but {path} is {found.id}: another image, or one that was written to since"
    return Link(LinkState.FOREIGN, text, "put the right parent beside it, or name its directory")


def _missing(link: ParentLink, directory: str, search: Sequence[str]) -> Link:
    named = " or ".join(repr(name) for name in link.names[:3]) or "nothing it names"
    text = f"builds on {named}, which is not in {', '.join([directory, *search])}"
    return Link(LinkState.MISSING, text, "copy its parent beside it, or name the directory that it is in")


def warnings_of(child: Layer, link: ParentLink, parent: Layer) -> tuple[str, ...]:
    """What does not keep a parent from being read, and should be known all the same."""
    found = []
    if link.stamp is not None and abs(link.stamp - parent.file.modified) > STAMP_SLACK:
        found.append(f"{parent.file.path} has another time than when this image was made from it")
    if child.size > parent.size:
        found.append(f"it is larger than its parent by {child.size - parent.size} bytes, which read as zeroes")
    if child.size < parent.size:
        found.append(f"it is smaller than its parent by {parent.size - child.size} bytes, which are not seen")
    return tuple(found)
