"""What people see of backups: pure functions from JSON to tables and facts, as those in `views`."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.cli.views import UNKNOWN, Facts, Json, Table, when
from hostler.model.units import format_size


def _kind(backup: Json) -> str:
    return "full" if backup["full"] else "incremental"


def _state(backup: Json) -> str:
    return "ok" if backup["restores"] else "incomplete"


def backups(found: Sequence[Json]) -> Table:
    """`hostler backup list`."""
    rows = tuple(
        (
            f"{b['directory']}/{b['id']}",
            b["vm_name"],
            when(b["created"]),
            _kind(b),
            b["consistency"],
            _state(b),
            format_size(b["stored"]),
            b["name"] or UNKNOWN,
        )
        for b in found
    )
    columns = ("BACKUP", "VM", "MADE", "KIND", "CONSISTENT", "STATE", "STORED", "NAME")
    return Table(columns, rows, frozenset({"STORED"}), empty="no backups; 'hostler backup run VM --to DIR' makes one")


def backup(found: Json) -> Facts:
    """`hostler backup show`."""
    facts = (
        ("id", found["id"]),
        ("directory", found["directory"]),
        ("name", found["name"]),
        ("vm", f"{found['vm_name']} ({found['vm']})"),
        ("host", found["host"]),
        ("made", f"{when(found['created'])}, in {found['took']:.0f} s"),
        ("kind", _kind(found)),
        ("consistent", found["consistency"]),
        ("stored", f"{format_size(found['stored'])} of {format_size(found['size'])}"),
        ("builds on", ", ".join(found["needs"])),
        ("needed by", ", ".join(found["needed_by"])),
        ("state", "ok" if found["restores"] else "incomplete: something that it builds on is missing"),
    )
    return Facts(tuple((label, value) for label, value in facts if value), (_disks(found),))


def _disks(found: Json) -> Table:
    rows = tuple(
        (
            disk["id"],
            format_size(disk["size"]),
            disk["format"],
            format_size(disk["stored"]),
            disk["since"] or f"whole: {disk['why']}",
            disk["tracking"],
        )
        for disk in found["disks"]
    )
    columns = ("DISK", "SIZE", "FORMAT", "STORED", "BUILDS ON", "CHANGES NOTED")
    return Table(columns, rows, frozenset({"SIZE", "STORED"}))


def made(job: Json, vm: str) -> str:
    """What is said at the end of a backup."""
    result = job.get("result") or {}
    kind = "full" if result.get("full") else "incremental"
    return f"{vm} is backed up ({kind}): {result.get('directory')}/{result.get('backup')}"


def restored(job: Json) -> str:
    """What is said at the end of a restore."""
    result = job.get("result") or {}
    if job["kind"] == "backup.restore-volume":
        text = f"volume {job['target_name']} is restored: {result.get('path')}"
    else:
        text = f"vm {job['target_name']} is restored, and off"
    return "\n".join([text, *(f"note: {line}" for line in result.get("changed") or [])])


def exported(job: Json) -> Facts:
    """Where a backup is served."""
    exports = job["progress"]["detail"]["exports"]
    table = Table(("DISK", "ADDRESS"), tuple((disk, str(uri)) for disk, uri in exports.items()))
    return Facts((("job", f"{job['id']} (end it with: hostler backup export-end {job['id'][:8]})"),), (table,))


def deleted(found: Json, dry_run: bool) -> Facts:
    """What was deleted."""
    return Facts((("would be deleted" if dry_run else "deleted", "\n".join(found["removed"])),))


def pruned(found: Json, dry_run: bool) -> Facts:
    """What was deleted, and what stays although it is old."""
    facts = [("would be deleted" if dry_run else "deleted", "\n".join(found["removed"]) or "nothing")]
    if found["needed"]:
        facts.append(("old but needed", "\n".join(f"{old}, by {new}" for old, new in found["needed"].items())))
    return Facts(tuple(facts))
