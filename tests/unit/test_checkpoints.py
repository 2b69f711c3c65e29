"""Checkpoints on simulated hosts: the tree, the refusals, what happens to volumes and VMs that belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostler.model.checkpoint import CheckpointKind, CheckpointState, CheckpointView
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointChange, CheckpointClone, CheckpointCreate
from hostler.model.disk import ImageFormat
from hostler.model.errors import AlreadyExists, HostlerError, InUse, LimitExceeded, NotFound, WrongState
from hostler.model.job import Job, JobState
from hostler.model.limits import Profile
from hostler.model.requests import DiskAdd, MigrateRequest, VmCreate, VolumeRegister
from hostler.model.units import MiB
from hostler.model.vm import VmRecord, VmState
from hostler.testing.inprocess import Node, Site

pytestmark = pytest.mark.unit


async def a_vm(site: Site, profile: Profile = Profile.HOSTLER) -> Node:
    """A host with the VM "web" of one disk, off."""
    node = await site.add("a", profile)
    disk = DiskAdd(volume=site.image("a.img"), format=ImageFormat.RAW)
    await node.application.vms.create(VmCreate(name="web", memory=64 * MiB, disks=(disk,)), "test")
    return node


async def ended(node: Node, job: object) -> Job:
    assert isinstance(job, Job)
    return await node.finish(job)


async def done(node: Node, job: object) -> Job:
    over = await ended(node, job)
    assert over.state is JobState.DONE, over.error
    return over


async def act(node: Node, action: str) -> None:
    await done(node, await node.application.vms.act("web", action, "test"))


async def make(node: Node, name: str | None = None, **more: object) -> None:
    request = CheckpointCreate.model_validate({"name": name, **more} if name else more)
    await done(node, await node.application.checkpoints.create("web", request, "test"))


async def delete(node: Node, name: str, subtree: bool = False) -> None:
    await done(node, await node.application.checkpoints.delete("web", name, "test", subtree))


async def points(node: Node) -> dict[str, CheckpointView]:
    return {p.name: p for p in await node.application.checkpoints.list("web")}


def web(node: Node) -> VmRecord:
    return node.application.vms.get("web")


def layers(node: Node, name: str = "web") -> int:
    return sum(1 for _ in node.application.vms.get(name).config.disks[0].source.layers())


def files(node: Node) -> list[str]:
    return sorted(path.name for path in node.site.directory.glob("a*.*"))


async def test_the_tree_grows_where_the_vm_is(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    await make(node, "two")
    await done(node, await node.application.checkpoints.apply("web", "one", CheckpointApply(), "test"))
    await make(node, "three")
    found = await points(node)
    ids = {p.id: name for name, p in found.items()}
    assert {name: ids.get(p.parent or "") for name, p in found.items()} == {"one": None, "two": "one", "three": "one"}
    assert [name for name, p in found.items() if p.now] == ["three"]
    await delete(node, "one")
    found = await points(node)
    assert {p.parent for p in found.values()} == {None}


async def test_the_name_is_made_from_vm_and_time(site: Site) -> None:
    node = await a_vm(site)
    await make(node)
    (name,) = await points(node)
    assert name.startswith("web - 20")


@pytest.mark.parametrize("state", ["off", "running", "paused", "saved"])
async def test_in_every_state_a_checkpoint_comes_and_goes(site: Site, state: str) -> None:
    node = await a_vm(site)
    for action in {"off": (), "running": ("start",), "paused": ("start", "pause"), "saved": ("start", "save")}[state]:
        await act(node, action)
    before = files(node)
    await make(node, "one")
    assert layers(node) == 2
    assert web(node).state == state
    await delete(node, "one")
    assert layers(node) == 1
    assert (web(node).state, files(node)) == (state, before)
    assert await points(node) == {}
    held = await node.application.host.claims.of(web(node).id)
    assert [(c.disk, c.write) for c in held] == ([] if state == "off" else [("disk0", True)])


async def test_memory_is_kept_and_comes_back(site: Site) -> None:
    node = await a_vm(site)
    await act(node, "start")
    await make(node, "full", kind="full")
    made = (await points(node))["full"]
    assert made.kind is CheckpointKind.FULL
    assert made.memory is not None
    assert Path(made.memory).exists()
    assert web(node).state is VmState.RUNNING
    await done(node, await node.application.checkpoints.apply("web", "full", CheckpointApply(turn_off=True), "test"))
    assert web(node).state is VmState.SAVED
    await act(node, "restore")
    assert web(node).state is VmState.RUNNING
    await delete(node, "full")
    assert not Path(made.memory).exists()


async def test_of_a_saved_vm_the_memory_is_copied(site: Site) -> None:
    node = await a_vm(site)
    await act(node, "start")
    await act(node, "save")
    await make(node, "full", kind="full")
    await act(node, "discard-saved")
    await done(node, await node.application.checkpoints.apply("web", "full", CheckpointApply(), "test"))
    await act(node, "restore")
    assert web(node).state is VmState.RUNNING


async def test_a_frozen_guest_is_always_thawed(site: Site) -> None:
    node = await a_vm(site)
    await act(node, "start")
    qemu = next(iter(site.world.running.values()))
    job = await node.application.checkpoints.create("web", CheckpointCreate(kind=CheckpointKind.APPLICATION), "test")
    assert (await ended(node, job)).state is JobState.FAILED  # there is no agent
    assert (qemu.frozen, layers(node), await points(node)) == (False, 1, {})
    qemu.agent = True
    await make(node, "one", kind="application")
    assert (qemu.frozen, layers(node)) == (False, 2)
    node.faults.fail("push", InUse("this test", "wants it so"))
    job = await node.application.checkpoints.create("web", CheckpointCreate(kind=CheckpointKind.APPLICATION), "test")
    assert (await ended(node, job)).state is JobState.FAILED
    assert (qemu.frozen, layers(node)) == (False, 2)


@pytest.mark.parametrize(("state", "kind"), [("off", "application"), ("paused", "full"), ("paused", "application")])
async def test_what_cannot_be_made_is_refused(site: Site, state: str, kind: str) -> None:
    node = await a_vm(site)
    for action in ("start", "pause") if state == "paused" else ():
        await act(node, action)
    with pytest.raises(WrongState):
        await node.application.checkpoints.create("web", CheckpointCreate.model_validate({"kind": kind}), "test")


async def test_applying_needs_the_vm_off(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    await act(node, "start")
    with pytest.raises(WrongState, match="must be off") as refusal:
        await node.application.checkpoints.apply("web", "one", CheckpointApply(), "test")
    assert "--turn-off" in refusal.value.advice
    request = CheckpointApply(turn_off=True, first=True)
    await done(node, await node.application.checkpoints.apply("web", "one", request, "test"))
    assert web(node).state is VmState.OFF
    assert len(await points(node)) == 2


async def test_the_guest_can_tell_that_it_went_back(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    before = web(node).config.generation_id
    await done(node, await node.application.checkpoints.apply("web", "one", CheckpointApply(), "test"))
    assert web(node).config.generation_id not in ("", before)


async def test_automatic_ones_give_way(site: Site) -> None:
    node = await a_vm(site)
    await act(node, "start")
    await make(node, "mine")
    for number in range(4):
        await make(node, f"auto{number}", keep=2)
    assert list(await points(node)) == ["mine", "auto2", "auto3"]
    assert layers(node) == 4


async def test_no_chain_gets_too_long(site: Site) -> None:
    node = await a_vm(site)
    node.application.host.limits = node.application.host.limits.but(chain_depth=3)
    await make(node, "auto", keep=5)
    await make(node, "mine")
    await make(node, "mine2")  # the automatic one gives way
    assert list(await points(node)) == ["mine", "mine2"]
    assert layers(node) == 3
    with pytest.raises(LimitExceeded, match="chain_depth"):
        await make(node, "mine3")


async def test_so_many_and_no_more(site: Site) -> None:
    node = await a_vm(site, Profile.HYPER_V_2008_R2)
    node.application.host.limits = node.application.host.limits.but(vm_checkpoints=2)
    await make(node, "one")
    await make(node, "two")
    with pytest.raises(LimitExceeded, match="vm_checkpoints"):
        await make(node, "three")


async def test_names_and_notes_change(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    request = CheckpointChange(name="first", notes="before the update")
    changed = await node.application.checkpoints.change("web", "one", request, "test")
    assert (changed.name, changed.notes) == ("first", "before the update")
    with pytest.raises(NotFound, match="one"):
        await node.application.checkpoints.get("web", "one")
    assert (await node.application.checkpoints.get("web", changed.id[:8])).name == "first"


# what belongs together


async def test_a_linked_vm_keeps_the_layers_it_reads(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    await done(node, await node.application.checkpoints.clone("web", "one", CheckpointClone(name="new"), "test"))
    one, two = web(node).config, node.application.vms.get("new").config
    assert (one.id, one.generation_id) != (two.id, two.generation_id)
    assert layers(node, "new") == 2
    with pytest.raises(AlreadyExists):
        await node.application.checkpoints.clone("web", "one", CheckpointClone(name="new"), "test")
    await delete(node, "one")
    assert layers(node) == 2  # not merged: the other VM reads the lower layer
    outcome = await node.application.vms.delete("web", "test", disks=True)
    assert [Path(path).name for path in outcome.kept] == ["a.img"]
    assert (site.directory / "a.img").exists()
    await done(node, await node.application.vms.act("new", "start", "test"))


async def test_a_full_copy_stands_alone(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    request = CheckpointClone(name="new", full=True)
    await done(node, await node.application.checkpoints.clone("web", "one", request, "test"))
    assert layers(node, "new") == 1
    await delete(node, "one")
    assert layers(node) == 1


async def test_a_vm_goes_with_all_its_layers(site: Site) -> None:
    node = await a_vm(site)
    await make(node, "one")
    await make(node, "two")
    planned = await node.application.vms.delete("web", "test", disks=True, dry_run=True)
    assert len(planned.removed) == 3
    await node.application.vms.delete("web", "test", disks=True)
    assert files(node) == []
    assert await node.application.host.checkpoints.all() == []
    assert await node.application.volumes.list() == []


async def test_disks_that_stay_can_be_used_again(site: Site) -> None:
    node = await a_vm(site)
    known = VolumeRegister(name="base", path=str(site.directory / "a.img"), format=ImageFormat.RAW)
    await node.application.volumes.register(known, "test")
    await make(node, "one")
    top = web(node).config.disks[0].source
    outcome = await node.application.vms.delete("web", "test")
    assert set(outcome.kept) == {top.path, str(site.directory / "a.img")}
    again = VmCreate(name="web", memory=64 * MiB, disks=(DiskAdd(volume=top.path),))
    await node.application.vms.create(again, "test")
    assert web(node).config.disks[0].source == top
    await act(node, "start")


async def test_nobody_writes_or_deletes_what_others_build_on(site: Site) -> None:
    node = await a_vm(site)
    base = str(site.directory / "a.img")
    await node.application.volumes.register(VolumeRegister(name="base", path=base, format=ImageFormat.RAW), "test")
    await make(node, "one")
    with pytest.raises(InUse, match="one"):
        await node.application.volumes.delete("base", "test")
    for ref in ("base", base):
        disk = DiskAdd(volume=ref, format=ImageFormat.RAW)
        with pytest.raises(InUse):
            await node.application.vms.create(VmCreate(name="thief", disks=(disk,)), "test")
    disk = DiskAdd(volume="base", read_only=True)
    await node.application.vms.create(VmCreate(name="reader", memory=64 * MiB, disks=(disk,)), "test")


async def test_a_half_deleted_one_is_deleted_at_the_second_try(site: Site) -> None:
    node = await a_vm(site)
    await act(node, "start")
    await make(node, "one")
    qemu = next(iter(site.world.running.values()))
    qemu.job_error = "No space left on device"
    job = await node.application.checkpoints.delete("web", "one", "test")
    assert (await ended(node, job)).state is JobState.FAILED
    assert (await points(node))["one"].state is CheckpointState.MERGING
    with pytest.raises(HostlerError, match="merging"):
        await node.application.checkpoints.clone("web", "one", CheckpointClone(name="new"), "test")
    assert layers(node) == 2
    qemu.job_error = ""
    await delete(node, "one")
    assert layers(node) == 1
    assert len(files(node)) == 1


# on another host


async def two(site: Site) -> tuple[Node, Node]:
    a, b = await a_vm(site), await site.add("b")
    await site.join(a, b)
    return a, b


async def test_checkpoints_move_with_their_vm(site: Site) -> None:
    a, b = await two(site)
    await act(a, "start")
    await make(a, "one", kind="full")
    await make(a, "two")
    before = await points(a)
    await done(a, await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    assert await points(b) == before
    assert await a.application.host.checkpoints.all() == []
    assert await a.application.volumes.list() == []
    assert layers(b) == 3
    await delete(b, "one")
    await delete(b, "two")
    assert layers(b) == 1
    assert files(b) == ["a.img"]


async def test_a_vm_whose_memory_the_other_host_has_not_stays(site: Site) -> None:
    a, _ = await two(site)
    await act(a, "start")
    await make(a, "one", kind="full")
    made = (await points(a))["one"]
    assert made.memory is not None
    Path(made.memory).unlink()
    job = await ended(a, await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    assert job.error is not None
    assert "a checkpoint needs" in job.error.cause
    assert web(a).state is VmState.RUNNING


async def test_a_vm_that_shares_layers_stays(site: Site) -> None:
    a, _ = await two(site)
    await make(a, "one")
    await done(a, await a.application.checkpoints.clone("web", "one", CheckpointClone(name="new"), "test"))
    await act(a, "start")
    plan = await a.application.migrations.check("web", MigrateRequest(host="b"))
    assert [b.kind for b in plan.blockers] == ["volume-busy"]
    job = await ended(a, await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    assert job.state is JobState.FAILED
