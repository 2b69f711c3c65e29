"""The job engine by itself: order, undo, cancel, what is on disk when, and a disk that is full."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from hostler.host import jobs as engine
from hostler.host.events import EventHub
from hostler.host.jobs import JobRunner
from hostler.host.steps import JobContext, Plan, Step
from hostler.model.errors import ErrorCode, NoSpace, NotFound, QemuFailed, WrongState
from hostler.model.job import Job, JobState, Progress, StepState
from hostler.store.sqlite import SqliteStore
from hostler.testing.faults import Faults, Hang
from hostler.testing.faulty_store import FaultyStore
from hostler.testing.inprocess import until

pytestmark = pytest.mark.unit

PATIENCE = 60.0


class Bench:
    """A runner on a store that can fail, and steps that write down what they do."""

    def __init__(self, store: SqliteStore) -> None:
        self.disk = Faults()
        self.store = FaultyStore(store, self.disk)
        self.events = EventHub()
        self.runner = JobRunner(self.store, self.events)
        self.faults = Faults()
        self.log: list[str] = []
        self.ended: list[Job] = []

    def step(self, name: str, insist: Callable[[], bool] = lambda: False) -> Step:
        """Fails or hangs where `faults` has it planned at "do NAME" or "undo NAME"."""

        def act(verb: str) -> Callable[[JobContext], Awaitable[None]]:
            async def run(_context: JobContext) -> None:
                self.log.append(f"{verb} {name}")
                await self.faults.enter(f"{verb} {name}")

            return run

        return Step(name, act("do"), act("undo"), insist)

    def plan(self, *steps: Step, cancellable: bool = True) -> Plan:
        async def finish(job: Job) -> None:
            await self.faults.enter("finish")
            self.ended.append(job)

        made = steps or tuple(self.step(name) for name in "abc")
        return Plan("test.job", "id", "name", made, cancellable=cancellable, finish=finish)

    async def run(self, *steps: Step) -> Job:
        job = await self.runner.start(self.plan(*steps), "me")
        return await self.runner.wait(job.id, PATIENCE)

    async def on_disk(self, job: Job) -> Job:
        entry = await self.store.get(f"job/{job.id}")
        assert entry is not None
        return Job.model_validate(entry.value)

    async def after_a_crash(self) -> tuple[JobRunner, list[Job]]:
        """The next daemon's runner, and what it finds unfinished."""
        await self.runner.close()
        self.runner = JobRunner(self.store, self.events)
        return self.runner, list(await self.runner.load())


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(engine, "INSIST_FIRST", 0.001)
    store = await SqliteStore.open(tmp_path / "s" / "x.db")
    made = Bench(store)
    yield made
    await made.runner.close()
    await store.close()


def states(job: Job) -> list[StepState]:
    return [s.state for s in job.steps]


async def test_steps_run_in_order_each_recorded_before_it_runs(bench: Bench) -> None:
    hang = bench.faults.hang("do b")
    job = await bench.runner.start(bench.plan(), "me")
    await hang.reached.wait()
    found = await bench.on_disk(job)
    assert found.state is JobState.RUNNING
    assert states(found) == [StepState.DONE, StepState.RUNNING, StepState.PENDING]
    hang.release.set()
    ended = await bench.runner.wait(job.id, PATIENCE)
    assert bench.log == ["do a", "do b", "do c"]
    assert (ended.state, ended.error, ended.progress.fraction, ended.cancellable) == (JobState.DONE, None, 1.0, False)
    assert states(ended) == [StepState.DONE] * 3
    assert await bench.on_disk(job) == ended == bench.ended[0]
    assert all(s.started and s.ended and s.started <= s.ended for s in ended.steps)


async def test_a_failure_undoes_that_step_and_those_before_in_reverse(bench: Bench) -> None:
    bench.faults.fail("do b", QemuFailed("vm x", "says no", "ask again"))
    ended = await bench.run()
    assert bench.log == ["do a", "do b", "undo b", "undo a"]
    assert ended.state is JobState.FAILED and ended.error is not None
    assert (ended.error.code, ended.error.cause, ended.error.advice) == (ErrorCode.QEMU_FAILED, "says no", "ask again")
    assert states(ended) == [StepState.UNDONE, StepState.UNDONE, StepState.PENDING]


async def test_a_fault_of_ours_is_undone_too_and_named_internal(bench: Bench) -> None:
    bench.faults.fail("do b", ZeroDivisionError("x"))
    ended = await bench.run()
    assert ended.error is not None and ended.error.code is ErrorCode.INTERNAL
    assert bench.log[-1] == "undo a"


async def test_a_failing_undo_does_not_keep_the_others_from_running(bench: Bench) -> None:
    bench.faults.fail("do c", QemuFailed("x", "the first error"))
    bench.faults.fail("undo b", QemuFailed("x", "the second error"))
    ended = await bench.run()
    assert bench.log[3:] == ["undo c", "undo b", "undo a"]
    assert ended.error is not None and ended.error.cause == "the first error"


async def test_a_step_that_insists_is_tried_until_it_succeeds(bench: Bench) -> None:
    left = [3]

    def insist() -> bool:
        left[0] -= 1
        return left[0] >= 0

    bench.faults.fail("do b", QemuFailed("x", "not yet"), times=3)
    ended = await bench.run(bench.step("a"), bench.step("b", insist))
    assert (ended.state, bench.log) == (JobState.DONE, ["do a"] + ["do b"] * 4)
    bench.faults.fail("do b", QemuFailed("x", "not yet"), times=9)
    left[0] = 2
    ended = await bench.run(bench.step("a"), bench.step("b", insist))
    assert ended.state is JobState.FAILED
    assert bench.log[5:] == ["do a"] + ["do b"] * 3 + ["undo b", "undo a"]


# cancelling


async def begin(bench: Bench, where: str, plan: Plan | None = None) -> tuple[Job, Hang]:
    hang = bench.faults.hang(where)
    job = await bench.runner.start(plan or bench.plan(), "me")
    await hang.reached.wait()
    return job, hang


async def test_cancelled_in_the_middle_of_a_step(bench: Bench) -> None:
    job, _ = await begin(bench, "do b")
    await asyncio.gather(*(bench.runner.cancel(job.id, "me") for _ in range(3)))
    ended = await bench.runner.wait(job.id, PATIENCE)
    assert ended.state is JobState.CANCELLED
    assert bench.log == ["do a", "do b", "undo b", "undo a"]
    with pytest.raises(WrongState, match="ended already"):
        await bench.runner.cancel(job.id, "me")


async def test_cancelled_before_its_first_step(bench: Bench) -> None:
    job = await bench.runner.start(bench.plan(), "me")
    await bench.runner.cancel(job.id, "me")
    ended = await bench.runner.wait(job.id, PATIENCE)
    assert (ended.state, bench.log, len(bench.ended)) == (JobState.CANCELLED, [], 1)


async def test_not_cancelled_while_it_ends(bench: Bench) -> None:
    job, hang = await begin(bench, "finish")
    with pytest.raises(WrongState):
        await bench.runner.cancel(job.id, "me")
    hang.release.set()
    assert (await bench.runner.wait(job.id, PATIENCE)).state is JobState.DONE


async def test_cancelled_where_the_step_does_not_notice(bench: Bench) -> None:
    """asyncio.wait_for of Python 3.11 loses a cancellation that comes together with the result."""

    async def deaf(_context: JobContext) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await bench.faults.enter("deaf")

    job, _ = await begin(bench, "deaf", bench.plan(Step("deaf", deaf), bench.step("b")))
    await bench.runner.cancel(job.id, "me")
    assert (await bench.runner.wait(job.id, PATIENCE)).state is JobState.CANCELLED
    assert bench.log == []


async def test_not_cancelled_while_it_unwinds(bench: Bench) -> None:
    bench.faults.fail("do c", QemuFailed("x", "y"))
    job, hang = await begin(bench, "undo b")
    with pytest.raises(WrongState):
        await bench.runner.cancel(job.id, "me")
    hang.release.set()
    assert (await bench.runner.wait(job.id, PATIENCE)).state is JobState.FAILED
    assert bench.log[-1] == "undo a"


async def test_not_cancelled_past_the_point_of_no_return(bench: Bench) -> None:
    async def last(context: JobContext) -> None:
        context.no_return()
        await bench.faults.enter("last")

    job, hang = await begin(bench, "last", bench.plan(bench.step("a"), Step("last", last)))
    assert not bench.runner.get(job.id).cancellable
    with pytest.raises(WrongState, match="any more"):
        await bench.runner.cancel(job.id, "me")
    hang.release.set()
    assert (await bench.runner.wait(job.id, PATIENCE)).state is JobState.DONE


async def test_a_job_that_was_never_cancellable(bench: Bench) -> None:
    job, hang = await begin(bench, "do a", bench.plan(cancellable=False))
    with pytest.raises(WrongState):
        await bench.runner.cancel(job.id, "me")
    hang.release.set()


# after a crash


async def test_what_was_interrupted_is_found_and_gone_on_with(bench: Bench) -> None:
    job, _ = await begin(bench, "do b")
    runner, found = await bench.after_a_crash()
    assert [j.id for j in found] == [job.id]
    bench.log.clear()
    runner.resume(bench.plan(), found[0], "b")
    assert (await runner.wait(job.id, PATIENCE)).state is JobState.DONE
    assert bench.log == ["do b", "do c"]
    assert (await bench.after_a_crash())[1] == []


async def test_what_fails_after_being_resumed_is_undone_from_the_beginning(bench: Bench) -> None:
    job, _ = await begin(bench, "do b")
    runner, found = await bench.after_a_crash()
    bench.log.clear()
    bench.faults.fail("do c", QemuFailed("x", "y"))
    runner.resume(bench.plan(), found[0], "b")
    assert (await runner.wait(job.id, PATIENCE)).state is JobState.FAILED
    assert bench.log == ["do b", "do c", "undo c", "undo b", "undo a"]


async def test_what_was_interrupted_is_undone_where_it_may_have_been(bench: Bench) -> None:
    job, _ = await begin(bench, "do b")
    runner, found = await bench.after_a_crash()
    bench.log.clear()
    runner.unwind(bench.plan(), found[0])
    ended = await runner.wait(job.id, PATIENCE)
    assert bench.log == ["undo b", "undo a"]
    assert ended.state is JobState.FAILED and ended.error is not None
    assert ended.error.code is ErrorCode.INTERRUPTED
    assert len(bench.ended) == 1


async def test_killed_while_it_unwinds(bench: Bench) -> None:
    bench.faults.fail("do b", QemuFailed("x", "y"))
    job, _ = await begin(bench, "undo a")
    runner, found = await bench.after_a_crash()
    assert found[0].state is JobState.UNWINDING
    bench.log.clear()
    runner.unwind(bench.plan(), found[0])
    await runner.wait(job.id, PATIENCE)
    assert bench.log == ["undo b", "undo a"]


async def test_a_stopping_daemon_undoes_nothing(bench: Bench) -> None:
    await begin(bench, "do b")
    await bench.runner.close()
    assert bench.log == ["do a", "do b"]
    assert bench.ended == []


# a full disk


async def test_a_step_that_cannot_be_recorded_does_not_run(bench: Bench) -> None:
    job, hang = await begin(bench, "do a")
    bench.disk.fail("commit", NoSpace("store", "the disk is full"))
    hang.release.set()
    ended = await bench.runner.wait(job.id, PATIENCE)
    assert bench.log == ["do a", "undo b", "undo a"]
    assert ended.error is not None and ended.error.code is ErrorCode.NO_SPACE


async def test_an_end_that_cannot_be_recorded_is_told_and_recorded_later(bench: Bench) -> None:
    job, hang = await begin(bench, "do c")
    bench.disk.fail("commit", NoSpace("store", "the disk is full"), times=1000)
    hang.release.set()
    told = await bench.runner.wait(job.id, PATIENCE)
    assert told.state is JobState.DONE
    assert (await bench.on_disk(job)).state is JobState.RUNNING
    bench.disk.clear()
    await until(lambda: job.id not in bench.runner._running)
    assert (await bench.on_disk(job)).state is JobState.DONE


async def test_a_job_that_cannot_be_recorded_does_not_begin(bench: Bench) -> None:
    bench.disk.fail("commit", NoSpace("store", "the disk is full"))
    with pytest.raises(NoSpace):
        await bench.runner.start(bench.plan(), "me")
    assert bench.log == []
    assert list(bench.runner.list()) == []


async def test_what_it_holds_is_given_back_when_that_works_again(bench: Bench) -> None:
    bench.faults.fail("finish", NoSpace("store", "the disk is full"), times=3)
    ended = await bench.run()
    assert ended.state is JobState.DONE
    await until(lambda: len(bench.ended) == 1)


# looking


async def test_jobs_are_found_by_the_beginning_of_their_id(bench: Bench) -> None:
    ended = await bench.run()
    assert bench.runner.get(ended.id[:4]) == ended
    for unknown in (ended.id[:3], "zzzz", ""):
        with pytest.raises(NotFound):
            bench.runner.get(unknown)


async def test_waiting_ends_with_the_job_or_the_time(bench: Bench) -> None:
    job, hang = await begin(bench, "do a")
    assert (await bench.runner.wait(job.id, 0.001)).state is JobState.RUNNING
    assert (await bench.runner.wait(job.id, 0)).state is JobState.RUNNING
    hang.release.set()
    assert (await bench.runner.wait(job.id, PATIENCE)).is_over
    assert (await bench.runner.wait(job.id, PATIENCE)).is_over


async def test_the_oldest_ended_jobs_are_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "KEEP_ENDED", 3)
    running, hang = await begin(bench, "do a")
    made = [await bench.run() for _ in range(5)]
    kept = [running.id, *(j.id for j in made[2:])]
    assert [j.id for j in bench.runner.list()] == kept
    assert sorted(e.key for e in await bench.store.list("job/")) == sorted(f"job/{id}" for id in kept)
    hang.release.set()


async def test_progress_is_shown_seldom_and_kept(bench: Bench) -> None:
    async def work(context: JobContext) -> None:
        for number in range(1000):
            context.progress(Progress(fraction=number / 1000))
        context.result({"x": 1})

    heard: list[str] = []

    async def listen() -> None:
        async for event in bench.events.subscribe():
            heard.append(event.kind)

    task = asyncio.create_task(listen())
    await until(lambda: bool(bench.events._listeners))
    ended = await bench.run(Step("work", work))
    bench.events.close()
    await task
    assert ended.result == {"x": 1}
    assert 3 <= len(heard) < 100
