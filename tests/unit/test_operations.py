"""Every step of every kind of job: repeated, failed, unwound twice, and with the daemon killed before and after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hostler.host.operations import OPERATIONS
from hostler.model.errors import HostLacks
from hostler.model.job import JobState
from hostler.testing.inprocess import Node, Site
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
    if scenario.kind not in OUTCOMES:
        with tempfile.TemporaryDirectory(prefix="ho", dir="/tmp") as name:
            async with Site(Path(name)) as other:
                node, _ = await hosts(other)
                await scenario.prepare(node)
                job = await scenario.run(node)
                assert job.state is JobState.DONE, job
                assert tuple(s.name for s in job.steps) == scenario.steps
                OUTCOMES[scenario.kind] = await picture(other)
    return OUTCOMES[scenario.kind]


async def test_every_kind_of_job_is_here(site: Site) -> None:
    node = await site.add("a")
    kinds = {*OPERATIONS, node.application.migrations.operation.kind, "volume.create"}
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
