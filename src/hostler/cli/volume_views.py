"""What people see of images: pure functions from JSON to facts and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hostler.cli.views import Facts, Json, Table, when
from hostler.model.units import format_size as size


def image(found: Json) -> Facts:
    """Everything about an image."""
    facts = [(label, value) for label, value in (*_head(found), *_inside(found)) if value]
    return Facts(tuple(facts), (*_lists(found),))


def _head(found: Json) -> list[tuple[str, str]]:
    subformat = f", {found['subformat']}" if found["subformat"] else ""
    return [
        ("name", found["name"] if found["known"] else ""),
        ("path", found["path"]),
        ("format", f"{found['format']}{subformat}"),
        ("size", f"{size(found['size'])} ({found['size']} bytes)"),
        ("allocated", f"{size(found['allocated'])} of a file of {size(found['file_size'])}"),
        ("content", _map(found.get("map"))),
        ("generation", str(found["generation"]) if found["known"] else ""),
    ]


def _inside(found: Json) -> list[tuple[str, str]]:
    geometry = found.get("geometry")
    state = [text for key, text in _STATES.items() if found.get(key)]
    return [
        ("block size", size(found["block_size"]) if found.get("block_size") else ""),
        ("sector size", f"{found['sector_size']} bytes" if found.get("sector_size") else ""),
        ("identifier", found["identifier"]),
        ("made by", found["creator"]),
        ("made at", when(found["image_created"]) if found.get("image_created") else ""),
        ("geometry", "{} cylinders, {} heads, {} sectors".format(*geometry) if geometry else ""),
        ("compression", found["compression"]),
        ("left", ", ".join(state)),
        ("warnings", "; ".join(found["warnings"])),
    ]


_STATES = {
    "dirty": "not closed by its last writer",
    "log_pending": "with a log to replay",
    "corrupt": "marked as corrupt",
}


def _map(found: Json | None) -> str:
    if found is None:
        return ""
    parts = f"{size(found['data'])} of data in {found['extents']} extents, {found['fragments']} of them scattered"
    return f"{parts}; {size(found['zeroes'])} of zeroes{'' if found['complete'] else '; and more'}"


def _lists(found: Json) -> Iterator[Table]:
    snapshots = tuple((s["id"], s["name"], size(s["memory"]), when(s.get("created"))) for s in found["snapshots"])
    if snapshots:
        yield Table(("SNAPSHOT", "NAME", "MEMORY", "MADE"), snapshots, frozenset({"MEMORY"}))
    bitmaps = tuple((b["name"], size(b["granularity"]), ", ".join(b["flags"])) for b in found["bitmaps"])
    if bitmaps:
        yield Table(("BITMAP", "GRANULARITY", "FLAGS"), bitmaps, frozenset({"GRANULARITY"}))


_MEANING = {
    "sound": "is sound",
    "leaks": "is sound, but wastes space; 'hostler volume validate --repair' gives it back",
    "repairable": "is not sound; 'hostler volume validate --repair' can put it right",
    "damaged": "is damaged; restore it from a backup",
}


def verdict(name: str, found: Json) -> str:
    """What a check found."""
    lines = [f"volume {name} {_MEANING[found['verdict']]}"]
    lines += [f"  {text}" for text in found["findings"]]
    lines += [f"  put right: {found['repaired']}"] if found["repaired"] else []
    return "\n".join(lines)


def checksum(job: Json) -> str:
    """As sha256sum prints it."""
    found: dict[str, Any] = job["result"]
    return f"{found['sha256']}  {found['name']}"


def users(found: Json) -> Table:
    """Who depends on a volume."""
    rows = tuple((u["kind"], u["name"], u["how"]) for u in found.get("users", ()))
    return Table(("USED BY", "NAME", "HOW"), rows, empty="nothing depends on it")
