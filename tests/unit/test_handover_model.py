"""Every interleaving of the hand-over: crashes, lost and repeated messages, killed QEMUs, restarts.

A small model of both hosts whose decisions are the product's own (`hostler.cluster.handover`) is explored exhaustively.
Volatile state dies with a daemon; records and QEMUs do not. Messages stay in flight for ever, so they may arrive late,
twice, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from hostler.cluster.handover import (
    Answer,
    Owner,
    Qemu,
    SourceAction,
    SourceWord,
    source_asks,
    source_recovers,
    target_may_refuse,
)

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class World:
    # the source: record (durable), QEMU, daemon (volatile)
    owner: Owner | None = Owner.KEEPING  # None: forgotten, the VM is gone from here
    source_runs: bool = True
    source_complete: bool = False
    source_alive: bool = True
    source_up: bool = True
    source_moving: bool = True  # the job is past its start and not over
    # the target
    prepared: bool = True  # phase; False and not accepted: refused
    accepted: bool = False
    loaded: bool = False
    target_runs: bool = False
    target_ran: bool = False  # was ever told to run
    target_forgot: bool = False  # restarted since it accepted: does not know whether it was told to run
    target_alive: bool = True
    target_up: bool = True
    # in flight, for ever
    accept_sent: bool = False
    answers: frozenset[Answer] = frozenset()
    killed: bool = False
    """Whether a QEMU was killed: then the VM may end up off."""

    @property
    def running(self) -> int:
        return int(self.source_runs and self.source_alive) + int(self.target_runs and self.target_alive)


def source_qemu(w: World) -> Qemu:
    if not w.source_alive:
        return Qemu.DEAD
    return Qemu.COMPLETE if w.source_complete else Qemu.LIVE


def target_says(w: World) -> Answer:
    if not w.target_up:
        return Answer.SILENT
    if w.accepted:
        return Answer.ACCEPTED if w.target_ran or w.target_forgot else Answer.SILENT
    if not w.prepared:
        return Answer.REFUSED
    return Answer.LOADED if w.loaded and w.target_alive else Answer.WAITING


def apply(w: World, action: SourceAction) -> World:
    match action:
        case SourceAction.GIVE:
            return replace(w, owner=Owner.GIVEN)
        case SourceAction.ASK:
            return replace(w, accept_sent=True)
        case SourceAction.FINISH:
            return replace(w, owner=None, source_alive=False, source_runs=False, source_moving=False)
        case SourceAction.TAKE_BACK | SourceAction.GO_ON:
            return replace(
                w, owner=Owner.KEEPING, source_runs=w.source_alive, source_complete=False, source_moving=False
            )
        case SourceAction.OFF:
            return replace(w, owner=Owner.KEEPING, source_runs=False, source_moving=False)


def source_steps(w: World) -> Iterator[World]:
    if not w.source_up:
        yield restart_source(w, target_says(w))
        yield restart_source(w, Answer.SILENT)
        return
    yield replace(w, source_up=False)
    if w.source_moving and w.owner is Owner.KEEPING and source_qemu(w) is Qemu.COMPLETE:
        yield apply(w, SourceAction.GIVE)
    if w.source_moving and w.owner is Owner.KEEPING and source_qemu(w) is not Qemu.COMPLETE:
        # its QEMU died (the daemon asks whether the target has it all), or its owner cancels
        yield apply(w, source_recovers(Owner.KEEPING, source_qemu(w), target_says(w)))
    if w.source_moving and w.owner is Owner.GIVEN:
        yield apply(w, SourceAction.ASK)
        for answer in w.answers:
            yield apply(w, source_asks(source_qemu(w), answer))


def restart_source(w: World, answer: Answer) -> World:
    w = replace(w, source_up=True)
    if not w.source_moving or w.owner is None:
        return w
    return apply(w, source_recovers(w.owner, source_qemu(w), answer))


def target_steps(w: World) -> Iterator[World]:
    if not w.target_up:
        yield restart_target(w)
        return
    yield replace(w, target_up=False)
    if w.accept_sent:
        yield from handle_accept(w)
    if w.accepted and w.target_alive and not w.target_runs:
        yield replace(w, target_runs=True, target_ran=True)
    if w.accepted and not w.target_alive and not w.target_ran and not w.target_forgot:
        yield replace(w, prepared=False, accepted=False)  # found dead before it was told to run
    if w.prepared and not w.accepted:
        if not w.target_alive:
            yield replace(w, prepared=False)
        word = SourceWord(known=True, over=not w.source_moving, given=w.owner is not Owner.KEEPING)
        for heard in (word if w.source_up else None, None):
            if target_may_refuse(heard, w.loaded, silent_for=60, patience=30):
                yield replace(w, prepared=False, target_alive=False)


def handle_accept(w: World) -> Iterator[World]:
    if w.accepted:
        if w.target_ran or w.target_forgot:  # the answer comes after the order to run
            yield replace(w, answers=w.answers | {Answer.ACCEPTED})
    elif w.prepared and w.loaded and w.target_alive:
        yield replace(w, accepted=True)  # recorded; runs and answers later, or dies before
    else:
        yield replace(w, prepared=False, target_alive=False, answers=w.answers | {Answer.REFUSED})


def restart_target(w: World) -> World:
    w = replace(w, target_up=True, target_forgot=w.target_forgot or w.accepted)
    if w.prepared and not w.accepted and not w.target_alive:
        return replace(w, prepared=False)
    return w


def world_steps(w: World) -> Iterator[World]:
    """What QEMU does by itself, and what kills it."""
    both = w.source_alive and w.source_runs and w.source_moving and w.target_alive and w.prepared
    if both and not w.accepted and not w.loaded:
        yield replace(w, source_runs=False, source_complete=True, loaded=True)
    if w.source_alive:
        yield replace(w, source_alive=False, source_runs=False, killed=True)
    if w.target_alive:
        yield replace(w, target_alive=False, target_runs=False, killed=True)


def explore() -> dict[World, set[World]]:
    graph: dict[World, set[World]] = {}
    queue = deque([World()])
    while queue:
        world = queue.popleft()
        if world in graph:
            continue
        graph[world] = {*source_steps(world), *target_steps(world), *world_steps(world)} - {world}
        queue.extend(graph[world])
    return graph


@pytest.fixture(scope="module")
def graph() -> dict[World, set[World]]:
    return explore()


def test_the_exploration_reaches_what_matters(graph: dict[World, set[World]]) -> None:
    assert len(graph) > 200
    assert any(w.target_runs and w.owner is None for w in graph), "a move that succeeds"
    assert any(not w.source_moving and w.source_runs and w.loaded for w in graph), "one taken back when all was sent"
    assert any(not w.source_alive and w.target_runs for w in graph), "one that outlives its source's QEMU"


def test_never_two_running(graph: dict[World, set[World]]) -> None:
    assert [w for w in graph if w.running > 1] == []


def test_the_target_runs_only_what_was_given_to_it(graph: dict[World, set[World]]) -> None:
    assert [w for w in graph if w.target_runs and w.owner is Owner.KEEPING] == []


def test_nobody_is_stuck_without_a_guest(graph: dict[World, set[World]]) -> None:
    """From every world in which no QEMU was killed, one in which the guest runs and all is over can be reached without
    killing any; so no crash or lost message leaves it standing for ever."""
    good = {w for w in graph if not w.killed and w.running == 1 and not w.source_moving}
    reaching = set(good)
    reverse: dict[World, set[World]] = {}
    for world, following in graph.items():
        for after in following:
            reverse.setdefault(after, set()).add(world)
    queue = deque(good)
    while queue:
        for before in reverse.get(queue.popleft(), set()):
            if before not in reaching and not before.killed:
                reaching.add(before)
                queue.append(before)
    assert [w for w in graph if not w.killed and w not in reaching] == []


def test_a_killed_qemu_costs_the_guest_only_where_it_was_the_only_one(graph: dict[World, set[World]]) -> None:
    """While the source keeps the VM and its QEMU lives, the target's death costs nothing: it can always go on."""
    for world in graph:
        if world.owner is Owner.KEEPING and world.source_alive and not world.source_moving:
            assert world.source_runs, world


@pytest.mark.parametrize("qemu", list(Qemu))
@pytest.mark.parametrize("owner", list(Owner))
@pytest.mark.parametrize("answer", list(Answer))
def test_every_recovery_has_a_decision(owner: Owner, qemu: Qemu, answer: Answer) -> None:
    action = source_recovers(owner, qemu, answer)
    if action in (SourceAction.TAKE_BACK, SourceAction.GO_ON):
        assert qemu is not Qemu.DEAD
    if action is SourceAction.FINISH:
        assert answer is Answer.ACCEPTED and owner is Owner.GIVEN


def test_a_mutant_is_caught() -> None:
    """The model must be able to fail: a source that goes on after it has given the VM away runs it twice."""
    world = replace(World(), owner=Owner.GIVEN, source_runs=False, source_complete=True, loaded=True, accepted=True)
    world = apply(replace(world, target_runs=True), SourceAction.GO_ON)
    assert world.running == 2
