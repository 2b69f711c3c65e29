"""Dirty bitmaps: what changed on a disk since a moment, over all of its layers.

A bitmap of a disk is one bitmap of that name in each layer from the top one down to the one that was on top when it was
begun. What a lower layer's marks stays as it is; the top one's goes on. All of them together mark at least what has
changed, perhaps more (a merge of layers marks all that it writes). A bitmap that a layer in between lacks, or whose
image was not closed properly (QEMU was killed), is none: a full backup must follow.

Bitmaps are kept in the image where it is a qcow2, else in QEMU's memory only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.errors import InUse, NotFound, NotPermitted
from hostler.qemu import blockdev, layers
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio
from hostler.qemu.qmp import QmpSession

Nodes = Mapping[str, block.Node]


def run_of(disk: Disk, name: str, nodes: Nodes) -> list[tuple[str, str]]:
    """The bitmap in each layer that has it, top first, by node and name. NotFound when it is none (see above)."""
    layers_of = [nodes.get(blockdev.layer_node(disk, layer)) for layer in disk.source.layers()]
    holds = [_find(node, name) for node in layers_of]
    first_without = holds.index(None) if None in holds else len(holds)
    whole = first_without > 0 and not any(holds[first_without:])
    top = holds[0]
    if not whole or top is None or not top.recording or any(b is not None and b.inconsistent for b in holds):
        raise NotFound(
            f"disk {disk.id}",
            f"what changed since the beginning of {name} is not known",
            "make a full backup",
            bitmap=name,
        )
    return [(node.name, name) for node in layers_of[:first_without] if node is not None]


def _find(node: block.Node | None, name: str) -> block.Bitmap | None:
    return next((b for b in node.bitmaps if b.name == name), None) if node is not None else None


def _names(disk: Disk, nodes: Nodes) -> list[str]:
    """Names of all bitmaps of its top layer."""
    top = nodes.get(blockdev.node_name(disk))
    return [b.name for b in top.bitmaps] if top is not None else []


def _whole(disk: Disk, nodes: Nodes) -> dict[str, list[tuple[str, str]]]:
    """Every bitmap of the disk that is known, with its parts."""
    found = {}
    for name in _names(disk, nodes):
        try:
            found[name] = run_of(disk, name, nodes)
        except NotFound:
            continue
    return found


async def listed(qmp: QmpSession, disk: Disk) -> dict[str, int]:
    """See `Blocks.bitmaps`: the sum over its layers, at most the disk's size."""
    nodes = await block.block_nodes(qmp)
    return {name: _marked(disk, parts, nodes) for name, parts in _whole(disk, nodes).items()}


def _marked(disk: Disk, parts: Sequence[tuple[str, str]], nodes: Nodes) -> int:
    counts = [found.count for node, name in parts if (found := _find(nodes[node], name)) is not None]
    return min(sum(counts), disk.source.size or sum(counts))


def _kept(layer: DiskSource) -> bool:
    return layer.format is ImageFormat.QCOW2


async def add(qmp: QmpSession, aio: Aio, disks: Sequence[Disk], name: str) -> None:
    """See `Blocks.add_bitmaps`. What is left of one that is known no more goes first."""
    for disk in disks:
        layers.check_seen(disk)
    nodes = await block.block_nodes(qmp)
    new = [disk for disk in disks if name not in _whole(disk, nodes)]
    await drop(qmp, aio, new, name)
    if new:
        actions = [
            block.bitmap_add_action(blockdev.node_name(disk), name, persistent=_kept(disk.source)) for disk in new
        ]
        await block.transaction(qmp, actions)


async def drop(qmp: QmpSession, aio: Aio, disks: Sequence[Disk], name: str) -> None:
    """See `Blocks.drop_bitmaps`. Lower layers are opened for writing meanwhile, where the image holds it; in one that
    may not be written to it stays, and makes the next bitmap of this name mark too much, never too little."""
    nodes = await block.block_nodes(qmp)
    for disk in disks:
        for layer in disk.source.layers():
            node = blockdev.layer_node(disk, layer)
            if _find(nodes.get(node), name) is None:
                continue
            try:
                await _remove(qmp, aio, disk, layer, name)
            except (InUse, NotPermitted, NotFound):
                if layer is disk.source:
                    raise


async def _remove(qmp: QmpSession, aio: Aio, disk: Disk, layer: DiskSource, name: str) -> None:
    lower = layer is not disk.source and _kept(layer)
    if lower:
        await layers.reopen(qmp, aio, disk, layer, writes=True)
    try:
        await block.transaction(qmp, [block.bitmap_remove_action(blockdev.layer_node(disk, layer), name)])
    finally:
        if lower:
            await layers.reopen(qmp, aio, disk, layer, writes=False)


async def extend_down(qmp: QmpSession, aio: Aio, disk: Disk, top: DiskSource, base: DiskSource) -> None:
    """Before the layers from `top` on are merged into `base`: what is written there shall be marked there, in every
    bitmap that one of them has, since theirs go."""
    nodes = await block.block_nodes(qmp)
    node = blockdev.layer_node(disk, base)
    going = {blockdev.layer_node(disk, layer) for layer in _between(disk, top, base)}
    missing = [
        name
        for name, parts in _whole(disk, nodes).items()
        if _find(nodes.get(node), name) is None and any(part[0] in going for part in parts)
    ]
    if missing:
        await layers.reopen(qmp, aio, disk, base, writes=True)
        await block.transaction(qmp, [block.bitmap_add_action(node, name, persistent=_kept(base)) for name in missing])


async def lift(qmp: QmpSession, disk: Disk, base: DiskSource | None) -> None:
    """Before lower layers, down to `base` (without), are copied into the top one: it takes over what they mark."""
    nodes = await block.block_nodes(qmp)
    going = {blockdev.layer_node(disk, layer) for layer in _between(disk, disk.source.backing, base)}
    top = blockdev.node_name(disk)
    actions = [
        block.bitmap_merge_action(top, name, sources)
        for name, parts in _whole(disk, nodes).items()
        if (sources := [part for part in parts if part[0] in going])
    ]
    if actions:
        await block.transaction(qmp, actions)


def _between(disk: Disk, first: DiskSource | None, end: DiskSource | None) -> Iterator[DiskSource]:
    """Its layers from `first` down to `end`, without that one (None: to the last)."""
    inside = False
    for layer in disk.source.layers():
        inside = inside or (first is not None and layer.node == first.node)
        if end is not None and layer.node == end.node:
            return
        if inside:
            yield layer


async def keep(qmp: QmpSession, disk: Disk, target: DiskSource) -> None:
    """See `Blocks.keep_bitmaps`."""
    nodes = await block.block_nodes(qmp)
    node = blockdev.layer_node(disk, target)
    for name, parts in _whole(disk, nodes).items():
        actions = [block.bitmap_merge_action(node, name, parts)]
        if _find(nodes.get(node), name) is None:
            actions = [block.bitmap_add_action(node, name, persistent=_kept(target)), *actions]
        await block.transaction(qmp, actions)
