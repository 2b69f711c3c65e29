"""A move between two hosts at every named step, with either daemon killed, either QEMU killed, or the cable pulled:
afterwards the VM is on exactly one host. tests/cluster does the same with real processes; here it takes seconds, so
here are all combinations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hostler.model.disk import ImageFormat
from hostler.model.errors import NoSpace, QemuFailed
from hostler.model.job import JobState
from hostler.model.machine import RunStatus
from hostler.model.migration import MigrationMode
from hostler.model.requests import DiskAdd, MigrateRequest, VmChange, VmCreate
from hostler.model.units import MiB
from hostler.model.vm import CriticalReason, VmConfig, VmState
from hostler.testing.faults import Hang
from hostler.testing.inprocess import Node, Site, until
from hostler.testing.scenarios import SCENARIOS, granted

pytestmark = pytest.mark.unit

STEPS = next(s.steps for s in SCENARIOS if s.kind == "vm.migrate")
PLACES = [(f"vm.migrate/{step}", edge) for step in STEPS for edge in ("before", "after")]
PLACES += [("incoming/accept", "before"), ("incoming/accept", "after")]

Trouble = Callable[[Site, Node, Node, Hang], Awaitable[None]]


def kill_qemu(site: Site, node: Node) -> None:
    for run_dir, qemu in list(site.world.running.items()):
        if run_dir.startswith(str(node.paths.run_dir)):
            qemu.die("killed by the test")


async def source_daemon(_site: Site, a: Node, _b: Node, _hang: Hang) -> None:
    await a.die()
    await a.start()


async def target_daemon(_site: Site, _a: Node, b: Node, hang: Hang) -> None:
    await b.die()
    hang.release.set()
    await b.start()


async def both_daemons(_site: Site, a: Node, b: Node, _hang: Hang) -> None:
    await asyncio.gather(a.die(), b.die())
    await b.start()
    await a.start()


async def source_first(_site: Site, a: Node, b: Node, _hang: Hang) -> None:
    """Both are killed; the source comes back and asks a target that is not there yet."""
    await asyncio.gather(a.die(), b.die())
    await a.start()
    await asyncio.sleep(0.05)
    await b.start()


async def source_qemu(site: Site, a: Node, _b: Node, hang: Hang) -> None:
    kill_qemu(site, a)
    hang.release.set()


async def target_qemu(site: Site, _a: Node, b: Node, hang: Hang) -> None:
    kill_qemu(site, b)
    hang.release.set()


async def cable(_site: Site, _a: Node, b: Node, hang: Hang) -> None:
    b.cut = True
    hang.release.set()
    await asyncio.sleep(0.1)
    b.cut = False


async def cable_and_source(site: Site, a: Node, b: Node, hang: Hang) -> None:
    """The source is killed and comes back while nobody answers it."""
    b.cut = True
    await source_daemon(site, a, b, hang)
    await asyncio.sleep(0.1)
    b.cut = False


TROUBLES: tuple[Trouble, ...] = (
    source_daemon,
    target_daemon,
    both_daemons,
    source_first,
    source_qemu,
    target_qemu,
    cable,
    cable_and_source,
)


async def ready(site: Site, paused: bool = False) -> tuple[Node, Node]:
    """Two hosts, and a VM that runs, or stands still, on the first."""
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    disk = DiskAdd(volume=site.image("a.img"), format=ImageFormat.RAW)
    await a.application.vms.create(VmCreate(name="web", memory=64 * MiB, disks=(disk,)), "test")
    for action in ("start", "pause") if paused else ("start",):
        await a.finish(await a.application.vms.act("web", action, "test"))
    return a, b


async def settled(*nodes: Node) -> None:
    """Until nobody has anything to do any more."""

    def nothing_under_way() -> bool:
        return all(
            not node.application.incoming.coming() and all(job.is_over for job in node.application.jobs.list())
            for node in nodes
        )

    await until(nothing_under_way)
    for node in nodes:
        await node.quiet()
    await until(lambda: all(a.record.state is not VmState.MIGRATING for n in nodes for a in actors(n)))
    await until(lambda: all(tidy(node) for node in nodes))


def tidy(node: Node) -> bool:
    """Whether it has nothing of VMs that are not its own, and no accept under way."""
    own = {actor.record.id for actor in actors(node)}
    left = [p for d in (node.paths.run_dir, node.paths.state_dir) for p in (d / "vms").glob("*") if p.name not in own]
    ours = [q for run_dir, q in node.site.world.running.items() if run_dir.startswith(str(node.paths.run_dir))]
    machines = [actor.machine for actor in actors(node) if actor.machine is not None]
    return not left and len(ours) == len(machines) and not node.application.incoming._accepting


def actors(node: Node) -> list[Any]:
    return list(node.application.host.actors.values())


async def judge(site: Site, *nodes: Node, alive: VmState | None = VmState.RUNNING) -> Node:
    """It is on exactly one host, in the state `alive`, or off where its only QEMU was killed (None: either)."""
    found = [(node, actor.record) for node in nodes for actor in actors(node)]
    assert len(found) == 1, found
    ((owner, record),) = found
    assert (record.job, record.handed_to) == (None, None)
    assert record.state in ((alive,) if alive else (VmState.OFF, VmState.RUNNING)), record
    running = list(site.world.running.values())
    if record.state is VmState.OFF:
        assert running == []
        assert record.reason_text, "it says why"
    else:
        (qemu,) = running
        assert qemu.spec.run_dir.startswith(str(owner.paths.run_dir))
        still = (RunStatus.PAUSED, RunStatus.POSTMIGRATE)
        assert qemu.status in ((RunStatus.RUNNING,) if record.state is VmState.RUNNING else still)
        assert qemu.active or record.state is VmState.PAUSED
    held = record.state is not VmState.OFF
    for node in nodes:
        mine = node is owner and held
        assert len(await node.store.list("claim/")) == mine
        assert len(list((node.paths.run_dir / "vms").glob("*"))) == mine
        assert node is owner or not list((node.paths.state_dir / "vms").glob("*"))
    assert granted(site.directory / "a.img") <= held
    assert site.world.wire == {}
    return owner


@pytest.mark.parametrize(("where", "edge"), PLACES)
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: t.__name__)
async def test_whatever_happens(site: Site, trouble: Trouble, where: str, edge: str) -> None:
    a, b = await ready(site)
    stands = b if where.startswith("incoming") else a
    hang = stands.faults.hang(f"{where}:{edge}")
    await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    await hang.reached.wait()
    await trouble(site, a, b, hang)
    hang.release.set()
    await settled(a, b)
    await judge(site, a, b, alive=None if "qemu" in trouble.__name__ else VmState.RUNNING)


@pytest.mark.parametrize("mode", MigrationMode)
@pytest.mark.parametrize("paused", [False, True])
async def test_there_and_back(site: Site, mode: MigrationMode, paused: bool) -> None:
    a, b = await ready(site, paused)
    state = VmState.PAUSED if paused else VmState.RUNNING
    generations = []
    for source, target in ((a, b), (b, a), (a, b)):
        request = MigrateRequest(host=target.name, mode=mode)
        job = await source.finish(await source.application.migrations.migrate("web", request, "test"))
        assert job.state is JobState.DONE, job.error
        await settled(a, b)
        assert await judge(site, a, b, alive=state) is target
        generations.append(target.application.vms.get("web").generation)
    assert generations == sorted(set(generations))


async def test_a_paused_vm_that_comes_back_stays_paused(site: Site) -> None:
    a, b = await ready(site, paused=True)
    b.faults.hang("incoming/accept:before")
    hang = a.faults.hang("vm.migrate/switch-over:after")
    await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    await hang.reached.wait()
    kill_qemu(site, b)
    await until(lambda: not b.application.incoming.coming())
    hang.release.set()
    await settled(a, b)
    assert await judge(site, a, b, alive=VmState.PAUSED) is a


async def test_two_vms_cross(site: Site) -> None:
    a, b = await ready(site)
    await b.application.vms.create(VmCreate(name="db", memory=64 * MiB), "test")
    await b.finish(await b.application.vms.act("db", "start", "test"))
    one = await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    two = await b.application.migrations.migrate("db", MigrateRequest(host="a"), "test")
    assert [(await a.finish(one)).state, (await b.finish(two)).state] == [JobState.DONE] * 2
    await settled(a, b)
    assert [r.name for r in a.application.vms.list()] == ["db"]
    assert [r.name for r in b.application.vms.list()] == ["web"]


async def test_a_change_that_waits_for_the_next_start_goes_along(site: Site) -> None:
    a, b = await ready(site)
    await a.application.vms.change("web", VmChange(memory=128 * MiB), "test", when_off=True)
    await a.finish(await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    waiting = b.application.vms.get("web").next_config
    assert waiting is not None
    assert waiting.memory == 128 * MiB


async def test_a_refused_move_does_not_end_the_next_one(site: Site) -> None:
    """The target remembers the first for a while, and tidies it again at its restart."""
    a, b = await ready(site)
    begun = a.faults.hang("vm.migrate/pre-copy:before")
    first = await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    await begun.reached.wait()
    await a.application.jobs.cancel(first.id, "test")
    begun.release.set()
    await a.finish(first)
    sent = a.faults.hang("vm.migrate/switch-over:before")
    second = await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test")
    await sent.reached.wait()
    await b.die()
    await b.start()
    sent.release.set()
    assert (await a.finish(second)).state is JobState.DONE
    await settled(a, b)
    assert await judge(site, a, b) is b


async def test_a_disk_that_could_not_be_opened_at_arrival_is_opened_before_the_guest_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await ready(site)
    opened: list[str] = []

    async def fail(_config: VmConfig) -> None:
        raise QemuFailed("disk disk0", "its storage does not answer")

    async def note(config: VmConfig) -> None:
        opened.append(config.name)

    monkeypatch.setattr(b.application.host.resources, "open_exports", fail)
    await a.finish(await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    record = b.application.vms.get("web")
    assert (record.state, record.reason) == (VmState.CRITICAL, CriticalReason.IO_ERROR)
    assert "does not answer" in record.reason_text
    assert (await b.finish(await b.application.vms.act("web", "resume", "test"))).state is JobState.FAILED
    monkeypatch.setattr(b.application.host.resources, "open_exports", note)
    assert (await b.finish(await b.application.vms.act("web", "resume", "test"))).state is JobState.DONE
    assert opened == ["web"]


async def test_a_delete_that_failed_holds_nothing(site: Site) -> None:
    a = await site.add("a")
    await a.application.vms.create(VmCreate(name="web", memory=64 * MiB), "test")
    actor = a.application.host.actor("web")

    async def full(*_: object) -> None:
        raise NoSpace("store", "the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "delete", full)
        with pytest.raises(NoSpace):
            await a.application.vms.delete("web", "test")
    assert a.application.vms.get("web").job is None
    await a.application.vms.delete("web", "test")
