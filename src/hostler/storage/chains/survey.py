"""Chains as people see them: of one image, or all that a directory holds. Nothing is changed, whatever is found."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hostler.model.chain import ChainImage, ChainReport
from hostler.model.errors import HostlerError, InvalidInput
from hostler.model.links import ImageKind, LinkState
from hostler.storage.chains.chain import BASE, MAX_DEPTH, Chain, Link, find_parent, open_chain, open_image, warnings_of
from hostler.storage.chains.layer import Layer

ENDINGS = (".vhd", ".avhd", ".vhdx", ".avhdx")
"""What Hyper-V calls its images; a directory is searched by these."""
MAX_IMAGES = 1000
"""Images of a directory that are opened: some 20 ms each, and the whole look has 30 s."""


def survey(path: str, search: Sequence[str] = ()) -> ChainReport:
    """The chain of the image at `path`, or, where it is a directory, every image in it. `search`: directories in which
    parents may be, beside each image's own. Raises what `open_image` does for the image itself, and InvalidInput for a
    directory that holds too many. Blocking; reads a few tables of each image."""
    if os.path.isdir(path):
        return _directory(path, search)
    with open_chain(path, search) as chain:
        images = _of_chain(chain)
    return ChainReport(path=path, images=images, sound=all(image.is_sound for image in images))


def _of_chain(chain: Chain) -> tuple[ChainImage, ...]:
    parents = [layer.file.path for layer in chain.layers[1:]]
    return tuple(
        _image(layer, link, parents[number] if number < len(parents) else None)
        for number, (layer, link) in enumerate(zip(chain.layers, chain.links, strict=True))
    )


def _directory(path: str, search: Sequence[str]) -> ChainReport:
    try:
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(ENDINGS))
    except OSError as error:
        raise InvalidInput(f"directory {path}", f"cannot be listed: {error.strerror}", "check its mode") from error
    if len(names) > MAX_IMAGES:
        raise InvalidInput(f"directory {path}", f"holds more than {MAX_IMAGES} images", "name a single image")
    real = os.path.realpath(path)
    found = [_one(os.path.join(real, name), [*search, real]) for name in names]
    known = {image.path: image for image in found}
    images = tuple(_judged(image, known) for image in found)
    return ChainReport(path=path, images=images, sound=all(image.is_sound for image in images))


def _one(path: str, search: Sequence[str]) -> ChainImage:
    """One image and where its parent is; the parent's own parent is not looked for."""
    try:
        layer = open_image(path)
    except HostlerError as error:
        return ChainImage(path=path, link=LinkState.DAMAGED, problem=error.cause, advice=error.advice)
    try:
        if layer.link is None:
            return _image(layer, BASE, None)
        parent, link = find_parent(layer, layer.link, [os.path.realpath(place) for place in search])
        if parent is None:
            return _image(layer, link, None)
        try:
            sound = Link(LinkState.SOUND, warnings=warnings_of(layer, layer.link, parent))
            return _image(layer, sound, parent.file.path)
        finally:
            os.close(parent.file.fd)
    finally:
        os.close(layer.file.fd)


def _judged(image: ChainImage, known: dict[str, ChainImage]) -> ChainImage:
    """With a look further down: does it end, and not in itself?"""
    at, seen = image, {image.path}
    while at.parent is not None:
        following = known.get(at.parent)
        if following is None:
            return image  # its parent is in another directory, where it was found sound
        if following.path in seen:
            text = "its parents lead back to itself"
            return image.but(link=LinkState.LOOP, problem=text, advice="restore the images from a backup")
        if len(seen) >= MAX_DEPTH:
            return image.but(
                link=LinkState.TOO_DEEP,
                problem=f"has more than {MAX_DEPTH} images below it",
                advice="merge some of them",
            )
        seen.add(following.path)
        at = following
    return image


def _image(layer: Layer, link: Link, parent: str | None) -> ChainImage:
    kind = ImageKind.DYNAMIC if layer.dynamic else ImageKind.FIXED
    return ChainImage(
        path=layer.file.path,
        format=layer.format,
        kind=kind if layer.link is None else ImageKind.DIFFERENCING,
        size=layer.size,
        allocated=layer.file.allocated,
        id=str(layer.id),
        parent=parent,
        parent_names=layer.link.names if layer.link else (),
        link=link.state,
        log_pending=layer.log_pending,
        problem=link.problem,
        advice=link.advice,
        warnings=link.warnings,
    )
