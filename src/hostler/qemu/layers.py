"""The layers of a running VM's disks: a new one on top, opened for writing or reading, closed.

    top --blockdev-add, blockdev-snapshot--> new top on top of it --reopen--> the old one is only read

What QEMU 7.2 does, as measured:
- A node that was made inside another one's options (a chain on the command line) goes with it and cannot be deleted
  alone ("not owned by the monitor"); one that was added by itself stays until it is deleted.
- A lower layer is opened read-only down to its file, and no job opens it for writing by itself: `reopen` does.
- An intermediate commit aborts the whole QEMU when the layer above its top is not open for writing (its header is
  written at the end), instead of failing: `blockjobs.commit` opens that one too.
"""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from hostler.model.disk import Disk, DiskSource
from hostler.model.errors import Busy, HostlerError, InvalidInput, QemuFailed, WrongState
from hostler.qemu import blockdev, commands
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio
from hostler.qemu.failures import image_error
from hostler.qemu.qmp import QmpSession

_BUSY = ("is busy", "is in use", "Need a root block node", "already in use")
"""How QEMU says that a job, perhaps one that has ended and is not forgotten, holds a node."""

AIOS: tuple[Aio, ...] = typing.get_args(Aio)


async def chains(qmp: QmpSession) -> dict[str, tuple[str, ...]]:
    """Disk id to the nodes of its layers, top first, as QEMU has them now."""
    found = ((blockdev.disk_id(device), nodes) for device, nodes in (await block.chains(qmp)).items())
    return {
        disk: tuple(node for node in nodes if blockdev.is_layer_of(disk, node))
        for disk, nodes in found
        if disk is not None
    }


async def push(qmp: QmpSession, aio: Aio, disks: Sequence[Disk], bitmaps: Mapping[str, Sequence[str]]) -> None:
    """See `Blocks.push`. The overlays are opened before; only the switch itself stops the disks' I/O."""
    have = await chains(qmp)
    new = [disk for disk in disks if blockdev.node_name(disk) not in have.get(disk.id, ())]
    for disk in new:
        check_seen(disk)
        _check_below(disk, have)
    added: list[str] = []
    try:
        for disk in new:
            if await add_node(qmp, disk, blockdev.overlay_options(disk, aio)):
                added.append(blockdev.node_name(disk))
        if new:
            await block.transaction(qmp, _push_actions(new, bitmaps))
    except BaseException as error:
        await drop_quietly(qmp, added)
        if isinstance(error, QemuFailed):
            raise explained(new[0], new[0].source, error) from error
        raise
    for disk in new:
        below = disk.source.backing
        if below is not None:
            # So that its bitmaps are written down, and all lower layers are alike; it is only read either way.
            with suppress(HostlerError):
                await reopen(qmp, aio, disk, below, writes=False)


def check_seen(disk: Disk) -> None:
    """InvalidInput for a disk whose guest talks to the device itself."""
    if disk.reservations:
        raise InvalidInput(
            f"disk {disk.id}",
            "its guest talks to the device itself, so that QEMU does not see what it writes",
            "attach it without persistent reservations for that",
        )


def _check_below(disk: Disk, have: Mapping[str, Sequence[str]]) -> None:
    chain = have.get(disk.id)
    below = disk.source.backing
    if not chain or below is None or chain[0] != blockdev.layer_node(disk, below):
        raise WrongState(
            f"disk {disk.id}",
            f"its top layer in QEMU is {chain[0] if chain else 'none'}, not the one the new layer builds on",
            "read its layers back",
        )


def _push_actions(disks: Sequence[Disk], bitmaps: Mapping[str, Sequence[str]]) -> list[block.Action]:
    """The bitmaps first: nothing is written to a new layer before the end of the transaction."""
    actions = [
        block.bitmap_add_action(blockdev.node_name(disk), name, persistent=True)
        for disk in disks
        for name in bitmaps.get(disk.id, ())
    ]
    for disk in disks:
        assert disk.source.backing is not None
        below = blockdev.layer_node(disk, disk.source.backing)
        actions.append(block.snapshot_action(below, blockdev.node_name(disk)))
    return actions


async def add_node(qmp: QmpSession, disk: Disk, options: blockdev.Options) -> bool:
    """Open an image; False when that node is there already (an earlier try made it)."""
    try:
        await commands.blockdev_add(qmp, options)
    except QemuFailed as error:
        if "Duplicate nodes" in error.cause:
            return False
        raise explained(disk, disk.source, error) from error
    return True


async def reopen(qmp: QmpSession, aio: Aio, disk: Disk, layer: DiskSource, writes: bool) -> None:
    """See `Blocks.reopen`. Harmless when it is open so. How files are read cannot be changed, and may be another way
    than this daemon would choose (QEMU may be older than it): then the others are tried."""
    nodes = await block.block_nodes(qmp)
    node, below = (nodes.get(name) for name in blockdev.layer_nodes(disk, layer))
    if node is None:
        raise WrongState(f"disk {disk.id}", f"QEMU has not its layer {layer.path}", "read its layers back")
    if node.read_only != writes and (below is None or below.read_only != writes):
        return
    export = _export_of(node)
    if export is not None and writes:
        # The export may have been started anew with the right to write; QEMU learns of it when it connects again.
        await block.read_a_sector(qmp, node.name)
    await _reopen(qmp, aio, disk, layer, writes, export)


async def flush(qmp: QmpSession, aio: Aio, disk: Disk) -> None:
    """See `Blocks.flush`. QEMU flushes an image before it opens it anew, and refuses to do so where that fails; it has
    no command that flushes alone (7.2)."""
    node = (await block.block_nodes(qmp)).get(blockdev.layer_node(disk, disk.source))
    if node is None:
        raise WrongState(f"disk {disk.id}", f"QEMU has not its layer {disk.source.path}", "read its layers back")
    await _reopen(qmp, aio, disk, disk.source, not node.read_only, _export_of(node))


async def _reopen(qmp: QmpSession, aio: Aio, disk: Disk, layer: DiskSource, writes: bool, export: str | None) -> None:
    refused: QemuFailed | None = None
    for way in (aio, *(other for other in AIOS if other != aio)):
        options = blockdev.reopen_options(disk, layer, writes, export, way)
        try:
            await block.blockdev_reopen(qmp, options)
            return
        except QemuFailed as error:
            refused = error
            if "Cannot change the option 'aio'" not in error.cause:
                break
    assert refused is not None
    raise explained(disk, layer, refused) from refused


def _export_of(node: block.Node) -> str | None:
    """The socket of the export behind a node; None where QEMU opens the image itself."""
    return node.file.partition("?socket=")[2] if node.file.startswith("nbd+unix://") else None


async def close(qmp: QmpSession, disk_id: str, node: str) -> None:
    """See `Blocks.close`. Busy while something uses it."""
    try:
        await commands.blockdev_del(qmp, node)
    except QemuFailed as error:
        if "Failed to find node" in error.cause:
            return
        if "in use" in error.cause or "not owned by the monitor" in error.cause:
            raise Busy(
                f"disk {disk_id}", f"its layer {node} is still used: {error.cause}", "wait for what uses it"
            ) from error
        raise


async def close_unused(qmp: QmpSession) -> None:
    """Close every layer's image that no device uses any more. QEMU refuses for what a job or an export still uses, and
    for what is nested in another node; what was used by a closed one may go then."""
    while True:
        used = await chains(qmp)
        nodes = await block.block_nodes(qmp)
        outcomes = [
            await _closed(qmp, node)
            for disk, chain in used.items()
            for node in nodes
            if blockdev.is_layer_of(disk, node) and node not in chain
        ]
        if not any(outcomes):
            return


async def _closed(qmp: QmpSession, node: str) -> bool:
    try:
        await commands.blockdev_del(qmp, node)
    except QemuFailed as error:
        if error.details.get("gone"):
            raise
        return False
    return True


async def drop_quietly(qmp: QmpSession, nodes: Collection[str]) -> None:
    """Undo of what was added, as far as QEMU lets it go."""
    for node in nodes:
        with suppress(HostlerError):
            await commands.blockdev_del(qmp, node)


def explained(disk: Disk, layer: DiskSource, error: QemuFailed) -> HostlerError:
    """The error as one about the disk, where QEMU's text says more than that it refused."""
    if error.details.get("gone"):
        return error
    if any(words in error.cause for words in _BUSY):
        return Busy(f"disk {disk.id}", f"other work on it is under way ({error.cause})", "wait for it, or cancel it")
    return image_error(f"disk {disk.id}", error.cause, layer.path) or error
