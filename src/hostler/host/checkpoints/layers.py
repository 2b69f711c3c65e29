"""Which layers disks are made of, who holds them, and what becomes of those that nobody holds. Pure.

        now    after "b" was deleted: nobody holds layer 2 any more, and one layer builds on it
         |
       3 (top)                3 merged into 2; "now" writes 2
         |
  b -- 2              ==>     2
         |                    |
  a -- 1 -- 4 (top of c)      1 -- 4      nobody may change 1: "a" holds it, and two build on it

A layer is held by each state that has it as its topmost one: a checkpoint, or what a VM writes now. What builds on a
layer keeps it, but keeps nobody from merging it. Content never changes for whoever holds a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.vm import VmConfig

# chains


def on_top(source: DiskSource, token: str, path: str) -> DiskSource:
    """The chain with a new, empty layer on top. Harmless when it has it."""
    if source.node == token:
        return source
    return DiskSource(path=path, format=ImageFormat.QCOW2, size=source.size, node=token, backing=source)


def all_fixed(source: DiskSource) -> DiskSource:
    """The chain as one that belongs to somebody else."""
    below = all_fixed(source.backing) if source.backing is not None else None
    return source.model_copy(update={"fixed": True, "backing": below})


def without_top(source: DiskSource, token: str) -> DiskSource:
    """The chain without the top layer of that token. Harmless when it has it not."""
    return source.backing if source.node == token and source.backing is not None else source


def merged(source: DiskSource, top: str, base: str) -> DiskSource:
    """The chain after the layers from that `top` down to `base` (paths) became one, which is `base`. It is as large as
    the top layer was. Chains that do not have both stay as they are."""
    layers = list(source.layers())
    paths = [layer.path for layer in layers]
    if top not in paths or base not in paths or paths.index(top) >= paths.index(base):
        return source
    first, last = paths.index(top), paths.index(base)
    made = layers[last].model_copy(update={"size": max(layers[first].size, layers[last].size)})
    for layer in reversed(layers[:first]):
        made = layer.model_copy(update={"backing": made})
    return DiskSource.model_validate(made.model_dump())


def with_sources(config: VmConfig, change: Callable[[Disk], DiskSource]) -> VmConfig:
    """The configuration with what is behind each disk changed."""
    disks = tuple(disk.model_copy(update={"source": change(disk)}) for disk in config.disks)
    return config.model_copy(update={"disks": disks})


def depth(config: VmConfig) -> int:
    """Layers of the disk that has most of them."""
    return max((sum(1 for _ in disk.source.layers()) for disk in config.disks), default=0)


# what is to be done with layers that nobody holds


@dataclass(frozen=True, slots=True)
class Layer:
    """One image. `made`: it was made to be a layer, and may be deleted when nothing needs it. `fixed`: it must not be
    changed (another VM reads it, too; it cannot be written)."""

    path: str
    parent: str | None
    made: bool = False
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete that layer: nobody holds it, nothing builds on it."""

    path: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Write the layers from `top` down to `base` (without) into `base`. `gone`: those that are to be deleted then, the
    top one first. Who held or was built on `top` has `base` from then on."""

    top: str
    base: str
    gone: tuple[str, ...]


def plan_merges(layers: Iterable[Layer], pins: Iterable[str]) -> list[Remove | Merge]:
    """Everything to be done, in this order. `pins`: the paths somebody holds (paths that are no layer are ignored)."""
    known = {layer.path: layer for layer in layers}
    held = set(pins)
    plan: list[Remove | Merge] = list(_removals(known, held))
    for path in [p for p in known if p not in held and not known[p].fixed]:
        if path not in known:
            continue  # merged into another one meanwhile
        run = _run_above(path, known, held)
        if run:
            plan.append(Merge(run[-1], path, tuple(reversed(run))))
            _apply(plan[-1], known, held)
    return plan


def _removals(known: dict[str, Layer], held: set[str]) -> Iterable[Remove]:
    """Takes layers away from the outside inwards until each of the outermost ones is needed."""
    while True:
        parents = {layer.parent for layer in known.values()}
        free = [p for p, layer in known.items() if layer.made and not layer.fixed and p not in held | parents]
        if not free:
            return
        for path in free:
            del known[path]
            yield Remove(path)


def _run_above(path: str, known: Mapping[str, Layer], held: set[str]) -> list[str]:
    """The layers above that one, lowest first, up to the first that is held or that several, or none, build on."""
    run: list[str] = []
    at = path
    while at not in held:
        children = [p for p, layer in known.items() if layer.parent == at]
        if len(children) != 1 or not known[children[0]].made:
            break
        at = children[0]
        run.append(at)
    return run


def _apply(merge: Remove | Merge, known: dict[str, Layer], held: set[str]) -> None:
    assert isinstance(merge, Merge)
    for path, layer in list(known.items()):
        if layer.parent == merge.top:
            known[path] = Layer(path, merge.base, layer.made, layer.fixed)
    for path in merge.gone:
        del known[path]
    if merge.top in held:
        held.discard(merge.top)
        held.add(merge.base)
