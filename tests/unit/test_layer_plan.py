"""What becomes of layers that nobody holds: nothing that somebody holds ever reads differently."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.host.checkpoints.layers import (
    Layer,
    Merge,
    Remove,
    depth,
    merged,
    on_top,
    plan_merges,
    with_sources,
    without_top,
)
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.vm import VmConfig

pytestmark = pytest.mark.unit

BLOCKS = 4
Content = dict[int, str]


def chain(*names: str) -> list[Layer]:
    """A base and the layers on it."""
    return [Layer(name, below, made=below is not None) for below, name in pairwise((None, *names)) if name is not None]


def test_a_layer_that_nobody_holds_takes_what_the_one_on_top_of_it_has() -> None:
    assert plan_merges(chain("base", "1"), ["1"]) == [Merge("1", "base", ("1",))]


def test_several_in_a_row_are_merged_at_once() -> None:
    assert plan_merges(chain("base", "1", "2", "3"), ["3"]) == [Merge("3", "base", ("3", "2", "1"))]


def test_a_held_layer_is_where_a_merge_ends() -> None:
    plan = plan_merges(chain("base", "1", "2", "3"), ["1", "3"])
    assert plan == [Merge("1", "base", ("1",)), Merge("3", "2", ("3",))]


def test_all_are_held() -> None:
    assert plan_merges(chain("base", "1", "2"), ["base", "1", "2"]) == []


def test_where_two_build_on_a_layer_it_stays() -> None:
    layers = [*chain("base", "1"), Layer("2", "base", made=True)]
    assert plan_merges(layers, ["1", "2"]) == []


def test_a_branch_that_nobody_holds_goes_and_then_the_rest_is_merged() -> None:
    layers = [*chain("base", "1"), Layer("2", "base", made=True), Layer("3", "2", made=True)]
    assert plan_merges(layers, ["1"]) == [Remove("3"), Remove("2"), Merge("1", "base", ("1",))]


def test_an_image_of_its_own_is_never_removed() -> None:
    assert plan_merges([Layer("base", None)], []) == []


def test_a_layer_that_another_vm_reads_is_left_alone() -> None:
    layers = [Layer("base", None, fixed=True), Layer("1", "base", made=True), Layer("2", "1", made=True)]
    assert plan_merges(layers, ["2"]) == [Merge("2", "1", ("2",))]


def test_what_was_not_made_as_a_layer_is_not_merged_away() -> None:
    layers = [Layer("base", None), Layer("mine", "base")]
    assert plan_merges(layers, ["mine"]) == []


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[Layer], set[str]]:
    """Layers in any tree, some held, some fixed."""
    count = draw(st.integers(1, 9))
    layers = [Layer("0", None)]
    for number in range(1, count):
        parent = str(draw(st.integers(0, number - 1)))
        layers.append(Layer(str(number), parent, made=True))
    fixed = draw(st.sets(st.sampled_from([layer.path for layer in layers])))
    pins = draw(st.sets(st.sampled_from([layer.path for layer in layers])))
    # What another VM reads it reads with all that is below.
    below = {path for top in fixed for path in _below(layers, top)}
    return [Layer(la.path, la.parent, la.made, la.path in below) for la in layers], pins


def _below(layers: list[Layer], path: str | None) -> list[str]:
    parents = {layer.path: layer.parent for layer in layers}
    found = []
    while path is not None:
        found.append(path)
        path = parents[path]
    return found


def read(parents: dict[str, str | None], content: dict[str, Content], path: str | None) -> Content:
    seen: Content = {}
    while path is not None:
        seen = {**content[path], **seen}
        path = parents[path]
    return seen


@given(forests(), st.randoms(use_true_random=False))
def test_whoever_holds_a_layer_reads_what_he_read_before(forest: tuple[list[Layer], set[str]], random: object) -> None:
    layers, pins = forest
    parents = {layer.path: layer.parent for layer in layers}
    fixed = {layer.path for layer in layers if layer.fixed}
    content = {
        layer.path: {b: f"{layer.path}{b}" for b in range(BLOCKS) if hash((layer.path, b)) % 2} for layer in layers
    }
    before = {pin: read(parents, content, pin) for pin in pins}
    untouched = {path: dict(content[path]) for path in fixed}
    now = {pin: pin for pin in pins}
    for action in plan_merges(layers, pins):
        if isinstance(action, Remove):
            assert action.path not in parents.values(), "something builds on it"
            assert action.path not in now.values(), "somebody holds it"
            del parents[action.path]
            continue
        _do(action, parents, content, now)
    assert {pin: read(parents, content, at) for pin, at in now.items()} == before
    assert all(content[path] == untouched[path] for path in fixed), "another VM reads these"
    assert fixed <= set(parents)
    _nothing_left(layers, parents, set(now.values()), fixed)


def _do(action: Merge, parents: dict[str, str | None], content: dict[str, Content], now: dict[str, str]) -> None:
    top, at = action.top, action.top
    path: list[str] = []
    while at != action.base:
        path.append(at)
        assert list(parents.values()).count(at) == (1 if at != top else list(parents.values()).count(at))
        below = parents[at]
        assert below is not None
        at = below
    assert tuple(path) == action.gone
    assert action.base not in now.values(), "its holder would read something else"
    assert all(p not in now.values() for p in path[1:])
    for layer in reversed(path):
        content[action.base].update(content[layer])
    for child, parent in list(parents.items()):
        if parent == top:
            parents[child] = action.base
    for layer in path:
        del parents[layer]
    for pin, where in now.items():
        if where == top:
            now[pin] = action.base


def _nothing_left(layers: list[Layer], parents: dict[str, str | None], held: set[str], fixed: set[str]) -> None:
    """No layer stays that somebody could have got rid of."""
    made = {layer.path for layer in layers if layer.made}
    for path in set(parents) - held - fixed:
        children = [c for c, p in parents.items() if p == path]
        assert len(children) != 1
        assert children or path not in made


# chains


def source(*names: str) -> DiskSource:
    made = DiskSource(path=names[0], size=4096)
    for number, name in enumerate(names[1:], 1):
        made = DiskSource(path=name, format=ImageFormat.QCOW2, size=4096, node=f"n{number}", backing=made)
    return made


def test_a_layer_comes_and_goes() -> None:
    before = source("/base")
    after = on_top(before, "abc", "/top")
    assert [layer.path for layer in after.layers()] == ["/top", "/base"]
    assert on_top(after, "abc", "/top") == after
    assert without_top(after, "abc") == before
    assert without_top(before, "abc") == before


@pytest.mark.parametrize(
    ("top", "base", "left"),
    [
        ("/3", "/2", ["/2", "/1", "/base"]),
        ("/2", "/base", ["/3", "/base"]),
        ("/3", "/base", ["/base"]),
        ("/other", "/base", ["/3", "/2", "/1", "/base"]),
        ("/base", "/3", ["/3", "/2", "/1", "/base"]),
    ],
)
def test_layers_of_a_chain_become_one(top: str, base: str, left: list[str]) -> None:
    after = merged(source("/base", "/1", "/2", "/3"), top, base)
    assert [layer.path for layer in after.layers()] == left


def test_a_disk_that_has_grown_is_as_large_after_the_merge() -> None:
    grown = source("/base", "/1").model_copy(update={"size": 8192})
    after = merged(grown, "/1", "/base")
    assert (after.path, after.size) == ("/base", 8192)


def test_the_depth_is_that_of_the_deepest_disk() -> None:
    config = VmConfig(id="1", name="a", machine="m", cpu_model="c")
    assert depth(config) == 0
    disks = (Disk(id="disk0", source=source("/a")), Disk(id="disk1", unit=1, source=source("/b", "/c")))
    config = config.but(disks=disks)
    assert depth(config) == 2
    flat = with_sources(config, lambda disk: disk.source.base)
    assert [d.source.path for d in flat.disks] == ["/a", "/b"]
