"""Chains as a tree of text: parents above, children below them, what is wrong beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostler.model.units import format_size

Json = Mapping[str, Any]

_SOUND = ("base", "sound")


def tree(report: Json) -> str:
    """The images of a report; children stand below their parent, further to the right."""
    images: Sequence[Json] = report["images"]
    known = {image["path"] for image in images}
    children: dict[str, list[Json]] = {}
    roots: list[Json] = []
    for image in sorted(images, key=lambda image: str(image["path"])):
        if image["parent"] in known and image["link"] != "loop":
            children.setdefault(image["parent"], []).append(image)
        else:
            roots.append(image)
    lines = [line for root in roots for line in _branch(root, children, "", "", report["path"])]
    wrong = sum(image["link"] not in _SOUND for image in images)
    if not images:
        lines.append(f"no VHD or VHDX in {report['path']}")
    elif wrong:
        lines.append(f"{wrong} of {len(images)} cannot be used as they are")
    else:
        lines.append("every link is sound")
    return "\n".join(lines)


def _branch(image: Json, children: Mapping[str, Sequence[Json]], first: str, rest: str, top: str) -> Iterator[str]:
    yield first + _line(image, top)
    own = children.get(str(image["path"]), ())
    for note in _notes(image):
        yield f"{rest}{'|   ' if own else '    '}{note}"
    for number, child in enumerate(own, 1):
        mark, below = ("`-- ", "    ") if number == len(own) else ("|-- ", "|   ")
        yield from _branch(child, children, rest + mark, rest + below, top)


def _line(image: Json, top: str) -> str:
    place = top if os.path.isabs(top) else "/"
    path = str(image["path"])
    inside = path.startswith(place.rstrip("/") + "/") or os.path.dirname(path) == os.path.dirname(place)
    name = os.path.basename(path) if inside else path
    if not image["kind"]:
        return f"{name}  {image['link']}"
    sizes = f"{format_size(image['size'])}, {format_size(image['allocated'])} on disk"
    return f"{name}  {image['format'].removesuffix('-fixed')} {image['kind']}, {sizes}"


def _notes(image: Json) -> Iterator[str]:
    if image["link"] not in _SOUND:
        yield f"{image['link']}: {image['problem']}"
        if image["advice"]:
            yield f"-> {image['advice']}"
    if image["parent"] is None and image["link"] == "sound":
        yield "its parent is in another directory"
    if image["log_pending"]:
        yield "not closed by its last user: read with its log replayed"
    for warning in image["warnings"]:
        yield f"warning: {warning}"
