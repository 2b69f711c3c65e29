"""What people see of the API's answers: pure functions from JSON to tables and lists of facts.

They take the JSON as it came, not the models: reading a hundred VMs into models would take longer than everything else
`hostler vm list` does. A unit test renders real models, so the field names here cannot drift from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hostler.model.units import format_size

Json = Mapping[str, Any]

UNKNOWN = "-"


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column is the name, which `--quiet` prints alone. `right`: right-aligned columns;
    `states`: the column that is coloured; `empty`: what to say instead of nothing; `whole`: the names in full, where
    the first column has them shortened."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    states: str = "STATE"
    empty: str = ""
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Labelled values of one object, with tables below."""

    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...] = ()


def when(text: str | None) -> str:
    """A time as the API writes it, to the second."""
    return text[:19].replace("T", " ") if text else UNKNOWN


def _size(size: int | None) -> str:
    return UNKNOWN if size is None else format_size(size)


def vm_state(vm: Json) -> str:
    """The state, with the reason where it is critical."""
    return f"{vm['state']} ({vm['reason']})" if vm.get("reason") and vm["state"] == "critical" else str(vm["state"])


def _vm_note(vm: Json) -> str:
    if vm.get("reason_text"):
        return str(vm["reason_text"]).splitlines()[0]
    if vm.get("handed_to"):
        return "handed over to another host, which has not confirmed yet"
    return "changes wait for the next start" if vm.get("next_config") else ""


def vms(found: Sequence[Json]) -> Table:
    rows = tuple(
        (
            vm["config"]["name"],
            vm_state(vm),
            str(vm["config"]["vcpus"]),
            _size(vm["config"]["memory"]),
            str(len(vm["config"]["disks"])),
            str(len(vm["config"]["nics"])),
            _vm_note(vm),
        )
        for vm in sorted(found, key=lambda vm: str(vm["config"]["name"]))
    )
    columns = ("NAME", "STATE", "VCPUS", "MEMORY", "DISKS", "NICS", "NOTE")
    right = frozenset({"VCPUS", "MEMORY", "DISKS", "NICS"})
    return Table(columns, rows, right, empty="no vms; make one with: hostler vm create")


def disks(vm: Json) -> Table:
    rows = tuple(
        (
            disk["id"],
            _address(disk),
            _size(disk["source"]["size"]) if disk["source"]["path"] else "-",
            disk["source"]["format"] if disk["source"]["path"] else "-",
            _disk_kind(disk),
            disk["source"]["path"] or "(empty)",
        )
        for disk in vm["config"]["disks"]
    )
    return Table(("DISK", "ADDRESS", "SIZE", "FORMAT", "KIND", "SOURCE"), rows, frozenset({"SIZE"}), empty="no disks")


def _address(disk: Json) -> str:
    return f"{disk['bus']} {disk['controller']}:{disk['unit']}"


def _disk_kind(disk: Json) -> str:
    words = [disk["media"]] if disk["media"] != "disk" else []
    words += ["read-only"] if disk["read_only"] and disk["media"] == "disk" else []
    words += ["pass-through"] if disk["source"]["kind"] == "device" else []
    words += ["limited"] if any((disk.get("limits") or {}).values()) else []
    return ", ".join(words) or "disk"


def nics(vm: Json) -> Table:
    rows = tuple(
        (nic["id"], nic["mac"], nic["network"] + (f" {nic['bridge']}" if nic["bridge"] else ""), str(nic["queues"]))
        for nic in vm["config"]["nics"]
    )
    return Table(("NIC", "MAC", "NETWORK", "QUEUES"), rows, frozenset({"QUEUES"}), empty="no nics")


def vm(found: Json) -> Facts:
    config = found["config"]
    facts = [
        ("name", config["name"]),
        ("id", config["id"]),
        ("state", vm_state(found)),
        ("reason", found.get("reason_text") or ""),
        ("job", found.get("job") or ""),
        ("vcpus", f"{config['vcpus']} of {config['cpu_model']}"),
        ("memory", _size(config["memory"])),
        ("machine", config["machine"]),
        ("firmware", config["firmware"] + (", secure boot" if config["secure_boot"] else "")),
        ("tpm", "yes" if config["tpm"] else ""),
        ("kernel", _kernel(config.get("kernel"))),
        ("scsi", _controllers(config["scsi_controllers"])),
        ("autostart", _autostart(config["autostart"])),
        ("shutdown", f"{config['shutdown']['timeout']} s, then {config['shutdown']['then']}"),
        ("pending", _pending(config, found.get("next_config"))),
        ("handed to", found.get("handed_to") or ""),
        ("process", f"{found['process']['pid']} in {found['process']['run_dir']}" if found.get("process") else ""),
        ("notes", config["notes"]),
    ]
    return Facts(_given(facts), (disks(found), nics(found)))


def _controllers(number: int) -> str:
    return f"{number} controller" if number == 1 else f"{number} controllers"


def _pending(config: Json, waiting: Json | None) -> str:
    """What changes with the next start."""
    if waiting is None:
        return ""
    shown: dict[str, Callable[[Any], str]] = {"memory": _size, "kernel": _kernel}
    changed = [key for key in waiting if waiting[key] != config.get(key) and key not in ("disks", "nics")]
    parts = [f"{key.replace('_', ' ')} {shown.get(key, str)(waiting[key])}" for key in changed]
    return f"with the next start: {', '.join(parts) or 'as it is'}"


def _kernel(kernel: Json | None) -> str:
    if kernel is None:
        return ""
    parts = [kernel["kernel"], f"initrd {kernel['initrd']}" if kernel["initrd"] else "", kernel["cmdline"]]
    return ", ".join(part for part in parts if part)


def _autostart(autostart: Json) -> str:
    if not autostart["enabled"]:
        return "no"
    return f"yes, order {autostart['order']}, then {autostart['delay']} s"


def _given(facts: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((label, value) for label, value in facts if value)


def volumes(found: Sequence[Json]) -> Table:
    rows = tuple(
        (v["name"], v["state"], v["format"], _size(v["size"]), _size(v["allocated"]), v["pool"], v["path"])
        for v in sorted(found, key=lambda v: str(v["name"]))
    )
    columns = ("NAME", "STATE", "FORMAT", "SIZE", "ALLOCATED", "POOL", "PATH")
    return Table(columns, rows, frozenset({"SIZE", "ALLOCATED"}), empty="no volumes; make one: hostler volume create")


def volume(found: Json) -> Facts:
    return Facts(
        _given(
            (
                ("name", found["name"]),
                ("path", found["path"]),
                ("pool", found["pool"]),
                ("identity", found["identity"]),
                ("format", found["format"]),
                ("size", f"{_size(found['size'])} ({found['size']} bytes)"),
                ("allocated", _size(found["allocated"])),
                ("backing", found.get("backing") or ""),
                ("state", found["state"]),
                ("created", when(found.get("created")) if found.get("created") else ""),
            )
        )
    )


def hosts(found: Sequence[Json]) -> Table:
    rows = tuple(
        (
            host["name"] + (" *" if host["this"] else ""),
            host["state"],
            str(host["facts"]["logical_processors"]) if host.get("facts") else UNKNOWN,
            _size(host["facts"]["memory"]) if host.get("facts") else UNKNOWN,
            _size(host["memory_free"]) if host.get("facts") else UNKNOWN,
            str(host["running_vms"]),
            host["facts"]["accelerator"]["kind"] if host.get("facts") else UNKNOWN,
            host["address"] or UNKNOWN,
        )
        for host in found
    )
    columns = ("NAME", "STATE", "CPUS", "MEMORY", "FREE", "RUNNING", "ACCEL", "ADDRESS")
    return Table(columns, rows, frozenset({"CPUS", "MEMORY", "FREE", "RUNNING"}))


def host(found: Json) -> Facts:
    head = [
        ("name", found["name"]),
        ("id", found["id"]),
        ("state", found["state"] + (f": {found['text']}" if found.get("text") else "")),
        ("address", found["address"]),
        ("running vms", str(found["running_vms"])),
    ]
    facts = found.get("facts")
    if facts is None:
        return Facts(_given(head))
    return Facts(_given([*head, *_memory(found), *_hardware(facts), *_qemu(facts["qemu"])]))


def _memory(found: Json) -> list[tuple[str, str]]:
    promised, free = _size(found["memory_in_use"]), _size(found["memory_free"])
    return [("memory", f"{_size(found['facts']['memory'])}, {promised} promised to running vms, {free} free")]


def _hardware(facts: Json) -> list[tuple[str, str]]:
    choice = facts["accelerator"]
    nodes = len(facts["numa"])
    return [
        ("accelerator", choice["kind"] + (" (forced)" if choice["forced"] else "")),
        ("because", choice["reason"]),
        ("processors", f"{facts['logical_processors']} logical, {facts['cpu_name']}"),
        ("numa nodes", str(nodes) if nodes else ""),
        ("kernel", facts["kernel"]),
        ("privileged", "yes" if facts["privileged"] else "no: no bridges, no per-vm users"),
        ("limits", facts["profile"]),
    ]


def _qemu(qemu: Json) -> list[tuple[str, str]]:
    machines = qemu["machines"]
    return [
        ("qemu", f"{qemu['version']}, {qemu['binary']}"),
        ("machine types", f"{machines[0]} and {len(machines) - 1} older" if machines else ""),
        ("cpu model", qemu["default_cpu"]),
        ("uefi", qemu["firmware_code"] or "not installed (package ovmf)"),
        ("vtpm", "yes" if qemu["tpm"] else "not installed (package swtpm)"),
        ("sandbox", "yes" if qemu["sandbox"] else "no"),
        ("io_uring", "yes" if qemu["aio_io_uring"] else "no"),
    ]


def limits(found: Json) -> Facts:
    sizes = ("vm_memory", "vhd_size", "volume_size")
    facts = [("profile", str(found["profile"]))]
    for name, value in found.items():
        if name != "profile":
            shown = "what the host has" if value is None else _size(value) if name in sizes else str(value)
            facts.append((name, shown))
    return Facts(tuple(facts))


def job_progress(job: Json) -> str:
    """How far it is, or how it ended, in a few words."""
    if job.get("error"):
        return str(job["error"]["cause"])
    if job["state"] == "done" and job.get("ended"):
        took = datetime.fromisoformat(job["ended"]) - datetime.fromisoformat(job["created"])
        return f"took {took.total_seconds():.1f} s"
    progress = job["progress"]
    words = [f"{progress['fraction']:.0%}"] if progress.get("fraction") is not None else []
    words += [progress["text"]] if progress.get("text") else []
    return " ".join(words)


def jobs(found: Sequence[Json]) -> Table:
    found = sorted(found, key=lambda job: str(job["created"]))
    rows = tuple(
        (
            job["id"][:8],  # enough for every command that takes one
            job["state"],
            job["kind"],
            job["target_name"] or job["target"],
            when(job["created"]),
            job["by"],
            job_progress(job),
        )
        for job in found
    )
    columns = ("ID", "STATE", "KIND", "TARGET", "CREATED", "BY", "PROGRESS")
    return Table(columns, rows, empty="no jobs", whole=tuple(job["id"] for job in found))


def job(found: Json) -> Facts:
    error = found.get("error") or {}
    facts = [
        ("id", found["id"]),
        ("kind", found["kind"]),
        ("target", f"{found['target_name']} ({found['target']})" if found["target_name"] else found["target"]),
        ("state", found["state"]),
        ("progress", job_progress(found) if not error else ""),
        ("error", f"{error['object']}: {error['cause']}" if error else ""),
        ("advice", error.get("advice", "")),
        ("by", found["by"]),
        ("created", when(found["created"])),
        ("ended", when(found["ended"]) if found.get("ended") else ""),
        ("can be cancelled", "yes" if found["cancellable"] and not found.get("ended") else ""),
    ]
    rows = tuple((step["name"], step["state"], when(step["started"]), when(step["ended"])) for step in found["steps"])
    return Facts(_given(facts), (Table(("STEP", "STATE", "STARTED", "ENDED"), rows),) if rows else ())


def tokens(found: Sequence[Json]) -> Table:
    rows = tuple((t["name"], t["role"], when(t["created"]), t["id"]) for t in found)
    return Table(("NAME", "ROLE", "CREATED", "ID"), rows, states="", empty="no tokens")


def deleted(found: Json, what: str, *, dry_run: bool) -> str:
    """What went and what stayed."""
    lines = [f"would delete {what}" if dry_run else f"{what} is deleted"]
    lines += [f"{'would remove' if dry_run else 'removed'} {path}" for path in found["removed"]]
    lines += [f"{'would keep' if dry_run else 'kept'} {path}" for path in found["kept"]]
    return "\n".join(lines)


def plan(found: Json, vm: str, to: str) -> str:
    """Whether a VM may move, and everything that stands in the way. `vm` and `to` as the person called them."""
    head = f"move of vm {vm} to host {to} ({found['settings']['mode']})"
    if not found["blockers"]:
        return f"{head}: possible, at most {_size(found['memory'])} of memory to send"
    lines = [f"{head}: not possible"]
    for blocker in found["blockers"]:
        lines.append(f"  {blocker['kind']}: {blocker['text']}")
        lines += [f"    {blocker['advice']}"] if blocker["advice"] else []
    return "\n".join(lines)


def copy_line(job: Json) -> str:
    """One line about a disk's move under way: phase, bytes, rate, time to go."""
    progress = job["progress"]
    running = [step["name"] for step in job["steps"] if step["state"] == "running"]
    words = [running[-1] if running else job["state"]]
    words += [progress["text"]] if progress.get("text") else []
    left = (progress.get("detail") or {}).get("left")
    words += [f"{left:.0f} s to go"] if left is not None else []
    return "  ".join(words)


def move_line(job: Json) -> str:
    """One line about a running move: phase, bytes, round, rates, expected pause."""
    detail = job["progress"].get("detail") or {}
    running = [step["name"] for step in job["steps"] if step["state"] == "running"]
    words = [running[-1] if running else job["state"]]
    if detail.get("total"):
        words.append(
            f"{_size(detail['transferred'])} sent, {_size(detail['remaining'])} of {_size(detail['total'])} left"
        )
    if detail.get("rounds"):
        words.append(f"round {detail['rounds']}")
    if detail.get("rate"):
        words.append(f"{_size(detail['rate'])}/s, guest writes {_size(detail.get('dirty_rate') or 0)}/s")
    if detail.get("expected_pause") is not None:
        words.append(f"expected pause {detail['expected_pause']} ms")
    if detail.get("remaining_time") is not None:
        words.append(f"{detail['remaining_time'] / 1000:.0f} s to go")
    return "  ".join(words)
