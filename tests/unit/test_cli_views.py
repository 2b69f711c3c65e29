"""What people see, rendered from real models: the views read JSON by field names, which must not drift from them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest

from hostler.cli import output, pool_views, progress, views
from hostler.cli.commands import pool as pool_commands
from hostler.cli.commands.disk import attached
from hostler.cli.commands.vm_move import moved
from hostler.cli.output import plain
from hostler.cli.settings import Settings
from hostler.model.base import Record
from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import ErrorCode
from hostler.model.host import Accelerator, AcceleratorChoice, HostFacts, HostState, NumaNode, QemuFacts
from hostler.model.job import Job, JobState, JobStep, Progress, StepState
from hostler.model.limits import PROFILES, Profile
from hostler.model.migration import Blocker, BlockerKind, MigrationProgress, MigrationSettings
from hostler.model.nic import Network, Nic
from hostler.model.pool import Features, Found, Leftover, PoolKind, PoolState, PoolView, Refused, ScanReport
from hostler.model.principal import Role
from hostler.model.problem import Problem
from hostler.model.units import GiB, MiB
from hostler.model.views import Deleted, HostView, MigrationPlan, TokenView
from hostler.model.vm import Autostart, CriticalReason, Firmware, KernelBoot, Process, VmConfig, VmRecord, VmState
from hostler.model.volume import Volume

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 24, 12, 0, 5, 123456, tzinfo=UTC)

DISKS = (
    Disk(id="disk0", source=DiskSource(path="/v/a.qcow2", format=ImageFormat.QCOW2, size=20 * GiB)),
    Disk(id="disk1", unit=1, read_only=True, source=DiskSource(kind=SourceKind.DEVICE, path="/dev/sdb", size=GiB)),
    Disk(id="cd0", bus=Bus.IDE, media=Media.CDROM, read_only=True, source=DiskSource(path="/iso", size=600 * MiB)),
)
NICS = (
    Nic(id="nic0", mac="52:54:00:00:00:01"),
    Nic(id="nic1", mac="52:54:00:00:00:02", network=Network.BRIDGE, bridge="br0", queues=4),
)
CONFIG = VmConfig(
    id="0b1c", name="web1", vcpus=2, memory=2 * GiB, machine="pc-q35-7.2", cpu_model="Nehalem-v1", disks=DISKS,
    nics=NICS, firmware=Firmware.UEFI, secure_boot=True, tpm=True, notes="one\ntwo",
    kernel=KernelBoot(kernel="/k", initrd="/i", cmdline="quiet"), autostart=Autostart(enabled=True, order=1, delay=2),
)  # fmt: skip
RUNNING = VmRecord(
    config=CONFIG,
    state=VmState.RUNNING,
    process=Process(pid=7, started=1, run_dir="/run/x"),
    next_config=CONFIG.but(vcpus=4, memory=4 * GiB),
)
CRITICAL = VmRecord(
    config=VmConfig(id="2", name="db", machine="m", cpu_model="c"), state=VmState.CRITICAL,
    reason=CriticalReason.NO_SPACE, reason_text="disk0 is full\nmore words",
)  # fmt: skip
JOB = Job(
    id="j1", kind="vm.migrate", target="0b1c", target_name="web1", state=JobState.RUNNING, by="uid 0", created=NOON,
    steps=(JobStep(name="check", state=StepState.DONE, started=NOON, ended=NOON), JobStep(name="pre-copy",
    state=StepState.RUNNING, started=NOON)),
    progress=Progress(fraction=0.5, text="copying memory, round 3", detail=MigrationProgress(
        transferred=GiB, remaining=256 * MiB, total=2 * GiB, rounds=3, rate=100 * MiB, dirty_rate=12 * MiB,
        expected_pause=35, remaining_time=2600, elapsed=11_000, downtime=31).to_json()),
)  # fmt: skip
FACTS = HostFacts(
    id="h1", name="alpha", logical_processors=2, cpu_name="Xeon", memory=8 * GiB, privileged=True, kernel="6.1",
    accelerator=AcceleratorChoice(kind=Accelerator.TCG, reason="no vmx", forced=True), numa=(NumaNode(id=0, cpus=(0, 1),
    memory=8 * GiB),),
    qemu=QemuFacts(binary="/usr/bin/qemu", version="7.2.22", machines=("pc-q35-7.2", "pc-q35-7.1"), default_cpu="c"),
)  # fmt: skip
ALPHA = HostView(id="h1", name="alpha", state=HostState.UP, this=True, facts=FACTS, running_vms=3, memory_free=GiB)
BETA = HostView(id="h2", name="beta", address="b:1", state=HostState.UNREACHABLE, this=False, text="since noon")


def as_json(*records: Record) -> list[dict[str, Any]]:
    """As the API sends it."""
    return [json.loads(record.model_dump_json()) for record in records]


def one(record: Record) -> dict[str, Any]:
    return as_json(record)[0]


def facts(found: views.Facts) -> dict[str, str]:
    return dict(found.facts)


def test_vms() -> None:
    assert plain(views.vms(as_json(RUNNING, CRITICAL))) == (
        "NAME  STATE                VCPUS  MEMORY  DISKS  NICS  NOTE\n"
        "db    critical (no-space)      1   1 GiB      0     0  disk0 is full\n"
        "web1  running                  2   2 GiB      3     2  changes wait for the next start"
    )


def test_a_vm() -> None:
    shown = views.vm(one(RUNNING))
    assert facts(shown) == {
        "name": "web1",
        "id": "0b1c",
        "state": "running",
        "vcpus": "2 of Nehalem-v1",
        "memory": "2 GiB",
        "machine": "pc-q35-7.2",
        "firmware": "uefi, secure boot",
        "tpm": "yes",
        "kernel": "/k, initrd /i, quiet",
        "scsi": "1 controller",
        "autostart": "yes, order 1, then 2 s",
        "shutdown": "120 s, then leave",
        "pending": "with the next start: vcpus 4, memory 4 GiB",
        "process": "7 in /run/x",
        "notes": "one\ntwo",
    }
    assert [plain(table) for table in shown.tables] == [
        "DISK   ADDRESS      SIZE  FORMAT  KIND                     SOURCE\n"
        "disk0  scsi 0:0   20 GiB  qcow2   disk                     /v/a.qcow2\n"
        "disk1  scsi 0:1    1 GiB  raw     read-only, pass-through  /dev/sdb\n"
        "cd0    ide 0:0   600 MiB  raw     cdrom                    /iso",
        "NIC   MAC                NETWORK     QUEUES\n"
        "nic0  52:54:00:00:00:01  user             1\n"
        "nic1  52:54:00:00:00:02  bridge br0       4",
    ]


def test_what_others_wrote_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = CRITICAL.but(reason_text="\x1b]0;owned\x07\u202eevil", config=CONFIG.but(notes="a\x1b[2J\nb"))
    for view in (views.vm, lambda found: views.vms([found])):
        output.show(Settings(), evil.model_dump_json().encode(), view)
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(shown)
    assert "a\N{REPLACEMENT CHARACTER}[2J\n" in shown


def test_a_handed_over_vm_says_so() -> None:
    row = views.vms(as_json(CRITICAL.but(reason_text="", handed_to="h2"))).rows[0]
    assert row[-1] == "handed over to another host, which has not confirmed yet"
    assert facts(views.vm(one(CRITICAL.but(handed_to="h2"))))["handed to"] == "h2"


def test_volumes() -> None:
    volume = Volume(name="a", path="/v/a", format=ImageFormat.VHDX, size=GiB, allocated=MiB, backing="/b", created=NOON)
    assert plain(views.volumes(as_json(volume))) == (
        "NAME  STATE  FORMAT   SIZE  ALLOCATED  POOL  PATH\na     ready  vhdx    1 GiB      1 MiB        /v/a"
    )
    assert facts(views.volume(one(volume))) == {
        "name": "a", "path": "/v/a", "format": "vhdx", "size": "1 GiB (1073741824 bytes)", "allocated": "1 MiB",
        "backing": "/b", "state": "ready", "created": "2026-11-24 12:00:05",
    }  # fmt: skip


def test_hosts() -> None:
    assert plain(views.hosts(as_json(ALPHA, BETA))) == (
        "NAME     STATE        CPUS  MEMORY   FREE  RUNNING  ACCEL  ADDRESS\n"
        "alpha *  up              2   8 GiB  1 GiB        3  tcg    -\n"
        "beta     unreachable     -       -      -        0  -      b:1"
    )
    shown = facts(views.host(one(ALPHA)))
    assert shown["accelerator"] == "tcg (forced)"
    assert shown["because"] == "no vmx"
    assert shown["memory"] == "8 GiB, 0 B promised to running vms, 1 GiB free"
    assert shown["machine types"] == "pc-q35-7.2 and 1 older"
    assert shown["uefi"] == "not installed (package ovmf)"
    assert facts(views.host(one(BETA)))["state"] == "unreachable: since noon"


def test_limits() -> None:
    shown = facts(views.limits(one(PROFILES[Profile.HOSTLER])))
    assert (shown["profile"], shown["vm_vcpus"], shown["vm_memory"]) == ("hostler", "255", "32 TiB")
    assert shown["host_vcpus"] == "what the host has"
    assert len(shown) == len(type(PROFILES[Profile.HOSTLER]).model_fields)


def test_jobs() -> None:
    failed = JOB.but(
        id="j2", state=JobState.FAILED, ended=NOON, target_name="",
        error=Problem(code=ErrorCode.NO_SPACE, object="vm web1", cause="disk is full", advice="make room"),
    )  # fmt: skip
    assert plain(views.jobs(as_json(JOB, failed))) == (
        "ID  STATE    KIND        TARGET  CREATED              BY     PROGRESS\n"
        "j1  running  vm.migrate  web1    2026-11-24 12:00:05  uid 0  50% copying memory, round 3\n"
        "j2  failed   vm.migrate  0b1c    2026-11-24 12:00:05  uid 0  disk is full"
    )
    done = JOB.but(state=JobState.DONE, ended=NOON.replace(second=7))
    assert views.job_progress(one(done)) == "took 2.0 s"
    shown = views.job(one(failed))
    assert facts(shown)["error"] == "vm web1: disk is full"
    assert facts(shown)["advice"] == "make room"
    assert "can be cancelled" in facts(views.job(one(JOB)))
    assert plain(shown.tables[0]).splitlines()[1:] == [
        "check     done     2026-11-24 12:00:05  2026-11-24 12:00:05",
        "pre-copy  running  2026-11-24 12:00:05  -",
    ]


def test_a_move_under_way_and_at_its_end() -> None:
    assert views.move_line(one(JOB)) == (
        "pre-copy  1 GiB sent, 256 MiB of 2 GiB left  round 3  100 MiB/s, guest writes 12 MiB/s  "
        "expected pause 35 ms  3 s to go"
    )
    assert views.move_line(one(JOB.but(steps=(), progress=Progress(), state=JobState.UNWINDING))) == "unwinding"
    ended = JOB.but(state=JobState.DONE, ended=JOB.created + timedelta(seconds=11))
    assert moved("web1", "beta", one(ended)) == (
        "vm web1 is on host beta, after 11.0 s, with a pause of 31 ms as QEMU counts it"
    )
    assert moved("web1", "beta", one(JOB.but(progress=Progress()))) == "vm web1 is on host beta"
    assert progress.describe(one(JOB)) == "vm.migrate  web1  pre-copy  copying memory, round 3"


def test_an_attached_disk_is_named() -> None:
    job = one(JOB.but(params={"disk": {"id": "disk3"}}))
    assert attached("web1", job) == "vm web1 has disk disk3"
    assert attached("web1", one(JOB)) == "vm web1 has the disk"


def test_tokens() -> None:
    token = TokenView(id="t1", name="backup", role=Role.VIEWER, created=NOON)
    assert plain(views.tokens(as_json(token))) == (
        "NAME    ROLE    CREATED              ID\nbackup  viewer  2026-11-24 12:00:05  t1"
    )


def test_deletions() -> None:
    found = one(Deleted(id="x", removed=("/a",), kept=("/b",)))
    assert views.deleted(found, "vm x", dry_run=True) == "would delete vm x\nwould remove /a\nwould keep /b"
    assert views.deleted(found, "vm x", dry_run=False) == "vm x is deleted\nremoved /a\nkept /b"
    assert views.deleted(one(Deleted(id="x")), "vm x", dry_run=True) == "would delete vm x"


def test_plans() -> None:
    plan = MigrationPlan(vm="v", source="h1", target="h2", settings=MigrationSettings(), memory=GiB)
    assert views.plan(one(plan), "web1", "beta") == (
        "move of vm web1 to host beta (live): possible, at most 1 GiB of memory to send"
    )
    blocked = plan.but(blockers=(Blocker(kind=BlockerKind.NO_TPM, text="no swtpm", advice="install it"),))
    assert views.plan(one(blocked), "web1", "beta") == (
        "move of vm web1 to host beta (live): not possible\n  no-tpm: no swtpm\n    install it"
    )


def test_pools() -> None:
    san = PoolView(
        name="san", kind=PoolKind.ISCSI, portals=("h:3260", "i:3260"), target="iqn.x:t", chap_user="u",
        has_secret=True, state=PoolState.UNREACHABLE, text="does not answer",
    )  # fmt: skip
    fast = PoolView(
        name="fast", kind=PoolKind.DIRECTORY, path="/p", state=PoolState.LOW, capacity=4 * GiB, free=GiB, allocated=MiB,
        promised=8 * GiB, volumes=2, latency=0.0012, warnings=("may grow",),
        features=Features(kind="ext4", fallocate=True, punch_hole=True, direct=True, acl=True),
    )  # fmt: skip
    listed = pool_views.pools(as_json(fast, san))
    assert listed.rows == (
        ("fast", "low", "directory", "4 GiB", "1 GiB", "1 MiB", "8 GiB", "2", "/p", "may grow"),
        ("san", "unreachable", "iscsi", "-", "-", "0 B", "0 B", "0", "iqn.x:t at h:3260, i:3260", "does not answer"),
    )
    assert plain(listed).startswith("NAME  STATE")
    shown = facts(pool_views.pool(one(fast)))
    assert shown["latency"] == "1.2 ms" and shown["warning"] == "may grow"
    assert shown["it cannot"] == "instant copies (reflink)"
    assert facts(pool_views.pool(one(san)))["state"] == "unreachable: does not answer"
    report = ScanReport(
        pool="fast", unknown=(Found(name="a", path="/p/a", size=MiB),), missing=("gone",), deleted=("/p/.x",),
        leftovers=(Leftover(path="/p/.x", size=MiB, age=9999),), refused=(Refused(path="/p/t", why="is a text"),),
        dry_run=True,
    )  # fmt: skip
    [table] = pool_views.scan(one(report)).tables
    assert [row[0] for row in table.rows] == ["in no record", "missing", "would be deleted", "no volume: is a text"]
    assert "everything is as recorded" in dict(pool_views.scan(one(ScanReport(pool="p"))).facts).values()


def test_every_argument_of_a_pool_command_is_one() -> None:
    """Options and arguments may share a name; what stands without dashes must be taken as an argument."""
    for name in ("show", "change", "delete", "scan"):
        command = getattr(pool_commands, f"{name}_")
        assert [p.name for p in command.params if isinstance(p, click.Argument)] == ["pool"], name
