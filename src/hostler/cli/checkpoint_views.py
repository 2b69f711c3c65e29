"""Checkpoints as a tree and as facts."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.cli.views import Facts, Json, Table, when
from hostler.model.units import format_size

STEP = "  "
NOW = "Now"


def checkpoints(found: Sequence[Json]) -> Table:
    """The tree: what builds on a checkpoint stands below it, indented; "Now" is what the VM is at this moment."""
    columns = ("NAME", "CREATED", "KIND", "STATE", "SIZE", "NOTES")
    depths: dict[str, int] = {}
    rows: list[tuple[str, ...]] = []
    for point in found:
        depth = depths[point["id"]] = depths.get(point["parent"] or "", -1) + 1
        kind = point["kind"] + (", automatic" if point["automatic"] else "")
        first = (point["notes"].splitlines() or [""])[0]
        name = STEP * depth + point["name"]
        rows.append((name, when(point["created"]), kind, point["state"], format_size(point["size"]), first))
        if point["now"]:
            rows.append((STEP * (depth + 1) + NOW, "", "", "", "", ""))
    if found and not any(point["now"] for point in found):
        rows.append((NOW, "", "", "", "", ""))
    return Table(columns, tuple(rows), frozenset({"SIZE"}), states="STATE", empty="no checkpoints")


def checkpoint(found: Json) -> Facts:
    """One of them."""
    config = found["config"] or {"disks": [], "vcpus": "-", "memory": 0}
    facts = (
        ("name", found["name"]),
        ("id", found["id"]),
        ("created", when(found["created"])),
        ("kind", found["kind"] + (" (automatic)" if found["automatic"] else "")),
        ("state", found["state"]),
        ("builds on", found["parent"] or "-"),
        ("is what Now builds on", "yes" if found["now"] else "no"),
        ("takes", format_size(found["size"])),
        ("memory file", found["memory"] or "-"),
        ("processors then", str(config["vcpus"])),
        ("memory then", format_size(config["memory"])),
        ("notes", found["notes"]),
    )
    disks = Table(
        ("DISK", "SIZE", "LAYER"),
        tuple((d["id"], format_size(d["source"]["size"]), d["source"]["path"]) for d in config["disks"]),
        frozenset({"SIZE"}),
    )
    return Facts(facts, (disks,))
