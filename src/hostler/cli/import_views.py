"""What people see of an import: pure functions from JSON to tables and facts, as those in `views`."""

from __future__ import annotations

import shlex

from hostler.cli.views import UNKNOWN, Facts, Json, Table
from hostler.model.units import format_size

TITLES = {"blocker": "IN THE WAY", "guest": "GUEST NEEDS", "lost": "NOT HERE", "changed": "CHANGED", "kept": "KEPT"}


def report(found: Json, everything: bool = False) -> Facts:
    """The report of `hostler import inspect`."""
    machine = found["machine"]
    facts = [
        ("name", found["name"]),
        ("described in", found["description"]),
        ("kind", machine["kind"] + (f", version {machine['version']}" if machine["version"] else "")),
        ("guest", machine["guest_system"]),
        ("processors", str(machine["vcpus"])),
        ("memory", format_size(machine["memory"])),
        ("firmware", machine["firmware"] + (", secure boot" if machine["secure_boot"] else "")),
        ("space", f"up to {format_size(found['space_needed'])} needed, {format_size(found['space_free'])} free"),
        ("not understood", _not_understood(machine["not_understood"], everything)),
    ]
    tables = (_disks(found), _nics(machine), _snapshots(machine), _remarks(found))
    return Facts(tuple((label, value) for label, value in facts if value), tables)


def _not_understood(lines: list[str], everything: bool) -> str:
    if everything or not lines:
        return "\n".join(lines)
    return f"{len(lines)} things; shown with --all"


def _disks(found: Json) -> Table:
    rows = tuple(
        (
            disk["place"],
            _place(disk),
            disk["media"],
            disk["source_format"] or UNKNOWN,
            format_size(disk["size"]) if disk["size"] else UNKNOWN,
            _fate(disk),
            disk["path"] or disk["name"] or UNKNOWN,
        )
        for disk in found["disks"]
    )
    return Table(("THERE", "HERE", "KIND", "FORMAT", "SIZE", "WHAT HAPPENS", "IMAGE"), rows, frozenset({"SIZE"}))


def _place(disk: Json) -> str:
    if disk["target_bus"] is None or disk["fate"] == "leave":
        return UNKNOWN
    return f"{disk['target_bus']} {disk['target_controller']}:{disk['target_unit']}"


def _fate(disk: Json) -> str:
    if disk["fate"] == "leave":
        return "left out"
    if disk["fate"] == "attach":
        return "attached" if disk["name"] else "empty drive"
    verb = {"copy": "copied to", "register": "becomes", "flatten": "flattened to"}[disk["fate"]]
    return f"{verb} volume {disk['volume']} ({disk['target_format']})"


def _nics(machine: Json) -> Table:
    rows = tuple(
        (str(number), nic["mac"] or UNKNOWN, nic["network"] or UNKNOWN, nic["name"])
        for number, nic in enumerate(machine["nics"], 1)
    )
    return Table(("ADAPTER", "MAC", "NETWORK THERE", "NAME THERE"), rows)


def _snapshots(machine: Json) -> Table:
    names = {s["id"]: s["name"] for s in machine["snapshots"]}
    rows = tuple((s["name"], s["id"], names.get(s["parent"], UNKNOWN)) for s in machine["snapshots"])
    return Table(("SNAPSHOT", "ID", "AFTER"), rows)


def _remarks(found: Json) -> Table:
    rows = tuple(
        (TITLES.get(r["kind"], r["kind"]), r["subject"], r["text"] + (f" [{r['advice']}]" if r["advice"] else ""))
        for r in found["remarks"]
    )
    return Table(("REMARK", "ABOUT", "WHAT"), rows)


def done(job: Json) -> str:
    """What is said when an import is over."""
    name = (job.get("result") or {}).get("config", {}).get("name") or job.get("target_name") or job["target"]
    return f"vm {name} is imported; start it with: hostler vm start {shlex.quote(name)}"


def export(found: Json) -> Facts:
    """What an export would write."""
    facts = [
        ("vm", found["vm"]),
        ("path", found["path"]),
        ("form", found["form"]),
        ("size", f"up to {format_size(found['size'])}"),
        ("files", "\n".join(found["files"])),
        ("not in it", "\n".join(found["lost"])),
    ]
    return Facts(tuple((label, value) for label, value in facts if value))


def exported(job: Json) -> str:
    """What is said when an export is over."""
    result = job.get("result") or {}
    lines = [f"vm {job.get('target_name') or job['target']} is in {result.get('path', job['params']['path'])}"]
    lines += [f"not in it: {what}" for what in result.get("lost", ())]
    return "\n".join(lines)
