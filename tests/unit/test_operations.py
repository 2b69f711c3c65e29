"""Every step of every kind of job: repeated, failed, unwound twice, and with the daemon killed before and after it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hostler.host.backups.service import KINDS as BACKUP_JOBS
from hostler.host.operations import OPERATIONS
from hostler.host.volumes.operations import VOLUME_OPERATIONS
from hostler.model.errors import HostLacks, NoSpace, WrongState
from hostler.model.job import JobState
from hostler.model.requests import VmChange
from hostler.model.vm import VmState
from hostler.testing.inprocess import Node, Site, short_directory, until
from hostler.testing.scenarios import (
    PLACES,
    SCENARIOS,
    Scenario,
    each_done_twice,
    each_undone_twice,
    picture,
)

pytestmark = pytest.mark.unit

OUTCOMES: dict[str, dict[str, object]] = {}
"""What is there after each kind of job went well, by kind."""


async def hosts(site: Site) -> tuple[Node, Node]:
    a, b = await site.add("a"), await site.add("b")
    await site.join(a, b)
    return a, b


async def outcome(scenario: Scenario) -> dict[str, object]:
    """What is there after the job went well."""
    if str(scenario) not in OUTCOMES:
        with short_directory() as directory:
            async with Site(directory) as other:
                node, _ = await hosts(other)
                await scenario.prepare(node)
                job = await scenario.run(node)
                assert job.state is JobState.DONE, job
                assert tuple(s.name for s in job.steps) == scenario.steps
                OUTCOMES[str(scenario)] = await picture(other)
    return OUTCOMES[str(scenario)]


async def test_every_kind_of_job_is_here(site: Site) -> None:
    node = await site.add("a")
    own = {node.application.migrations.operation.kind, "volume.create", "vm.import"}
    kinds = {*OPERATIONS, *VOLUME_OPERATIONS, *BACKUP_JOBS, *own}
    assert kinds == {s.kind for s in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
async def test_each_step_repeated(site: Site, scenario: Scenario) -> None:
    node, _ = await hosts(site)
    await scenario.prepare(node)
    job = await scenario.run(node, each_done_twice)
    assert job.state is JobState.DONE, job.error
    assert await picture(site) == await outcome(scenario)


def named(value: object) -> str:
    return str(value)


@pytest.mark.parametrize(("scenario", "step", "edge"), PLACES, ids=named)
@pytest.mark.parametrize("change", [list, each_undone_twice], ids=["once", "twice"])
async def test_a_failure_at_each_step(site: Site, scenario: Scenario, step: str, edge: str, change: object) -> None:
    node, _ = await hosts(site)
    await scenario.prepare(node)
    before = await picture(site)
    node.faults.fail(f"{scenario.kind}/{step}:{edge}", HostLacks("this test", "wants it so"))
    job = await scenario.run(node, change)  # type: ignore[arg-type]
    happened = scenario.happened(step, edge)
    assert job.state is (JobState.DONE if happened and scenario.insists else JobState.FAILED), job
    await node.quiet()
    assert await picture(site) == (await outcome(scenario) if happened else before)


@pytest.mark.parametrize(("scenario", "step", "edge"), PLACES, ids=named)
async def test_the_daemon_dies_at_each_step(site: Site, scenario: Scenario, step: str, edge: str) -> None:
    node, _ = await hosts(site)
    await scenario.prepare(node)
    before = await picture(site)
    hang = node.faults.hang(f"{scenario.kind}/{step}:{edge}")
    job = await scenario.begin(node)
    await hang.reached.wait()
    await node.die()
    await node.start()
    await node.quiet()
    ended = node.application.jobs.get(job.id)
    found = await picture(site)
    if scenario.goes_forward(step, edge):
        assert found == await outcome(scenario)
        assert ended.state is JobState.DONE, ended
    else:
        assert found == before
        assert ended.state is JobState.FAILED, ended


@pytest.mark.parametrize(("scenario", "step", "edge"), PLACES, ids=named)
async def test_cancelled_at_each_step(site: Site, scenario: Scenario, step: str, edge: str) -> None:
    """It is refused, and the job goes on; or everything is as it was."""
    node, _ = await hosts(site)
    await scenario.prepare(node)
    before = await picture(site)
    hang = node.faults.hang(f"{scenario.kind}/{step}:{edge}")
    job = await scenario.begin(node)
    await hang.reached.wait()
    refused = False
    try:
        await node.application.jobs.cancel(job.id, "test")
    except WrongState:
        refused = True
    hang.release.set()
    ended = await node.finish(job)
    await node.quiet()
    assert ended.state is (JobState.DONE if refused else JobState.CANCELLED), ended
    assert await picture(site) == (await outcome(scenario) if refused else before)


@pytest.mark.parametrize(("scenario", "step", "edge"), PLACES, ids=named)
async def test_qemu_dies_at_each_step(site: Site, scenario: Scenario, step: str, edge: str) -> None:
    """Whatever was under way ends, and nothing is held for a QEMU that is gone."""
    node, other = await hosts(site)
    await scenario.prepare(node)
    hang = node.faults.hang(f"{scenario.kind}/{step}:{edge}")
    job = await scenario.begin(node)
    await hang.reached.wait()
    for qemu in list(site.world.running.values()):
        if qemu.spec.run_dir.startswith(str(node.paths.run_dir)):
            qemu.die("killed by the test")
    hang.release.set()
    await node.finish(job)
    await node.quiet()
    await other.quiet()
    await until(lambda: not other.application.incoming.coming())
    judge_the_dead(await picture(site))


def judge_the_dead(found: dict[str, Any]) -> None:
    vms = [vm for host in ("a", "b") for vm in found[host]["vms"]]
    assert all(vm["job"] is None and vm["handed to"] is None for vm in vms)
    for vm in vms:
        assert vm["machine"] == (vm["state"] in (VmState.RUNNING, VmState.PAUSED))
        assert vm["state"] in (VmState.OFF, VmState.SAVED, VmState.RUNNING, VmState.PAUSED)
        assert vm["saved files"] == (["saved.state"] if vm["state"] is VmState.SAVED else [])
        if vm["state"] is VmState.OFF:
            assert vm["claims"] == []
    alive = sum(vm["machine"] for vm in vms)
    assert alive == len(found["running"]) == found["a"]["run dirs"] + found["b"]["run dirs"]
    assert bool(found["granted"]) == (alive > 0 and os.geteuid() == 0)
    assert found["a"]["leftover state"] == found["b"]["leftover state"] == []


@pytest.mark.parametrize(("scenario", "step", "edge"), PLACES, ids=named)
async def test_the_disk_is_full_at_each_step(site: Site, scenario: Scenario, step: str, edge: str) -> None:
    """One write to the store fails after it: the job ends, with everything as it was or as it was to be."""
    node, _ = await hosts(site)
    await scenario.prepare(node)
    before = await picture(site)
    hang = node.faults.hang(f"{scenario.kind}/{step}:{edge}")
    job = await scenario.begin(node)
    await hang.reached.wait()
    node.disk.fail("commit", NoSpace("the store", "the disk is full"))
    hang.release.set()
    await node.finish(job)
    await until(lambda: not node.application.jobs._running)
    await node.quiet()
    assert await picture(site) in (before, await outcome(scenario))


@pytest.mark.parametrize("kind", ["vm.start", "disk.attach", "disk.detach", "vm.turn-off"])
async def test_a_rename_in_the_middle_is_not_lost(site: Site, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Between the moment a step reads the record and the one it writes it, somebody renames the VM."""
    scenario = next(s for s in SCENARIOS if s.kind == kind)
    node, _ = await hosts(site)
    await scenario.prepare(node)
    application = node.application
    (record,) = application.vms.list()
    claims = application.vms._host.claims
    renamed = 0

    def wrap(plan: Any) -> Any:
        async def planned(*arguments: Any, **named: Any) -> Any:
            nonlocal renamed
            result = await plan(*arguments, **named)
            renamed += 1
            await application.vms.change(record.id, VmChange(name=f"renamed-{renamed}"), "test")
            return result

        return planned

    monkeypatch.setattr(claims, "plan_claim", wrap(claims.plan_claim))
    monkeypatch.setattr(claims, "plan_release", wrap(claims.plan_release))
    job = await scenario.run(node)
    assert job.state is JobState.DONE, job.error
    assert renamed
    assert application.vms.get(record.id).name == f"renamed-{renamed}"
