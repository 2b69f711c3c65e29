"""Checkpoints as a tree, and on their way to another host."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from hostler.model.checkpoint import (
    Checkpoint,
    Family,
    Luggage,
    default_name,
    in_tree_order,
    nearest_left,
    pack,
    subtree,
    unpack,
)
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.vm import VmConfig

pytestmark = pytest.mark.unit

START = datetime(2026, 11, 24, 10, 12, 31, tzinfo=UTC)


def point(id: str, parent: str | None = None, after: int = 0, source: DiskSource | None = None) -> Checkpoint:
    disks = (Disk(id="disk0", source=source),) if source else ()
    config = VmConfig(id="vm", name="web1", machine="m", cpu_model="c", disks=disks)
    created = START + timedelta(seconds=after)
    return Checkpoint(id=id, vm="vm", name=id.upper(), parent=parent, created=created, config=config)


FAMILY = [point("d", "a", 4), point("c", "b", 3), point("b", "a", 2), point("a", None, 1), point("e", "gone", 5)]


def test_the_name_is_as_hyper_v_gives_it() -> None:
    assert default_name("web1", START) == "web1 - 2026-11-24 10:12:31"
    assert len(default_name("x" * 100, START)) == 100


def test_the_tree_shows_each_below_the_one_it_builds_on() -> None:
    assert [(depth, c.id) for depth, c in in_tree_order(FAMILY)] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (1, "d"),
        (0, "e"),
    ]


def test_a_subtree_is_a_checkpoint_and_all_that_builds_on_it() -> None:
    assert {c.id for c in subtree(FAMILY, "a")} == {"a", "b", "c", "d"}
    assert {c.id for c in subtree(FAMILY, "b")} == {"b", "c"}
    assert subtree(FAMILY, "none") == []


def test_parents_that_name_each_other_end_a_walk() -> None:
    circle = [point("a", "b"), point("b", "a")]
    assert {c.id for c in subtree(circle, "a")} == {"a", "b"}
    assert nearest_left(circle, ["a", "b"], "a") is None
    assert list(in_tree_order(circle)) == []


@pytest.mark.parametrize(
    ("gone", "start", "left"),
    [
        ([], "c", "c"),
        (["c"], "c", "b"),
        (["c", "b"], "c", "a"),
        (["a"], "a", None),
        ([], None, None),
        (["b"], "d", "d"),
    ],
)
def test_what_hung_on_a_deleted_one_hangs_on_the_next_above(gone: list[str], start: str | None, left: str) -> None:
    assert nearest_left(FAMILY, gone, start) == left


def chain(count: int) -> DiskSource:
    made = DiskSource(path="/base", size=4096)
    for number in range(count):
        made = DiskSource(path=f"/{number}", format=ImageFormat.QCOW2, size=4096, node=f"n{number}", backing=made)
    return made


def test_a_family_arrives_as_it_was_sent() -> None:
    sent = [point(f"p{n}", f"p{n - 1}" if n else None, n, chain(n)) for n in range(40)]
    family = Family.model_validate_json(pack(sent).model_dump_json())
    assert unpack(family) == sent


def test_each_layer_travels_once() -> None:
    one, ten = (len(pack([point(str(n), None, n, chain(n)) for n in range(c)]).model_dump_json()) for c in (1, 10))
    assert ten < 12 * one


@pytest.mark.parametrize("parents", [{"/0": "/nowhere"}, {"/0": "/0"}, {"/0": "/base", "/base": "/0"}])
def test_layers_that_do_not_fit_together_are_refused(parents: dict[str, str]) -> None:
    family = pack([point("a", source=chain(1))]).but(parents=parents)
    with pytest.raises(ValueError, match="layers"):
        unpack(family)


@pytest.mark.parametrize(
    "memory", ["/etc/passwd", "/0.memory/../../etc/passwd.memory", "/elsewhere/0.memory", "/../0.memory"]
)
def test_another_host_names_no_file_that_is_not_beside_the_disks(memory: str) -> None:
    made = point("a", source=chain(1)).but(memory="/0.memory")
    assert Luggage(family=pack([made])).family.checkpoints[0].memory == "/0.memory"
    with pytest.raises(ValueError, match="not beside"):
        Luggage(family=pack([made.but(memory=memory)]))
