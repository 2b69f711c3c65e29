"""Pools as tables and facts."""

from __future__ import annotations

from collections.abc import Sequence

from hostler.cli.views import Facts, Json, Table, when
from hostler.model.units import format_size

_WORDS = {
    "fallocate": "reserving space",
    "reflink": "instant copies (reflink)",
    "punch_hole": "giving back what guests trim",
    "direct": "direct I/O",
    "acl": "access control lists",
}


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _place(pool: Json) -> str:
    if pool["path"]:
        return str(pool["path"])
    ways = ", ".join(pool["portals"])
    return f"{pool['target']} at {ways}" if pool["target"] else ways


def pools(found: Sequence[Json]) -> Table:
    """The list."""
    columns = ("NAME", "STATE", "KIND", "CAPACITY", "FREE", "ALLOCATED", "PROMISED", "VOLUMES", "PLACE", "WARNING")
    rows = tuple(
        (
            p["name"],
            p["state"],
            p["kind"],
            _size(p["capacity"]),
            _size(p["free"]),
            _size(p["allocated"]),
            _size(p["promised"]),
            str(p["volumes"]),
            _place(p),
            p["text"] or "; ".join(p["warnings"]),
        )
        for p in found
    )
    right = frozenset({"CAPACITY", "FREE", "ALLOCATED", "PROMISED", "VOLUMES"})
    return Table(columns, rows, right, states="STATE")


def pool(found: Json) -> Facts:
    """One of them."""
    facts = (
        ("name", found["name"]),
        ("kind", found["kind"]),
        ("place", _place(found)),
        ("mounted at", found["mount"]),
        ("state", found["state"] + (f": {found['text']}" if found["text"] else "")),
        ("capacity", _size(found["capacity"])),
        ("free", _size(found["free"])),
        ("allocated", f"{_size(found['allocated'])} by {found['volumes']} volumes"),
        ("promised", _size(found["promised"])),
        ("warns at", f"{found['warn_at']} %"),
        ("latency", "" if found["latency"] is None else f"{found['latency'] * 1000:.1f} ms"),
        *_features(found["features"]),
        ("initiator", found["initiator"]),
        ("CHAP user", found["chap_user"]),
        ("TLS", "yes" if found["tls"] else ("no: insecure" if found["kind"] == "nbd" else "")),
        ("certificate of", found["tls_hostname"]),
        ("notes", found["notes"]),
        ("created", when(found["created"]) if found["created"] else ""),
        *(("warning", text) for text in found["warnings"]),
    )
    return Facts(tuple((label, value) for label, value in facts if value))


def _features(features: Json | None) -> Sequence[tuple[str, str]]:
    if features is None:
        return ()
    can = [text for name, text in _WORDS.items() if features[name]]
    cannot = [text for name, text in _WORDS.items() if not features[name]]
    tried = bool(can)
    return (
        ("file system", features["kind"]),
        ("it can", ", ".join(can)),
        ("it cannot", ", ".join(cannot) if tried else ""),
    )


def scan(found: Json) -> Facts:
    """What a scan found."""
    would = "would be " if found["dry_run"] else ""
    adopted = {v["path"] for v in found["adopted"]}
    rows = [
        *((f"{would}adopted as {v['name']}", v["path"], _size(v["size"])) for v in found["adopted"]),
        *(("in no record", f["path"], _size(f["size"])) for f in found["unknown"] if f["path"] not in adopted),
        *(("missing", f"volume {name}", "") for name in found["missing"]),
        *((f"changed: {c['why']}", c["path"], "") for c in found["changed"]),
        *(
            (f"{would}deleted" if f["path"] in found["deleted"] else "left half made", f["path"], _size(f["size"]))
            for f in found["leftovers"]
        ),
        *((f"no volume: {r['why']}", r["path"], "") for r in found["refused"]),
    ]
    facts = [("pool", found["pool"]), ("found", "" if rows else "everything is as recorded")]
    facts.append(("note", "there is more than was looked at" if found["truncated"] else ""))
    table = Table(("FINDING", "WHAT", "SIZE"), tuple(rows), frozenset({"SIZE"}))
    return Facts(tuple((label, value) for label, value in facts if value), (table,))


def targets(found: Sequence[Json]) -> Table:
    """iSCSI targets."""
    rows = tuple((t["target"], ", ".join(t["portals"])) for t in found)
    return Table(("TARGET", "PORTALS"), rows, empty="the portal tells of no target")
